"""Extractive question answering: two distributions over the positions of a window, its answer's start and end."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from ted_ds.batch import Batch, BatchCounts
from ted_ds.config.data_section import DataConfig
from ted_ds.config.schema import RunConfig
from ted_ds.config.sections import LossConfig
from ted_ds.config.tasks import TASKS, TaskSpec
from ted_ds.data.bad_rows import BadRows
from ted_ds.data.encoded import EncodedRows
from ted_ds.data.squad import iter_questions
from ted_ds.evaluation.squad_metrics import best_spans, select_answers, squad_scores
from ted_ds.job.world import World
from ted_ds.models.filters import Filter, fresh_linear
from ted_ds.ops import Head
from ted_ds.tasks.base import CachedOutput, DisposableHead, Field, Reading, wide
from ted_ds.tasks.labelled import LabelledTask, kl_sum


class SpanLogits(CachedOutput):
    """A question's logits of starts and ends, [B, 2, S]; 0 at padding, which is given probability 0 later."""

    def __init__(self, dtype: str) -> None:
        super().__init__({"logits": Field(dtype, 2)})

    def record(self, output: torch.Tensor, head: Head | None) -> dict[str, torch.Tensor]:
        """By token."""
        return {"logits": output.transpose(1, 2)}

    def restore(self, values: dict[str, torch.Tensor]) -> torch.Tensor:
        """[B, 2, S]."""
        return values["logits"].transpose(1, 2)


class QuestionAnswering(LabelledTask):
    """pred_loss: mean of the start's and the end's CE. kl_loss: likewise, each the mean over windows.

    Logits are [B, 2, S]; the losses take them over real positions or, without `loss.mask_padding`, all of them.
    """

    num_outputs = 2

    def __init__(self, spec: TaskSpec = TASKS["question-answering"]) -> None:
        super().__init__(spec)

    @classmethod
    def from_spec(cls, spec: TaskSpec, world: World, vocab_size: int) -> QuestionAnswering:
        """Of SQuAD or a user's own questions."""
        return cls(spec)

    @classmethod
    def texts(cls, data: DataConfig, spec: TaskSpec, bad: BadRows) -> Iterable[str]:
        """Questions and contexts."""
        questions = iter_questions(data.train, impossible=spec.impossible, bad=bad)
        return (text for question in questions for text in (question.question, question.context))

    def comparable(self, output: torch.Tensor, batch: Batch, loss: LossConfig) -> torch.Tensor:
        """Masked logits [B, 2, S]."""
        return _masked(wide(output), batch.attention_mask if loss.mask_padding else None)

    def pred_loss(self, z_s: torch.Tensor, batch: Batch, counts: BatchCounts) -> torch.Tensor:
        """CE of logits [B, 2, S]."""
        return _span_cross_entropy(z_s, batch, counts)

    def kl_loss(self, z_s: torch.Tensor, z_t: torch.Tensor, counts: BatchCounts, temperature: float) -> torch.Tensor:
        """KL of logits [B, 2, S]."""
        return kl_sum(z_s, z_t, temperature) / (2 * counts.rows)

    def predict(self, student: Reading, batch: Batch) -> torch.Tensor:
        """[B, 4 * 20 + 1], the best candidates of each window; see `best_spans`."""
        starts, ends = _masked(wide(student.output), batch.attention_mask).unbind(1)
        return best_spans(starts, ends)

    def disposable_head(self, model: PreTrainedModel, run: RunConfig, world: World, side: str) -> SpanHead:
        """A linear layer on every token."""
        return SpanHead(mask_padding=run.loss.mask_padding)

    def cached_outputs(self, run: RunConfig, teacher: str) -> list[CachedOutput]:
        """Logits by token."""
        assert run.teacher is not None
        return [SpanLogits(run.teacher.dtype)]

    def scores(self, rows: EncodedRows, outputs: np.ndarray) -> dict[str, float]:
        """SQuAD's of the candidates of all windows."""
        answers, no_answer = select_answers(outputs, rows.window, rows.questions)
        impossible = self.spec.name == "squad_v2" or any(question.impossible for question in rows.questions)
        scores = squad_scores(answers, rows.questions, no_answer=no_answer if impossible else None)
        return {name: float(value) for name, value in scores.items() if not name.endswith("total")}


class SpanHead(DisposableHead):
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
