"""Sequence classification and regression: CE or MSE, and KL between the logits of whole sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ted_ds.batch import IGNORED, Batch, BatchCounts
from ted_ds.config.sections import LossConfig
from ted_ds.models.filters import Filter, fresh_linear
from ted_ds.models.labels import label_order
from ted_ds.models.pooler import PoolerPlan
from ted_ds.models.readout import TaskReadout
from ted_ds.tasks.base import Reading, TaskLosses, wide


class Classification:
    """pred_loss: mean CE over labelled rows. kl_loss: T^2 KL, mean over all rows (`batchmean`).

    labels: the data's labels in order; models with the same labels in another order are mapped by name.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        self._labels = tuple(labels)

    def readout(self, model: Any) -> TaskReadout:
        """Reads logits [B, C] in the data's order; ModelError where the model's labels are not the data's."""
        return TaskReadout(model, label_order(model.config, self._labels))

    def losses(
        self, student: Reading, teacher: Reading | None, batch: Batch, counts: BatchCounts, loss: LossConfig
    ) -> TaskLosses:
        """CE and KL of logits [B, C]."""
        z_s = wide(student.output)
        pred = _cross_entropy_sum(z_s, batch.targets) / counts.targets.clamp_min(1)
        if teacher is None:
            return TaskLosses(pred, pred.detach(), torch.zeros_like(pred.detach()))
        kl = kl_sum(z_s, teacher.output.to(z_s.dtype), loss.temperature) / counts.rows
        return TaskLosses(pred + loss.kl_alpha * kl, pred.detach(), kl.detach())

    def predict(self, student: Reading, batch: Batch) -> torch.Tensor:
        """Logits [B, C]."""
        return student.output


class Regression:
    """pred_loss: mean squared error over labelled rows. kl_loss: T^2 KL with the softmax over the *examples* of
    the global batch, divided by their number, which is what the paper's code computes.

    gather: own predictions [B] -> every rank's, in one tensor; the softmax needs them all. The rows of a step
        must therefore lie in one micro-batch on each rank.
    """

    def __init__(self, gather: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._gather = gather

    def readout(self, model: Any) -> TaskReadout:
        """Reads logits [B, 1]."""
        return TaskReadout(model)

    def losses(
        self, student: Reading, teacher: Reading | None, batch: Batch, counts: BatchCounts, loss: LossConfig
    ) -> TaskLosses:
        """MSE and KL of predictions [B, 1]."""
        y_s = wide(student.output).squeeze(-1)
        pred = _squared_error_sum(y_s, batch.targets) / counts.targets.clamp_min(1)
        if teacher is None:
            return TaskLosses(pred, pred.detach(), torch.zeros_like(pred.detach()))
        y_t = teacher.output.squeeze(-1).to(y_s.dtype)
        kl = self._divergence(y_s, y_t, loss.temperature) / counts.rows
        return TaskLosses(pred + loss.kl_alpha * kl, pred.detach(), kl.detach())

    def predict(self, student: Reading, batch: Batch) -> torch.Tensor:
        """Predictions [B, 1]."""
        return student.output

    def _divergence(self, y_s: torch.Tensor, y_t: torch.Tensor, temperature: float) -> torch.Tensor:
        """This rank's summands of T^2 sum p (log p - log q), and the gradient of the *whole* sum.

        The normaliser of q holds every rank's predictions, so a rank's own summands alone would miss what its
        predictions do to the others': d(sum)/dy = T (q - p).
        """
        scaled = (y_s.detach() / temperature, y_t / temperature)
        log_q, log_p = (z - torch.logsumexp(self._gather(z), dim=0) for z in scaled)
        value = temperature**2 * (log_p.exp() * (log_p - log_q)).sum()
        slope = temperature * (log_q.exp() - log_p.exp())
        carrier = (slope * y_s).sum()
        return value + carrier - carrier.detach()


class PoolerHead:
    """Stage I's head for a sequence: the family's own pooler at width F, dropout, and a linear classifier.

    num_outputs: C; 1 with `regression`.
    """

    def __init__(self, pooler: PoolerPlan, num_outputs: int, *, regression: bool = False) -> None:
        self._pooler, self._num_outputs, self._regression = pooler, num_outputs, regression

    def tensors(self, filter_: Filter) -> dict[str, nn.Parameter]:
        """The pooler's parameters, `head_weight` [C, F] and `head_bias` [C]."""
        weight, bias = fresh_linear(filter_.output_dim, self._num_outputs)
        return {**self._pooler.tensors(filter_.output_dim), "head_weight": weight, "head_bias": bias}

    def inputs(self, hidden: torch.Tensor, batch: Batch, index: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The states that the pooler reads, [B, 1, D] but for a mean, and the labels [B]."""
        return self._pooler.select(hidden, batch.attention_mask), batch.targets

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
        """CE or squared error of the head's outputs."""
        pooled = self._pooler.pool(states, batch.attention_mask, tensors, training=training)
        outputs = wide(functional.linear(pooled, tensors["head_weight"], tensors["head_bias"]))
        if self._regression:
            return _squared_error_sum(outputs.squeeze(-1), targets) / counts.targets.clamp_min(1)
        return _cross_entropy_sum(outputs, targets) / counts.targets.clamp_min(1)


def kl_sum(z_s: torch.Tensor, z_t: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 KL(softmax(z_t / T) || softmax(z_s / T)) over the last dimension, summed over the others."""
    log_q, log_p = (functional.log_softmax(z / temperature, dim=-1) for z in (z_s, z_t))
    return temperature**2 * functional.kl_div(log_q, log_p, log_target=True, reduction="sum")


def _cross_entropy_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")


def _squared_error_sum(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Over the rows that have a label, which is nan where there is none."""
    labelled = ~labels.isnan()
    error = outputs - labels.nan_to_num().to(outputs.dtype)
    return (error.square() * labelled).sum()
