"""Stage II: one micro-batch of loss = pred_loss + kl_alpha * kl_loss + mse_alpha * layer_loss."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ted_ds.batch import Batch, BatchCounts
from ted_ds.config.sections import LossConfig
from ted_ds.distill.balance import Balance
from ted_ds.errors import ModelError
from ted_ds.models.filters import Filter
from ted_ds.models.layer_map import LayerMap
from ted_ds.models.readout import Readout
from ted_ds.models.structure import find_blocks
from ted_ds.ops import Head, LayerLoss
from ted_ds.tasks.base import Reading, Task, TaskLosses
from ted_ds.teacher.collector import HiddenStateCollector
from ted_ds.teacher.contract import Teacher
from ted_ds.telemetry.timeline import phase

TERMS = ("loss", "pred_loss", "kl_loss", "layer_loss")
"""The first entries of the terms that a micro-batch reports; the K pairs' layer losses follow."""


class DistillationModel(nn.Module):
    """The module in the student's engine: the student and its filters; its forward is one micro-batch.

    student: a Hugging Face model of `task`.
    filters: K student filters, in the order of the layer map; empty without a layer loss.
    """

    def __init__(self, student: PreTrainedModel, filters: nn.ModuleList, loss: LossConfig, *, task: Task) -> None:
        super().__init__()
        self.student: PreTrainedModel = student
        self.filters = filters
        self.loss = loss
        self.layer_loss = LayerLoss(loss.layer_loss, mask_padding=loss.mask_padding)
        self.task = task
        self.structure = find_blocks(student)
        self.readout: Readout = task.readout(student)
        self._collector = self._no_pairs = HiddenStateCollector((), (), ())
        self._teacher: Teacher | None = None
        self.balance: Balance | None = None

    @property
    def teacher(self) -> Teacher | None:
        """What `attach_teacher` was given last."""
        return self._teacher

    def attach_teacher(
        self,
        teacher: Teacher,
        layer_map: LayerMap,
        mean_squares: torch.Tensor | None = None,
        balance: Balance | None = None,
    ) -> None:
        """Hooks teacher and student together; call it after both engines are built.

        mean_squares: [K] of the teacher's filtered states, see `LayerLoss.normalise`; None for a kind without them.
        balance: `Balance.of` this loss; None: mse_alpha is a constant weight.

        Raises ModelError if layer map and filters differ in number, or filters and targets in width.
        """
        if len(layer_map) != len(self.filters):
            raise ModelError(f"{len(self.filters)} student filters do not fit a layer map of {len(layer_map)} pairs")
        bank: Any = self.filters
        widths = {filter_.output_dim for filter_ in bank}
        if widths - {teacher.target_width}:
            raise ModelError(
                f"the student's filters have width {max(widths)}, the teacher's side {teacher.target_width}: "
                "both must be one F"
            )
        if any(filter_.normalized != self.layer_loss.kind.by_token for filter_ in bank):
            raise ModelError(
                f"loss.layer_loss {self.loss.layer_loss} wants filters that read hidden states "
                f"{'normalised token by token' if self.layer_loss.kind.by_token else 'as they are'}: build them so "
                "(FilterPlan.normalized)"
            )
        self._teacher = teacher
        if mean_squares is not None:
            self.layer_loss.normalise(mean_squares)
        self._collector = HiddenStateCollector(self.structure.blocks, teacher.sources, layer_map)
        self.balance = balance

    def forward(self, *, batch: Batch, counts: BatchCounts | None = None, fade: float = 1.0) -> Any:
        """One micro-batch's share of the global batch's loss: (loss, terms).

        counts: of the *global* batch; every term is a sum over the micro-batch divided by them. terms: [4 + K]
        float32, detached: `TERMS`, then the layer loss of each pair. Without counts: what the task predicts.
        fade: what is left of the layer loss's weight, 1 to 0; at 0 no pair is looked at, and terms has no K.
        """
        if counts is None:
            output = self.readout.read(batch)
            return self.readout(output, use=lambda o, head: self.task.predict(Reading(o, head), batch))

        # 1. the student; hooks keep H_s[k]
        collector = self._collector if fade else self._no_pairs
        with collector.student_pass():
            output = self.readout.read(batch)

        # 2. the teacher streams past: as block j_k ends, `_pair_error` reduces pair k, and H_t[j_k] is dropped
        # 3. at its end the task's CE and KL, from both sides' outputs
        with collector.teacher_pass(partial(self._pair_error, batch)) as sums:
            losses = self._task_losses(batch, output, counts, until=collector.last_teacher_block)

        # 4. the one sum
        with phase("loss"):
            width = self._teacher.target_width if self._teacher is not None else 0
            layer_losses = self.layer_loss.of_pairs(sums, counts, width)
            layer_loss = layer_losses.mean() if sums else losses.pred_loss.new_zeros(())
            if not fade:
                loss = said = losses.total + self._blank_gradients(output)
            elif self.balance is None:
                loss = said = losses.total + self.loss.mse_alpha * fade * layer_loss
            else:  # the balance weighs what flows to hidden states; filters alone get all of it
                loss = losses.total + layer_loss
                said = losses.total + (self.balance.weights * layer_losses).mean()
            terms = torch.stack([said, losses.pred_loss, losses.kl_loss, layer_loss])
            return loss, torch.cat([terms, layer_losses.to(terms)]).detach()

    def _blank_gradients(self, output: torch.Tensor) -> torch.Tensor:
        """0, of which the filters' gradients are zeros: under ZeRO-3 those of weights that take no part stay as they
        were, and count in the norm by which gradients are clipped.
        """
        blank, bank = output.new_zeros(()), cast(Iterable[Filter], self.filters)
        for filter_ in bank:
            blank = blank + 0.0 * filter_(output.new_zeros(1, filter_.width)).sum()
        return blank

    def _pair_error(self, batch: Batch, pair: int, hidden_s: torch.Tensor, hidden_t: torch.Tensor) -> torch.Tensor:
        """Pair k's sum over the micro-batch; runs in a hook of the teacher's block.

        The filter calls `use` while its weights are whole, see `_task_losses`.
        """
        assert self._teacher is not None
        with phase("loss"):
            if self.balance is not None and hidden_s.requires_grad:
                hidden_s = self.balance.tie(pair, hidden_s)
            target = self._teacher.target(pair, hidden_t)
            use = self.layer_loss.against(target, batch.attention_mask)
            error: torch.Tensor = self.filters[pair](hidden_s, use=use)
        return error

    def _task_losses(
        self, batch: Batch, output: torch.Tensor, counts: BatchCounts, *, until: nn.Module | None
    ) -> TaskLosses:
        """The teacher's forward past the waiting student, then CE and KL.

        until: the last block that a pair needs; None if there is none.

        Under ZeRO-3 a weight is whole only inside the forward of the module that owns it. The losses need the weights
        of both LM heads. So the teacher calls `use` while its head is whole, and `use` calls the student's readout,
        which calls the task's losses while the student's is.
        """
        found: list[TaskLosses] = []

        def use(output_t: torch.Tensor | None, head_t: Head | None) -> None:
            teacher = None if output_t is None else Reading(output_t, head_t)
            # into a list, not returned: ZeRO-3 would tie what the teacher returns to the teacher's backward hooks
            with phase("loss"):
                found.append(
                    self.readout(
                        output,
                        use=lambda o, head: self.task.losses(Reading(o, head), teacher, batch, counts, self.loss),
                    )
                )

        if self._teacher is not None:
            with phase("teacher_forward"):
                if self.loss.kl_alpha > 0:
                    self._teacher.stream(batch, use)
                elif until is not None:
                    self._teacher.stream(batch, until=until)
        if not found:
            use(None, None)
        return found[0]
