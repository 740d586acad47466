"""What a task's model says of every row of a split, gathered from all ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from ted_ds.batch import Batch, on_device
from ted_ds.job.world import World


def collect_outputs(engine: Any, batches: Iterable[Batch], num_rows: int, world: World) -> np.ndarray:
    """[num_rows, C] float32, in the order of the split; a collective.

    batches: as many on every rank and of one size, with `Batch.rows` naming each row, -1 for fillers.
    engine: whose module returns [B, C] for a batch without counts; C is the same for all batches.
    """
    engine.eval()
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    with torch.no_grad():
        for batch in batches:
            assert batch.rows is not None
            rows_here = on_device(batch.rows, world.device)
            found.append((rows_here, engine(batch=batch.to(world.device)).float()))
    engine.train()
    rows, outputs = (world.gather(torch.cat(parts)).cpu() for parts in zip(*found, strict=True))
    whole = torch.empty(num_rows, outputs.shape[1])
    real = rows >= 0
    whole[rows[real]] = outputs[real]
    return whole.numpy()
