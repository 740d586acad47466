"""Stage II: one micro-batch of loss = pred_loss + kl_alpha * kl_loss + mse_alpha * layer_loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ted_ds.batch import Batch, BatchCounts
from ted_ds.errors import ModelError
from ted_ds.models.layer_map import LayerMap
from ted_ds.models.readout import Readout
from ted_ds.models.structure import find_blocks
from ted_ds.ops import Head
from ted_ds.tasks.base import LossWeights, Reading, Task, TaskLosses
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

    def __init__(self, student: PreTrainedModel, filters: nn.ModuleList, weights: LossWeights, *, task: Task) -> None:
        super().__init__()
        self.student: PreTrainedModel = student
        self.filters = filters
        self.weights = weights
        self.task = task
        self.structure = find_blocks(student)
        self.readout: Readout = task.readout(student)
        self._collector = HiddenStateCollector((), (), ())
        self._teacher: Teacher | None = None
        self._layer_scale: torch.Tensor | float = 1.0

    @property
    def teacher(self) -> Teacher | None:
        """What `attach_teacher` was given last."""
        return self._teacher

    def attach_teacher(self, teacher: Teacher, layer_map: LayerMap, mean_squares: torch.Tensor | None = None) -> None:
        """Hooks teacher and student together; call it after both engines are built.

        mean_squares: [K] mean squares of the teacher's filtered states, the divisors of the normalised
        layer loss; None for the raw one. They are constants, because teacher and filters are: a
        micro-batch's own mean square would make the loss depend on how rows are split, and the global
        batch's is known only once the teacher has gone past.

        Raises ModelError where layer map and filters differ in number, or filters and targets in width.
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
        self._teacher = teacher
        self._layer_scale = 1.0 if mean_squares is None else mean_squares.clamp_min(1e-12).reciprocal()
        self._collector = HiddenStateCollector(self.structure.blocks, teacher.sources, layer_map)

    def forward(self, *, batch: Batch, counts: BatchCounts | None = None) -> Any:
        """One micro-batch's share of the global batch's loss: (loss, terms).

        counts: of the *global* batch; every term is a sum over the micro-batch divided by them. terms: [4 + K]
        float32, detached: `TERMS`, then the layer loss of each pair. Without counts: what the task predicts.
        """
        if counts is None:
            output = self.readout.read(batch)
            return self.readout(output, use=lambda o, head: self.task.predict(Reading(o, head), batch))
        with self._collector.student_pass():
            output = self.readout.read(batch)
        mask = batch.attention_mask if self.weights.mask_padding else None

        def squared_error(pair: int, hidden_s: torch.Tensor, hidden_t: torch.Tensor) -> torch.Tensor:
            assert self._teacher is not None
            with phase("loss"):
                target = self._teacher.target(pair, hidden_t)
                return self.filters[pair](hidden_s, target, mask, residual_dtype=self.weights.residual_dtype)

        with self._collector.teacher_pass(squared_error) as sums:
            losses = self._task_losses(batch, output, counts)
        with phase("loss"):
            layer_losses = self._layer_losses(sums, counts)
            layer_loss = layer_losses.mean() if sums else losses.pred_loss.new_zeros(())
            loss = losses.total + self.weights.mse_alpha * layer_loss
            terms = torch.stack([loss, losses.pred_loss, losses.kl_loss, layer_loss])
            return loss, torch.cat([terms, layer_losses.to(terms)]).detach()

    def _task_losses(self, batch: Batch, output: torch.Tensor, counts: BatchCounts) -> TaskLosses:
        """The teacher's forward past the waiting student, then the task's CE and KL."""
        result: list[TaskLosses] = []

        def use(output_t: torch.Tensor | None, head_t: Head | None) -> None:
            teacher = None if output_t is None else Reading(output_t, head_t)

            def losses(output_s: torch.Tensor, head_s: Head | None) -> TaskLosses:
                return self.task.losses(Reading(output_s, head_s), teacher, batch, counts, self.weights)

            # by the list, not returned: ZeRO-3 would tie what the teacher returns to the teacher's backward hooks
            with phase("loss"):
                result.append(self.readout(output, use=losses))

        if self._teacher is not None and self.weights.kl_alpha > 0:
            with phase("teacher_forward"):
                self._teacher.stream(batch, use)
        else:
            if self._teacher is not None:
                with phase("teacher_forward"):
                    self._teacher.stream(batch, until=self._collector.last_teacher_block)
            use(None, None)
        return result[0]

    def _layer_losses(self, sums: dict[int, torch.Tensor], counts: BatchCounts) -> torch.Tensor:
        """[K] mean squared errors over tokens and F, divided by the teacher's mean squares."""
        if not sums:
            return torch.zeros(0, device=counts.values.device)
        stacked = torch.stack([sums[k] for k in range(len(sums))])
        first: Any = self.filters[0]
        tokens = counts.tokens if self.weights.mask_padding else counts.positions
        return stacked / (tokens.clamp_min(1) * first.output_dim) * self._layer_scale
