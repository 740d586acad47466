"""Sequence classification and regression: CE or MSE, and KL between the logits of whole sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ted_ds.batch import IGNORED, Batch, BatchCounts
from ted_ds.config.schema import RunConfig
from ted_ds.config.sections import LossConfig
from ted_ds.config.tasks import TASKS, TaskSpec
from ted_ds.data.encoded import EncodedRows
from ted_ds.evaluation.glue import glue_scores
from ted_ds.job.world import World
from ted_ds.models.filters import Filter, fresh_linear
from ted_ds.models.labels import label_order
from ted_ds.models.pooler import PoolerPlan, find_pooler
from ted_ds.models.readout import TaskReadout
from ted_ds.tasks.base import DisposableHead, trusts_code, wide
from ted_ds.tasks.labelled import LabelledTask, kl_sum


class Classification(LabelledTask):
    """pred_loss: mean CE over labelled rows. kl_loss: T^2 KL, mean over all rows (`batchmean`).

    labels: the data's labels in order; models with the same labels in another order are mapped by name.
    """

    def __init__(self, labels: Sequence[str], spec: TaskSpec = TASKS["classification"]) -> None:
        super().__init__(spec)
        self._labels, self.num_outputs = tuple(labels), len(labels)

    @classmethod
    def from_spec(cls, spec: TaskSpec, world: World, vocab_size: int) -> Classification:
        """With the labels of `spec`."""
        return cls(spec.labels, spec)

    @classmethod
    def check_stage1(cls, config: PreTrainedConfig) -> None:
        """The family must have a pooler that is known."""
        find_pooler(config)

    def readout(self, model: Any) -> TaskReadout:
        """Reads logits [B, C] in the data's order; ModelError if the model's labels are not the data's."""
        return TaskReadout(model, label_order(model.config, self._labels))

    def pred_loss(self, z_s: torch.Tensor, batch: Batch, counts: BatchCounts) -> torch.Tensor:
        """CE of logits [B, C]."""
        return _cross_entropy_sum(z_s, batch.targets) / counts.targets.clamp_min(1)

    def kl_loss(self, z_s: torch.Tensor, z_t: torch.Tensor, counts: BatchCounts, temperature: float) -> torch.Tensor:
        """KL of logits [B, C]."""
        return kl_sum(z_s, z_t, temperature) / counts.rows

    def disposable_head(self, model: PreTrainedModel, run: RunConfig, world: World, side: str) -> PoolerHead:
        """The family's pooler and a linear classifier."""
        return PoolerHead(_pooler(model, run, side), self.num_outputs)

    def scores(self, rows: EncodedRows, outputs: np.ndarray) -> dict[str, float]:
        """GLUE's of logits [rows, C]."""
        return glue_scores(self.spec.metrics, outputs, rows.targets)


class Regression(LabelledTask):
    """pred_loss: mean squared error over labelled rows. kl_loss: T^2 KL with the softmax over the *examples* of
    the global batch, divided by their number, which is what the paper's code computes.

    gather: own predictions [B] -> every rank's, in one tensor; the softmax needs them all. The rows of a step
        must therefore lie in one micro-batch on each rank.
    """

    num_outputs = 1

    def __init__(self, gather: Callable[[torch.Tensor], torch.Tensor], spec: TaskSpec = TASKS["regression"]) -> None:
        super().__init__(spec)
        self._gather = gather

    @classmethod
    def from_spec(cls, spec: TaskSpec, world: World, vocab_size: int) -> Regression:
        """Over the ranks of `world`."""
        return cls(world.gather, spec)

    @classmethod
    def check_stage1(cls, config: PreTrainedConfig) -> None:
        """The family must have a pooler that is known."""
        find_pooler(config)

    def comparable(self, output: torch.Tensor, batch: Batch, loss: LossConfig) -> torch.Tensor:
        """Predictions [B]."""
        return wide(output).squeeze(-1)

    def pred_loss(self, z_s: torch.Tensor, batch: Batch, counts: BatchCounts) -> torch.Tensor:
        """Mean squared error of predictions [B]."""
        return _squared_error_sum(z_s, batch.targets) / counts.targets.clamp_min(1)

    def kl_loss(self, z_s: torch.Tensor, z_t: torch.Tensor, counts: BatchCounts, temperature: float) -> torch.Tensor:
        """KL over the examples."""
        return self._divergence(z_s, z_t, temperature) / counts.rows

    def disposable_head(self, model: PreTrainedModel, run: RunConfig, world: World, side: str) -> PoolerHead:
        """The family's pooler and a linear layer."""
        return PoolerHead(_pooler(model, run, side), 1, regression=True)

    def scores(self, rows: EncodedRows, outputs: np.ndarray) -> dict[str, float]:
        """GLUE's of predictions [rows, 1]."""
        return glue_scores(self.spec.metrics, outputs[:, 0], rows.targets)

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


class PoolerHead(DisposableHead):
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


def _pooler(model: PreTrainedModel, run: RunConfig, side: str) -> PoolerPlan:
    dropout = run.filters.head_dropout
    # from its folder: the config of the frozen model itself has its dropout taken out
    config = AutoConfig.from_pretrained(str(model.name_or_path), trust_remote_code=trusts_code(run, side))
    return find_pooler(config, None if dropout is None else getattr(dropout, side))


def _cross_entropy_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")


def _squared_error_sum(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Over the rows that have a label, which is nan if there is none."""
    labelled = ~labels.isnan()
    error = outputs - labels.nan_to_num().to(outputs.dtype)
    return (error.square() * labelled).sum()
