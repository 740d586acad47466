"""What the two stages ask of a task."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from ted_ds.batch import Batch, BatchCounts
from ted_ds.config.sections import LossConfig
from ted_ds.models.filters import Filter
from ted_ds.models.readout import Readout
from ted_ds.ops import Head


class Reading(NamedTuple):
    """What a readout makes of a batch: its output, and the head where the losses need its weight."""

    output: torch.Tensor
    head: Head | None


class TaskLosses(NamedTuple):
    """A micro-batch's share of the global batch's terms, all scalars; `total` alone is differentiable.

    total = pred_loss + kl_alpha * kl_loss.
    """

    total: torch.Tensor
    pred_loss: torch.Tensor
    kl_loss: torch.Tensor


class Task(Protocol):
    """Stage II's side of a task; see `ted_ds.tasks` for the three there are."""

    def readout(self, model: Any) -> Readout:
        """The module that reads `model`, a student or teacher of this task."""
        ...

    def losses(
        self, student: Reading, teacher: Reading | None, batch: Batch, counts: BatchCounts, loss: LossConfig
    ) -> TaskLosses:
        """CE and KL, sums over the micro-batch over counts of the global batch. teacher: None without a KL."""
        ...

    def predict(self, student: Reading, batch: Batch) -> Any:
        """What evaluation collects of a batch, without gradients."""
        ...


class DisposableHead(Protocol):
    """Stage I's side of a task: the head that each filter is trained behind, and that is thrown away."""

    def tensors(self, filter_: Filter) -> dict[str, nn.Parameter]:
        """Fresh parameters of the head of one filter."""
        ...

    def inputs(self, hidden: torch.Tensor, batch: Batch, index: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(the hidden states that filter `index` has to see at `step`, what they are compared with)."""
        ...

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
        """The micro-batch's share of the task loss of filtered `states`; scalar."""
        ...


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """In float32 at least: sums of exponentials lose too much in half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
