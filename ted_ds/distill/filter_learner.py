"""Stage I: every filter learns, behind a disposable head, to solve the task from one hidden state.

The model is frozen and runs once, without gradients. As block j_k ends, filter k's loss *and its gradients*
are computed at once and nothing of the block is kept, so the memory is that of one block's filter however
many there are; a single backward then hands the K sets of gradients to the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ted_ds.batch import Batch, BatchCounts
from ted_ds.models.filters import Filter
from ted_ds.ops import eager_gradients
from ted_ds.tasks.base import DisposableHead
from ted_ds.teacher.contract import stream_states
from ted_ds.teacher.frozen import FrozenModel
from ted_ds.telemetry.timeline import phase

HeadLoss = Callable[[torch.Tensor, dict[str, torch.Tensor]], torch.Tensor]


class FilterProbe(nn.Module):
    """A filter and its disposable head.

    Like `Filter` it owns all its tensors (shared ones for the filter's), so that ZeRO-3 gathers them together.
    """

    def __init__(self, filter_: Filter, head: DisposableHead) -> None:
        super().__init__()
        self.filter = filter_
        for name, parameter in filter_.named_parameters():
            self.register_parameter(f"filter_{name}", parameter)
        self._num_filter = len(list(filter_.parameters()))
        tensors = head.tensors(filter_)
        self._names = tuple(tensors)
        for name, parameter in tensors.items():
            # ZeRO-3 wants one dtype for all that it shards
            self.register_parameter(name, nn.Parameter(parameter.detach().to(filter_.weight.dtype)))

    def forward(self, hidden: torch.Tensor, *, loss: HeadLoss) -> torch.Tensor:
        """The task loss of this filter's head, its gradients already computed.

        hidden: [.., D], constant; loss(filtered states [.., F], the head's tensors by name) -> scalar.
        """

        def compute(*tensors: torch.Tensor) -> torch.Tensor:
            own, head = tensors[: self._num_filter], tensors[self._num_filter :]
            states = self.filter.states(hidden.to(own[0].dtype), *own)
            return loss(states, dict(zip(self._names, head, strict=True)))

        return eager_gradients(compute, *self.parameters(recurse=False))


class FilterLearner(nn.Module):
    """The module in Stage I's engine; its forward is one micro-batch of every filter's task loss.

    filters: K filters for the blocks `blocks` of the frozen model, each trained behind a `head` of its own.
    """

    def __init__(
        self, filters: Iterable[Any], frozen: FrozenModel, blocks: tuple[int, ...], head: DisposableHead
    ) -> None:
        super().__init__()
        self.probes = nn.ModuleList(FilterProbe(f, head) for f in filters)
        self._frozen, self._blocks, self._head = frozen, blocks, head

    def forward(self, *, batch: Batch, counts: BatchCounts, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One micro-batch's share of the global batch's loss: (loss, terms [1 + K]: loss, each filter's).

        counts: as in Stage II. step: the optimizer step, which picks the positions that are seen.
        """
        losses: dict[int, torch.Tensor] = {}

        def learn(index: int, hidden: torch.Tensor) -> None:
            inputs, targets = self._head.inputs(hidden.detach(), batch, index, step)

            def loss(states: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
                return self._head.loss(states, targets, tensors, batch, counts, training=self.training)

            with torch.enable_grad(), phase("loss"):
                losses[index] = self.probes[index](inputs, loss=loss)

        blocks = self._frozen.module.structure.blocks
        with phase("teacher_forward"):
            stream_states(self._frozen, batch, [blocks[j] for j in self._blocks], learn)
        each = torch.stack([losses[k] for k in range(len(self.probes))])
        loss = each.mean()
        return loss, torch.cat([loss.detach()[None], each.detach()])

    def filters(self) -> nn.ModuleList:
        """The K filters, without their disposable heads."""
        probes: Any = self.probes
        return nn.ModuleList(probe.filter for probe in probes)
