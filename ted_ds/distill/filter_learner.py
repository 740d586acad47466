"""Stage I: every filter learns, behind a disposable head, to solve the task from one hidden state.

The model is frozen and runs once, without gradients. As block j_k ends, filter k's loss *and its gradients*
are computed at once and nothing of the block is kept, so the memory is that of one block's filter however
many there are; a single backward then hands the K sets of gradients to the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ted_ds.batch import Batch, on_device
from ted_ds.distill.frozen import FrozenModel
from ted_ds.models.filters import Filter, fresh_linear
from ted_ds.ops import Head, eager_gradients, linear_cross_entropy_kl

Readout = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class FilterProbe(nn.Module):
    """A filter and, where F is not the model's width, the disposable `Linear(F -> D)` before the LM head.

    Like `Filter` it owns all its tensors (shared ones for the filter's), so that ZeRO-3 gathers them together.
    """

    def __init__(self, filter_: Filter) -> None:
        super().__init__()
        self.filter = filter_
        for name, parameter in filter_.named_parameters():
            self.register_parameter(f"filter_{name}", parameter)
        self._num_filter = len(list(filter_.parameters()))
        if filter_.output_dim != filter_.width:
            up = fresh_linear(filter_.output_dim, filter_.width)
            # ZeRO-3 wants one dtype for all that it shards
            self.up_weight, self.up_bias = (nn.Parameter(p.detach().to(filter_.weight.dtype)) for p in up)

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor, *, readout: Readout) -> torch.Tensor:
        """The task loss of this filter's head, its gradients already computed.

        hidden: [N, D], constant; targets: [N]; readout(states [N, D], targets [N]) -> scalar loss.
        """

        def compute(*tensors: torch.Tensor) -> torch.Tensor:
            own, up = tensors[: self._num_filter], tensors[self._num_filter :]
            states = self.filter.states(hidden.to(own[0].dtype), *own)
            return readout(functional.linear(states, *up) if up else states, targets)

        return eager_gradients(compute, *self.parameters(recurse=False))


class FilterLearner(nn.Module):
    """The module in Stage I's engine; its forward is one micro-batch of every filter's task loss.

    filters: K filters for the blocks `blocks` of the frozen model.
    final_norm, head: the frozen model's own, whole on every rank (V * D elements, the same as one gather
        of the LM head; they never change, so they are gathered once instead of K times a step).
    token_fraction: share of the positions that each filter sees of every step; unbiased, and Stage I's
        cost, K passes through the LM head, shrinks with it.
    """

    def __init__(
        self,
        filters: Iterable[Any],
        frozen: FrozenModel,
        blocks: tuple[int, ...],
        final_norm: nn.Module,
        head: Head,
        *,
        vocab_size: int,
        token_fraction: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.probes = nn.ModuleList(FilterProbe(f) for f in filters)
        self._frozen, self._blocks, self._head = frozen, blocks, head
        self._final_norm = (final_norm,)  # a tuple: the engine must not adopt a module that is not its own
        self._norm_dtype = next(final_norm.parameters()).dtype
        self._vocab_size, self._token_fraction, self._seed = vocab_size, token_fraction, seed

    def forward(self, *, batch: Batch, counts: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One micro-batch's share of the global batch's loss: (loss, terms [1 + K]: loss, each filter's).

        counts: as in Stage II. step: the optimizer step, which picks the positions that are seen.
        """
        length = batch.input_ids.shape[1]
        seen = max(1, round(self._token_fraction * length))
        scale = length / (seen * counts[0].clamp_min(1).double())
        losses: dict[int, torch.Tensor] = {}

        def readout(states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            states = self._final_norm[0](states.to(self._norm_dtype))
            return linear_cross_entropy_kl(states, self._head, targets, pred_scale=scale, vocab_size=self._vocab_size)[
                0
            ]

        positions = on_device(self._positions(length, seen, step), batch.targets.device)

        def learn(index: int, hidden: torch.Tensor) -> None:
            hidden = hidden.detach().index_select(1, positions[index]).flatten(0, 1)
            targets = batch.targets.index_select(1, positions[index]).flatten()
            with torch.enable_grad():
                losses[index] = self.probes[index](hidden, targets, readout=readout)

        self._frozen.stream_blocks(batch, self._blocks, learn)
        each = torch.stack([losses[k] for k in range(len(self.probes))])
        loss = each.mean()
        return loss, torch.cat([loss.detach()[None], each.detach()])

    def filters(self) -> nn.ModuleList:
        """The K filters, without their disposable heads."""
        probes: Any = self.probes
        return nn.ModuleList(probe.filter for probe in probes)

    def _positions(self, length: int, seen: int, step: int) -> torch.Tensor:
        """[K, seen]: the positions that each filter sees at `step`, the same in every row, whatever rank holds it."""
        draws = [np.random.default_rng([self._seed, step, k]).permutation(length) for k in range(len(self.probes))]
        return torch.from_numpy(np.sort(np.stack(draws)[:, :seen]))
