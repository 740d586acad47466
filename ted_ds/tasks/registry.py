"""The kinds of tasks, and a run's task, tokenizer and data on every rank."""

from __future__ import annotations

from pathlib import Path

from ted_ds.config.data_section import DataConfig
from ted_ds.config.schema import RunConfig
from ted_ds.config.tasks import Kind, TaskSpec
from ted_ds.data.tokenizers import Tokenizer, load_tokenizer
from ted_ds.job.files import missing
from ted_ds.job.world import World
from ted_ds.tasks.base import RunData, Task
from ted_ds.tasks.causal_lm import CausalLM
from ted_ds.tasks.classification import Classification, Regression
from ted_ds.tasks.question_answering import QuestionAnswering

TASK_CLASSES: dict[Kind, type[Task]] = {
    "causal-lm": CausalLM,
    "classification": Classification,
    "regression": Regression,
    "question-answering": QuestionAnswering,
}
"""Kind -> its class; what of a kind is plain data is in `ted_ds.config.tasks.KINDS`."""


def ensure_tokenizer(data: DataConfig, spec: TaskSpec) -> Tokenizer:
    """The tokenizer, trained first if the recipe says so and it is not there; on one rank."""
    if data.train_tokenizer is not None:
        with missing(Path(data.tokenizer)) as absent:
            if absent:
                TASK_CLASSES[spec.kind].train_tokenizer(data, spec)
    return load_tokenizer(data.tokenizer, trust_remote_code=data.trust_remote_code)


def open_tokenizer(run: RunConfig, world: World) -> Tokenizer:
    """The run's tokenizer on every rank, trained by rank 0 if it has to be; a collective."""
    world.on_main(lambda: ensure_tokenizer(run.data, run.spec).vocab_size)
    return load_tokenizer(run.data.tokenizer, trust_remote_code=run.data.trust_remote_code)


def make_task(spec: TaskSpec, world: World, tokenizer: Tokenizer, vocabulary_rows: int | None = None) -> Task:
    """The task of a run; vocabulary_rows: see `open_data`."""
    ids = tokenizer.vocab_size
    return TASK_CLASSES[spec.kind].from_spec(spec, world, ids if vocabulary_rows is None else min(ids, vocabulary_rows))


def open_data(run: RunConfig, world: World, tokenizer: Tokenizer, vocabulary_rows: int | None = None) -> RunData:
    """The run's data on every rank, prepared by rank 0 if it has to be; a collective.

    vocabulary_rows: the fewest that a model of the run has; None: as many as the tokenizer has ids.
    Raises DataError, on every rank, if data are missing, unreadable or do not fit.
    """
    prepare = TASK_CLASSES[run.spec.kind].prepare
    world.on_main(lambda: len(prepare(run.data, run.spec, tokenizer, run.prepared_folder)))
    return make_task(run.spec, world, tokenizer, vocabulary_rows).open_data(run, tokenizer)
