"""Continual pre-training: next-token CE and KL by the fused loss, Stage I behind the frozen LM head."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from ted_ds.batch import Batch, BatchCounts, on_device
from ted_ds.config.sections import LossConfig
from ted_ds.models.filters import Filter, fresh_linear
from ted_ds.models.readout import LogitHead
from ted_ds.models.structure import find_structure
from ted_ds.ops import Head, TopK, linear_cross_entropy_kl, token_scores
from ted_ds.tasks.base import Reading, TaskLosses


class CausalLM:
    """pred_loss and kl_loss are means over target tokens; [tokens, V] is never whole in memory.

    vocab_size: how many ids the tokenizer has. Rows of either LM head beyond it are padding and take no
        part in CE or KL, so that padding a vocabulary changes nothing.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def readout(self, model: Any) -> LogitHead:
        """Reads last hidden states [B, S, D]."""
        return LogitHead(find_structure(model))

    def losses(
        self, student: Reading, teacher: Reading | None, batch: Batch, counts: BatchCounts, loss: LossConfig
    ) -> TaskLosses:
        """CE and KL from hidden states and LM heads, in chunks of tokens; a recorded teacher may give a `TopK`."""
        assert student.head is not None
        output_t: Any = None if teacher is None else teacher.output
        recorded = isinstance(output_t, TopK)
        hidden_t = None if teacher is None or recorded else output_t.flatten(0, -2)
        targets = counts.targets.clamp_min(1).to(torch.promote_types(student.output.dtype, torch.float32))
        total, pred_sum, kl_sum = linear_cross_entropy_kl(
            student.output.flatten(0, -2),
            student.head,
            batch.targets.flatten(),
            hidden_t,
            None if teacher is None else teacher.head,
            pred_scale=1.0 / targets,
            kl_scale=loss.kl_alpha / targets,
            temperature=loss.temperature,
            divergence=loss.divergence,
            top_k=output_t if recorded else loss.kl_top_k,
            vocab_size=self.vocab_size,
        )
        return TaskLosses(total, pred_sum / targets, kl_sum / targets)

    def predict(self, student: Reading, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(sum of NLL in nats, float64; number of targets; the sum over the documents' own tokens alone)."""
        assert student.head is not None
        nll, _ = token_scores(
            student.output.flatten(0, -2), student.head, batch.targets.flatten(), vocab_size=self.vocab_size
        )
        own = nll if batch.own is None else nll.masked_fill(~batch.own.flatten(), 0.0)
        return nll.sum(dtype=torch.float64), BatchCounts.of(batch).targets, own.sum(dtype=torch.float64)


class LMHead:
    """Stage I's head: the model's own frozen final norm and LM head, behind `Linear(F -> D)` where F is not D.

    final_norm, head: whole on every rank (V * D elements, the same as one gather of the LM head; they never
        change, so they are gathered once instead of K times a step).
    token_fraction: share of the positions that each filter sees of every step; unbiased, and Stage I's
        cost, K passes through the LM head, shrinks with it.
    """

    def __init__(
        self, final_norm: nn.Module, head: Head, *, vocab_size: int, token_fraction: float = 1.0, seed: int = 0
    ) -> None:
        self._final_norm, self._head = final_norm, head
        self._norm_dtype = next(final_norm.parameters()).dtype
        self._vocab_size, self._token_fraction, self._seed = vocab_size, token_fraction, seed

    def tensors(self, filter_: Filter) -> dict[str, nn.Parameter]:
        """`up_weight` [D, F] and `up_bias` [D], where F is not D."""
        if filter_.output_dim == filter_.width:
            return {}
        weight, bias = fresh_linear(filter_.output_dim, filter_.width)
        return {"up_weight": weight, "up_bias": bias}

    def inputs(self, hidden: torch.Tensor, batch: Batch, index: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The states [N, D] and targets [N] of this step's positions."""
        length = batch.input_ids.shape[1]
        positions = on_device(self._positions(length, index, step), batch.targets.device)
        targets = batch.targets.index_select(1, positions).flatten()
        return hidden.index_select(1, positions).flatten(0, 1), targets

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
        """CE, its sum over the positions seen scaled up to all of them."""
        length = batch.input_ids.shape[1]
        scale = length / (self._seen(length) * counts.targets.clamp_min(1).double())
        if tensors:
            states = nn.functional.linear(states, tensors["up_weight"], tensors["up_bias"])
        states = self._final_norm(states.to(self._norm_dtype))
        return linear_cross_entropy_kl(states, self._head, targets, pred_scale=scale, vocab_size=self._vocab_size)[0]

    def _seen(self, length: int) -> int:
        return max(1, round(self._token_fraction * length))

    def _positions(self, length: int, index: int, step: int) -> torch.Tensor:
        """The positions that filter `index` sees at `step`, the same in every row, whatever rank holds it."""
        draw = np.random.default_rng([self._seed, step, index]).permutation(length)
        return torch.from_numpy(np.sort(draw[: self._seen(length)]))
