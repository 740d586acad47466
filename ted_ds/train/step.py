"""One optimizer step, the same for both stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ted_ds.batch import Batch, BatchCounts
from ted_ds.distributed import World
from ted_ds.telemetry.timeline import phase


def global_counts(batches: Sequence[Batch], world: World) -> BatchCounts:
    """The counts of the global batch, on the device; a collective."""
    return BatchCounts(world.sum(torch.stack([BatchCounts.of(batch).values for batch in batches]).sum(0)))


def train_step(engine: Any, batches: Sequence[Batch], world: World, **inputs: Any) -> torch.Tensor:
    """One optimizer step over this rank's micro-batches; returns this rank's share of the terms, on the device.

    Each term is a sum over a count of the *global* batch, so a step does not depend on how rows were split
    into ranks and micro-batches; added over ranks the terms are the global batch's losses.

    engine: a DeepSpeed engine whose module returns (loss, terms) for `batch`, `counts` and `inputs`.
    """
    with phase("data"):
        counts = global_counts(batches, world)
    total: torch.Tensor | float = 0.0
    for batch in batches:
        with phase("data"):
            moved = batch.to(world.device)
        with phase("student_forward"):  # the module marks what is none of it
            loss, terms = engine(batch=moved, counts=counts, **inputs)
        with phase("backward"):
            # DeepSpeed averages over ranks and, unless told, micro-batches; our terms are global means already
            engine.backward(loss * world.size, scale_wrt_gas=False)
        with phase("step"):
            engine.step()
        total = total + terms
    assert isinstance(total, torch.Tensor)
    return total
