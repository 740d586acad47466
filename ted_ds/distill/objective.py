"""Stage II: one micro-batch of loss = pred_loss + kl_alpha * kl_loss + mse_alpha * layer_loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ted_ds.batch import Batch
from ted_ds.distill.collector import HiddenStateCollector
from ted_ds.distill.frozen import FrozenModel, last_hidden_state
from ted_ds.errors import ModelError
from ted_ds.models.layer_map import LayerMap
from ted_ds.models.logit_head import LogitHead
from ted_ds.models.structure import find_structure
from ted_ds.ops import Head, linear_cross_entropy_kl, token_scores

TERMS = ("loss", "pred_loss", "kl_loss", "layer_loss")
"""The first entries of the terms that a micro-batch reports; the K pairs' layer losses follow."""


@dataclass(frozen=True)
class LossWeights:
    """The weights of the one sum that ce, kd, lwd and ted are (arXiv 2210.01351, eq. 4).

    kl_alpha, mse_alpha: 0 leaves the term, and whatever serves it alone, out.
    temperature: T of the KL term, which carries the factor T^2.
    """

    kl_alpha: float
    mse_alpha: float
    temperature: float = 2.0


class DistillationModel(nn.Module):
    """The module in the student's engine: the student and its filters; its forward is one micro-batch.

    student: a Hugging Face causal LM.
    filters: K student filters, in the order of the layer map; empty without a layer loss.
    vocab_size: how many ids the tokenizer has. Rows of either LM head beyond it are padding and take no
        part in CE or KL, so that padding a vocabulary changes nothing.
    """

    def __init__(
        self, student: PreTrainedModel, filters: nn.ModuleList, weights: LossWeights, *, vocab_size: int
    ) -> None:
        super().__init__()
        self.student: PreTrainedModel = student
        self.filters = filters
        self.weights = weights
        self.vocab_size = vocab_size
        self.structure = find_structure(student)
        self.logit_head = LogitHead(self.structure)
        self._collector = HiddenStateCollector((), (), ())
        self._teacher: FrozenModel | None = None
        self._layer_scale: torch.Tensor | float = 1.0

    def attach_teacher(
        self, teacher: FrozenModel, layer_map: LayerMap, mean_squares: torch.Tensor | None = None
    ) -> None:
        """Hooks teacher and student together; call it after both engines are built.

        mean_squares: [K] mean squares of the teacher's filtered states, the divisors of the normalised
        layer loss; None for the raw one. They are constants, because teacher and filters are: a
        micro-batch's own mean square would make the loss depend on how rows are split, and the global
        batch's is known only once the teacher has gone past.

        Raises ModelError where layer map and filters differ in number.
        """
        if len(layer_map) != len(self.filters):
            raise ModelError(f"{len(self.filters)} student filters do not fit a layer map of {len(layer_map)} pairs")
        self._teacher = teacher
        self._layer_scale = 1.0 if mean_squares is None else mean_squares.clamp_min(1e-12).reciprocal()
        self._collector.remove()
        self._collector = HiddenStateCollector(self.structure.blocks, teacher.module.structure.blocks, layer_map)

    def forward(self, *, batch: Batch, counts: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """One micro-batch's share of the global batch's loss: (loss, terms).

        counts: [2] predicted targets and real tokens of the *global* batch (`Batch.counts`, summed); every
        term is a sum over the micro-batch divided by them. terms: [4 + K] float32, detached: `TERMS`, then
        the layer loss of each pair. Without counts: (sum of NLL in nats, float64; number of targets).
        """
        if counts is None:
            return self._score(batch)
        with self._collector.student_pass():
            hidden = last_hidden_state(self.structure, batch)
        targets, tokens = counts.clamp_min(1).to(torch.promote_types(hidden.dtype, torch.float32)).unbind()

        def squared_error(pair: int, hidden_s: torch.Tensor, hidden_t: torch.Tensor) -> torch.Tensor:
            assert self._teacher is not None
            return self.filters[pair](hidden_s, self._teacher.module.target(pair, hidden_t), batch.attention_mask)

        with self._collector.teacher_pass(squared_error) as sums:
            logit_loss, pred_sum, kl_sum = self._logit_losses(batch, hidden, targets)
        layer_losses = self._layer_losses(sums, tokens)
        layer_loss = layer_losses.mean() if sums else pred_sum.new_zeros(())
        loss = logit_loss + self.weights.mse_alpha * layer_loss
        terms = torch.stack([loss, pred_sum / targets, kl_sum / targets, layer_loss])
        return loss, torch.cat([terms, layer_losses.to(terms)]).detach()

    def _logit_losses(self, batch: Batch, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The teacher's forward past the waiting student, then CE and KL: (weighted loss, CE sum, KL sum)."""
        result: list[tuple[torch.Tensor, ...]] = []

        def use(hidden_t: torch.Tensor | None, head_t: Head | None) -> None:
            def losses(hidden_s: torch.Tensor, head_s: Head) -> tuple[torch.Tensor, ...]:
                return linear_cross_entropy_kl(
                    hidden_s.flatten(0, -2),
                    head_s,
                    batch.targets.flatten(),
                    None if hidden_t is None else hidden_t.flatten(0, -2),
                    head_t,
                    pred_scale=1.0 / targets,
                    kl_scale=self.weights.kl_alpha / targets,
                    temperature=self.weights.temperature,
                    vocab_size=self.vocab_size,
                )

            # by the list, not returned: ZeRO-3 would tie what the teacher returns to the teacher's backward hooks
            result.append(self.logit_head(hidden, use=losses))

        if self._teacher is not None and self.weights.kl_alpha > 0:
            self._teacher.stream(batch, use)
        else:
            if self._teacher is not None:
                self._teacher.stream(batch)
            use(None, None)
        return result[0]

    def _layer_losses(self, sums: dict[int, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
        """[K] mean squared errors over tokens and F, divided by the teacher's mean squares."""
        if not sums:
            return torch.zeros(0, device=tokens.device)
        stacked = torch.stack([sums[k] for k in range(len(sums))])
        first: Any = self.filters[0]
        return stacked / (tokens * first.output_dim) * self._layer_scale

    def _score(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        def nll_sum(hidden: torch.Tensor, head: Head) -> torch.Tensor:
            nll, _ = token_scores(hidden, head, batch.targets.flatten(), vocab_size=self.vocab_size)
            return nll.sum(dtype=torch.float64)

        hidden = last_hidden_state(self.structure, batch)
        return self.logit_head(hidden.flatten(0, -2), use=nll_sum), batch.counts()[0]
