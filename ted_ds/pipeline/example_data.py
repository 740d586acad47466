"""GLUE's, SQuAD's and users' own labelled data: rows in buckets of length, metrics, Stage I behind task heads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig

from ted_ds.config.schema import RunConfig
from ted_ds.config.tasks import TaskSpec
from ted_ds.data.bad_rows import BadRows
from ted_ds.data.buckets import BucketedRows, ScoringRows
from ted_ds.data.encoded import EncodedRows
from ted_ds.data.encoding import ensure_encoded
from ted_ds.data.squad import iter_questions
from ted_ds.data.tables import iter_examples
from ted_ds.data.tokenizer_training import train_wordpiece
from ted_ds.data.tokenizers import Tokenizer, load_tokenizer
from ted_ds.errors import NotFiniteError
from ted_ds.evaluation.glue import glue_scores
from ted_ds.evaluation.outputs import collect_outputs
from ted_ds.evaluation.squad_scores import select_answers, squad_scores
from ted_ds.job.world import World
from ted_ds.models.pooler import find_pooler
from ted_ds.tasks.base import DisposableHead, Task
from ted_ds.tasks.classification import Classification, PoolerHead, Regression
from ted_ds.tasks.question_answering import QuestionAnswering, SpanHead
from ted_ds.teacher.frozen import FrozenModel


def make_task(spec: TaskSpec, world: World) -> Task:
    """Stage II's side of a task."""
    if spec.kind == "classification":
        return Classification(spec.labels)
    return Regression(world.gather) if spec.kind == "regression" else QuestionAnswering()


@dataclass(frozen=True)
class ExampleData:
    """A run's tokenizer, its training rows, and its held-out sets by name, `validation` first."""

    tokenizer: Tokenizer
    task: Task
    spec: TaskSpec
    train: EncodedRows
    held_out: dict[str, EncodedRows]

    @staticmethod
    def open(run: RunConfig, tokenizer: Tokenizer, world: World) -> ExampleData:
        """The rows that `prepare_examples` encoded."""
        splits = {name: EncodedRows(run.prepared_folder / name) for name in _splits(run)}
        return ExampleData(tokenizer, make_task(run.spec, world), run.spec, splits.pop("train"), splits)

    @property
    def splits(self) -> dict[str, EncodedRows]:
        """All rows by name."""
        return {"train": self.train, **self.held_out}

    @property
    def num_rows(self) -> int:
        """Training rows: examples, or windows of contexts."""
        return len(self.train)

    def training_rows(self, run: RunConfig, world: World, global_batch_size: int | None = None) -> BucketedRows:
        """This rank's rows of every step."""
        return BucketedRows(
            self.train,
            seed=run.seed,
            global_batch_size=global_batch_size or run.train.global_batch_size,
            micro_batch_size=run.train.micro_batch_size,
            rank=world.rank,
            world_size=world.size,
        )

    def evaluate(self, engine: Any, run: RunConfig, world: World) -> dict[str, float]:
        """validation_METRIC for every metric of the task; nothing without held-out data."""
        return self._scores(engine, run, world, [name for name in self.held_out if name == "validation"])

    def evaluate_extra(self, engine: Any, run: RunConfig, world: World) -> dict[str, float]:
        """SET_METRIC for every further set."""
        return self._scores(engine, run, world, [name for name in self.held_out if name != "validation"])

    def disposable_head(self, frozen: FrozenModel, run: RunConfig, world: World, side: str) -> DisposableHead:
        """The model family's pooler and a classifier, or for questions a linear layer on every token."""
        if self.spec.kind == "question-answering":
            return SpanHead(mask_padding=run.loss.mask_padding)
        # the frozen model's own config has its dropout taken out
        path = str(frozen.module.model.name_or_path)
        dropout = run.filters.head_dropout
        pooler = find_pooler(
            AutoConfig.from_pretrained(path, trust_remote_code=_trusted(run, side)),
            None if dropout is None else getattr(dropout, side),
        )
        regression = self.spec.kind == "regression"
        return PoolerHead(pooler, 1 if regression else len(self.spec.labels), regression=regression)

    def _scores(self, engine: Any, run: RunConfig, world: World, names: list[str]) -> dict[str, float]:
        scores: dict[str, float] = {}
        for name in names:
            rows = self.held_out[name]
            size = run.train.micro_batch_size
            batches = ScoringRows(rows, batch_size=size, rank=world.rank, world_size=world.size)
            outputs = collect_outputs(engine, batches, len(rows), world)
            try:
                found = world.on_main(partial(score_outputs, self.spec, rows, outputs))
            except NotFiniteError as error:
                raise NotFiniteError(f"in {name}, {error}") from error
            scores |= {f"{name}_{metric}": value for metric, value in found.items()}
        return scores


def score_outputs(spec: TaskSpec, rows: EncodedRows, outputs: np.ndarray) -> dict[str, float]:
    """The task's metrics of a model's outputs [rows, C] for all rows of a split."""
    if spec.kind == "question-answering":
        answers, no_answer = select_answers(outputs, rows.window, rows.questions())
        impossible = spec.name == "squad_v2" or any(question.impossible for question in rows.questions())
        scores = squad_scores(answers, rows.questions(), no_answer=no_answer if impossible else None)
        return {name: float(value) for name, value in scores.items() if not name.endswith("total")}
    return glue_scores(spec.metrics, outputs[:, 0] if spec.kind == "regression" else outputs, rows.targets)


def ensure_task_tokenizer(run: RunConfig) -> Tokenizer:
    """The tokenizer, a WordPiece one trained on the task's texts first where the recipe says so."""
    data = run.data
    if data.train_tokenizer is not None and not Path(data.tokenizer).exists():
        with BadRows(skip=data.skip_bad_rows) as bad:
            texts = list(_all_texts(run, bad))  # all of them before a tokenizer is written that would be taken again
        train_wordpiece(texts, data.train_tokenizer, Path(data.tokenizer))
    return load_tokenizer(data.tokenizer, trust_remote_code=data.trust_remote_code)


def _all_texts(run: RunConfig, bad: BadRows) -> Iterator[str]:
    if run.spec.kind == "question-answering":
        questions = iter_questions(run.data.train, impossible=run.task != "squad", bad=bad)
        return (text for question in questions for text in (question.question, question.context))
    return (text for example in iter_examples(run.data.train, run.spec, bad) for text in example.texts)


def prepare_examples(run: RunConfig, tokenizer: Tokenizer) -> dict[str, EncodedRows]:
    """Encodes the splits into the run's data folder, as far as that is not done; on one rank."""
    return {
        name: ensure_encoded(
            entries,
            run.spec,
            tokenizer,
            run.prepared_folder / name,
            max_length=run.data.sequence_length,
            stride=run.data.doc_stride,
            training=name == "train",
            skip_bad_rows=run.data.skip_bad_rows,
        )
        for name, entries in _splits(run).items()
    }


def _splits(run: RunConfig) -> dict[str, Any]:
    data = run.data
    held_out = {"validation": data.validation} if data.validation else {}
    return {"train": data.train, **held_out, **data.extra_validation}


def _trusted(run: RunConfig, side: str) -> bool:
    section = run.teacher if side == "teacher" else run.student
    assert section is not None
    return section.trust_remote_code
