"""Held-out perplexity from an engine: exact over all tokens, the same at any number of ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ted_ds.batch import Batch
from ted_ds.distributed import World
from ted_ds.evaluation.scores import perplexity


def held_out_perplexity(engine: Any, rows: Iterable[Batch], world: World) -> dict[str, float]:
    """validation_loss (nats a token) and validation_perplexity = exp of it; a collective.

    rows: as many batches on every rank (ranks without rows get batches without targets), since ZeRO-3
    gathers weights collectively. Sums are float64: the split over ranks shows in the last digits only.
    """
    engine.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)
    with torch.no_grad():
        for batch in rows:
            sums += torch.stack(engine(batch=batch.to(world.device))).to(sums)
    engine.train()
    nll, count = world.sum(sums).tolist()
    score = perplexity(nll, int(count))
    return {"validation_loss": score.loss, "validation_perplexity": score.perplexity}
