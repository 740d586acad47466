"""One optimizer step, the same for both stages."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ted_ds.batch import Batch, BatchCounts
from ted_ds.job.world import World
from ted_ds.telemetry.timeline import phase


def global_counts(batches: Sequence[Batch], world: World) -> BatchCounts:
    """The counts of the global batch, on the device; a collective."""
    return BatchCounts(world.sum(torch.stack([BatchCounts.of(batch).values for batch in batches]).sum(0)))


def train_step(
    engine: Any,
    batches: Sequence[Batch],
    world: World,
    *,
    before: Callable[[int], None] = lambda index: None,
    watch: Callable[[int, torch.Tensor], None] = lambda index, terms: None,
    **inputs: Any,
) -> torch.Tensor:
    """One optimizer step over this rank's micro-batches; returns this rank's share of the terms, on the device.

    Each term is a sum over a count of the *global* batch, so a step does not depend on how rows were split
    into ranks and micro-batches; added over ranks the terms are the global batch's losses.

    A loss that is not finite makes every gradient nan, which is what DeepSpeed looks for before it applies them.

    engine: a DeepSpeed engine whose module returns (loss, terms) for `batch`, `counts` and `inputs`.
    before, watch: called before each micro-batch's forward, and with its terms after it.
    """
    with phase("data"):
        counts = global_counts(batches, world)
    total: torch.Tensor | float = 0.0
    for index, batch in enumerate(batches):
        with phase("data"):
            moved = batch.to(world.device)
        before(index)
        with phase("student_forward"):  # the module marks what is none of it
            loss, terms = engine(batch=moved, counts=counts, **inputs)
        watch(index, terms)
        with phase("backward"):
            # DeepSpeed averages over ranks and, unless told, micro-batches; our terms are global means already
            engine.backward(loss * torch.where(torch.isfinite(loss), world.size, math.nan), scale_wrt_gas=False)
        with phase("step"):
            engine.step()
        total = total + terms
    assert isinstance(total, torch.Tensor)
    return total
