"""Extractive question answering: two distributions over the positions of a window, its answer's start and end."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ted_ds.batch import Batch, BatchCounts
from ted_ds.config.sections import LossConfig
from ted_ds.evaluation.squad_scores import best_spans
from ted_ds.models.filters import Filter, fresh_linear
from ted_ds.models.readout import TaskReadout
from ted_ds.tasks.base import Reading, TaskLosses, wide
from ted_ds.tasks.classification import kl_sum


class QuestionAnswering:
    """pred_loss: mean of the start's and the end's CE. kl_loss: likewise, each the mean over windows."""

    def readout(self, model: Any) -> TaskReadout:
        """Reads logits [B, 2, S]."""
        return TaskReadout(model)

    def losses(
        self, student: Reading, teacher: Reading | None, batch: Batch, counts: BatchCounts, loss: LossConfig
    ) -> TaskLosses:
        """CE and KL of logits [B, 2, S], over real positions or, without `mask_padding`, all of them."""
        mask = batch.attention_mask if loss.mask_padding else None
        z_s = _masked(wide(student.output), mask)
        pred = _span_cross_entropy(z_s, batch, counts)
        if teacher is None:
            return TaskLosses(pred, pred.detach(), torch.zeros_like(pred.detach()))
        z_t = _masked(teacher.output.to(z_s.dtype), mask)
        kl = kl_sum(z_s, z_t, loss.temperature) / (2 * counts.rows)
        return TaskLosses(pred + loss.kl_alpha * kl, pred.detach(), kl.detach())

    def predict(self, student: Reading, batch: Batch) -> torch.Tensor:
        """[B, 4 * 20 + 1], the best candidates of each window; see `best_spans`."""
        starts, ends = _masked(wide(student.output), batch.attention_mask).unbind(1)
        return best_spans(starts, ends)


class SpanHead:
    """Stage I's head for a question: Linear(F, 2) on every token."""

    def __init__(self, *, mask_padding: bool) -> None:
        self._mask_padding = mask_padding

    def tensors(self, filter_: Filter) -> dict[str, nn.Parameter]:
        """`head_weight` [2, F] and `head_bias` [2]."""
        weight, bias = fresh_linear(filter_.output_dim, 2)
        return {"head_weight": weight, "head_bias": bias}

    def inputs(self, hidden: torch.Tensor, batch: Batch, index: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All states [B, S, D]; the positions of starts [B]."""
        return hidden, batch.targets

    def loss(
        self,
        states: torch.Tensor,
        targets: torch.Tensor,
        tensors: dict[str, torch.Tensor],
        batch: Batch,
        counts: BatchCounts,
        *,
        training: bool,
    ) -> torch.Tensor:
        """The mean of the start's and the end's CE."""
        logits = functional.linear(states, tensors["head_weight"], tensors["head_bias"]).transpose(1, 2)
        return _span_cross_entropy(
            _masked(wide(logits), batch.attention_mask if self._mask_padding else None), batch, counts
        )


def _masked(logits: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Logits [B, 2, S] with probability 0 at padding; finite at any temperature, for 0 * inf is nan in the KL."""
    if mask is None:
        return logits
    return logits.masked_fill((mask == 0)[:, None], -1e9)


def _span_cross_entropy(logits: torch.Tensor, batch: Batch, counts: BatchCounts) -> torch.Tensor:
    """(mean CE of starts + mean CE of ends) / 2; positions beyond the sequence are not counted (Batch.ends)."""
    assert batch.ends is not None
    length = logits.shape[-1]
    total = logits.new_zeros(())
    for z, positions, count in ((logits[:, 0], batch.targets, counts.targets), (logits[:, 1], batch.ends, counts.ends)):
        clamped = positions.clamp(0, length)
        total = total + functional.cross_entropy(z, clamped, ignore_index=length, reduction="sum") / count.clamp_min(1)
    return total / 2
