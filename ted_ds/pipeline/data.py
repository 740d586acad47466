"""A run's data, whatever the task: prepared by rank 0 where it is not yet, then opened on every rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from ted_ds.config.schema import RunConfig
from ted_ds.data.encoded import EncodedRows
from ted_ds.data.loader import Rows
from ted_ds.data.packed import PackedBlocks
from ted_ds.data.tokenizers import Tokenizer, load_tokenizer
from ted_ds.job.world import World
from ted_ds.pipeline.example_data import ExampleData, ensure_task_tokenizer, prepare_examples
from ted_ds.pipeline.text_data import TextData, ensure_text_tokenizer, prepare_text
from ted_ds.tasks.base import DisposableHead, Task
from ted_ds.teacher.frozen import FrozenModel


class RunData(Protocol):
    """What a task brings to the stages."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The run's."""
        ...

    @property
    def task(self) -> Task:
        """Stage II's side of it."""
        ...

    @property
    def train(self) -> PackedBlocks | EncodedRows:
        """Training rows; `Batch.rows` are their numbers."""
        ...

    @property
    def splits(self) -> Mapping[str, PackedBlocks | EncodedRows]:
        """Training rows and held-out ones, by name."""
        ...

    @property
    def num_rows(self) -> int:
        """Training rows of an epoch."""
        ...

    def training_rows(self, run: RunConfig, world: World, global_batch_size: int | None = None) -> Rows:
        """This rank's rows; global_batch_size: None is the recipe's."""
        ...

    def evaluate(self, engine: Any, run: RunConfig, world: World) -> dict[str, float]:
        """Scores of the held-out data, by names that begin with `validation_`; a collective."""
        ...

    def evaluate_extra(self, engine: Any, run: RunConfig, world: World) -> dict[str, float]:
        """Scores of `data.extra_validation`, by names that begin with the set's; a collective."""
        ...

    def disposable_head(self, frozen: FrozenModel, run: RunConfig, world: World, side: str) -> DisposableHead:
        """What Stage I trains the filters of a side ("teacher", "student") behind; a collective."""
        ...


def ensure_tokenizer(run: RunConfig) -> Tokenizer:
    """The run's tokenizer, trained first where the recipe says so and it is not there; on one rank."""
    return ensure_text_tokenizer(run.data) if run.task == "causal-lm" else ensure_task_tokenizer(run)


def open_tokenizer(run: RunConfig, world: World) -> Tokenizer:
    """The run's tokenizer on every rank, trained by rank 0 where it has to be; a collective."""
    world.on_main(lambda: ensure_tokenizer(run).vocab_size)
    return load_tokenizer(run.data.tokenizer, trust_remote_code=run.data.trust_remote_code)


def open_data(run: RunConfig, world: World, tokenizer: Tokenizer, vocabulary_rows: int | None = None) -> RunData:
    """The run's data on every rank, prepared by rank 0 where it has to be; a collective.

    vocabulary_rows: the fewest that a model of the run has; None: as many as the tokenizer has ids.
    Raises DataError, on every rank, where data are missing, unreadable or do not fit.
    """
    if run.task == "causal-lm":
        world.on_main(lambda: len(prepare_text(run.data, tokenizer, run.prepared_folder)))
        return TextData.open(run, tokenizer, vocabulary_rows)
    world.on_main(lambda: len(prepare_examples(run, tokenizer)))
    return ExampleData.open(run, tokenizer, world)
