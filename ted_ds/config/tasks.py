"""The tasks by name: GLUE's, SQuAD's, and those of a user's own data. Tables only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

Kind = Literal["causal-lm", "classification", "regression", "question-answering"]


@dataclass(frozen=True)
class KindTraits:
    """What all tasks of a kind have in common, as far as it is data; the rest is in its class in `ted_ds.tasks`.

    auto_class: of transformers, which puts the head on a model. lm_head: that head is the LM head, whose weight the
    losses read; other kinds have a task head, which a pre-trained model lacks. outputs: of the task head, None for as
    many as there are labels. padded: rows are of different lengths. compares_rows: the KL compares the rows of a step
    with each other, so that they must lie in one micro-batch. kl_over_positions: the KL is over the positions of a
    row, padding among them if the recipe says so. sequence_length: tokens a row in `ted-ds evaluate`.
    numbers: labels are numbers, not names. windows: rows are windows of contexts, which hold the answers of questions.
    unused_keys, needed_keys: of a recipe; needed are what the task itself (`TaskSpec`) does not say.
    """

    auto_class: str
    lm_head: bool = False
    outputs: int | None = None
    padded: bool = True
    compares_rows: bool = False
    kl_over_positions: bool = False
    sequence_length: int = 256
    numbers: bool = False
    windows: bool = False
    unused_keys: tuple[str, ...] = ()
    needed_keys: tuple[str, ...] = ()


_OF_TEXT = (
    *("filters.token_fraction", "data.text_column", "data.processes"),
    *("loss.divergence", "loss.kl_top_k"),
)
"""Keys that causal LMs alone use."""

_OF_COLUMNS = ("data.text_columns", "data.label_column", "data.labels")

_OF_LABELS = (
    *_OF_COLUMNS,
    *("student.pretrained", "student.init_from_pretrained", "student.head_dropout"),
    *("filters.head_dropout", "data.extra_validation", "data.doc_stride", "loss.mask_padding"),
)
"""Keys that kinds with labelled rows alone use."""

KINDS: dict[Kind, KindTraits] = {
    "causal-lm": KindTraits(
        "AutoModelForCausalLM", lm_head=True, padded=False, sequence_length=1024, unused_keys=_OF_LABELS
    ),
    "classification": KindTraits(
        "AutoModelForSequenceClassification",
        unused_keys=_OF_TEXT,
        needed_keys=("data.text_columns", "data.labels"),
    ),
    "regression": KindTraits(
        "AutoModelForSequenceClassification",
        outputs=1,
        compares_rows=True,
        numbers=True,
        unused_keys=_OF_TEXT,
        needed_keys=("data.text_columns",),
    ),
    "question-answering": KindTraits(
        "AutoModelForQuestionAnswering",
        outputs=2,
        kl_over_positions=True,
        sequence_length=384,
        windows=True,
        unused_keys=(*_OF_TEXT, *_OF_COLUMNS),
    ),
}
"""The kinds of tasks; `ted_ds.tasks.registry` has the class of each."""


@dataclass(frozen=True)
class Tsv:
    """GLUE's official TSV files of a task, which are tab-separated without any quoting.

    header: the columns of a file that has no header line (CoLA's train and dev sets; its test set has one).
    names: official name -> the task's, if they differ.
    """

    header: tuple[str, ...] | None = None
    names: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskSpec:
    """What the data of a task looks like, and how it is scored.

    text_columns: one or two. labels: their names, numbered in this order; () for numbers and questions.
    numbered: the labels that 0, 1, ... mean in the task's official files; () if a number has no name.
    metrics: see `ted_ds.evaluation`; questions always get SQuAD's. best: the one by which the best weights are
    chosen; "" for text, whose last weights are the result. tsv: None if there is no official TSV layout.
    unlabelled: the number that stands where a row has none. impossible: whether a question may have no answer.
    """

    name: str
    kind: Kind
    text_columns: tuple[str, ...] = ()
    label_column: str = "label"
    labels: tuple[str, ...] = ()
    numbered: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("accuracy",)
    best: str = "accuracy"
    tsv: Tsv | None = None
    unlabelled: float | None = None
    impossible: bool = True

    @property
    def columns(self) -> tuple[str, ...]:
        """Those of texts, and of labels the last; () for questions, whose columns have names of their own."""
        return (*self.text_columns, self.label_column) if self.text_columns else ()

    @property
    def missing_keys(self) -> tuple[str, ...]:
        """Keys that a recipe has to give, because the task does not."""
        return tuple(key for key in KINDS[self.kind].needed_keys if not getattr(self, key.removeprefix("data.")))

    def with_columns(
        self, text_columns: tuple[str, ...] | None, label_column: str | None, labels: tuple[str, ...] | None
    ) -> TaskSpec:
        """The task with a recipe's own columns and labels; None keeps. With own columns no file has GLUE's layout."""
        columns = (text_columns or self.text_columns, label_column or self.label_column)
        same = columns == (self.text_columns, self.label_column)
        return replace(
            self,
            text_columns=columns[0],
            label_column=columns[1],
            labels=labels or self.labels,
            tsv=self.tsv if same else None,
        )


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")

_SPECS = (
    TaskSpec("causal-lm", "causal-lm", metrics=(), best=""),
    # GLUE: column and label names as on the hub (nyu-mll/glue)
    TaskSpec(
        "cola",
        "classification",
        ("sentence",),
        labels=("unacceptable", "acceptable"),
        metrics=("matthews", "accuracy"),
        best="matthews",
        tsv=Tsv(header=("source", "label", "star", "sentence")),
    ),
    TaskSpec("sst2", "classification", ("sentence",), labels=("negative", "positive"), tsv=Tsv()),
    TaskSpec(
        "mrpc",
        "classification",
        _PAIR,
        labels=("not_equivalent", "equivalent"),
        metrics=("accuracy", "f1"),
        tsv=Tsv(names={"#1 String": "sentence1", "#2 String": "sentence2", "Quality": "label"}),
    ),
    TaskSpec(
        "stsb",
        "regression",
        _PAIR,
        metrics=("pearson", "spearman"),
        best="spearman",
        tsv=Tsv(names={"score": "label"}),
        unlabelled=-1,
    ),
    TaskSpec(
        "qqp",
        "classification",
        ("question1", "question2"),
        labels=("not_duplicate", "duplicate"),
        metrics=("accuracy", "f1"),
        tsv=Tsv(names={"is_duplicate": "label"}),
    ),
    TaskSpec(
        "mnli",
        "classification",
        ("premise", "hypothesis"),
        labels=("entailment", "neutral", "contradiction"),
        tsv=Tsv(names={"sentence1": "premise", "sentence2": "hypothesis", "gold_label": "label"}),
    ),
    TaskSpec("qnli", "classification", ("question", "sentence"), labels=_ENTAILMENT, tsv=Tsv()),
    TaskSpec("rte", "classification", _PAIR, labels=_ENTAILMENT, tsv=Tsv()),
    TaskSpec("wnli", "classification", _PAIR, labels=_ENTAILMENT[::-1], tsv=Tsv()),
    TaskSpec("squad", "question-answering", metrics=("exact", "f1"), best="f1", impossible=False),
    TaskSpec("squad_v2", "question-answering", metrics=("exact", "f1"), best="f1"),
    # a user's own data; columns and labels come from the recipe
    TaskSpec("classification", "classification"),
    TaskSpec("regression", "regression", metrics=("pearson", "spearman"), best="spearman"),
    TaskSpec("question-answering", "question-answering", metrics=("exact", "f1"), best="f1"),
)

TASKS = {spec.name: replace(spec, numbered=spec.labels) for spec in _SPECS}
"""Every task that a recipe may name."""
