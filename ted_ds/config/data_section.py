"""The section `data` of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, PositiveInt

from ted_ds.config.sections import Section


def _as_sequence(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


def _distinct(labels: tuple[str, ...] | None) -> tuple[str, ...] | None:
    bare = [label.strip() for label in labels or ()]  # as the data's are read
    if twice := next((label for label in bare if bare.count(label) > 1), None):
        raise ValueError(f"data.labels has {twice!r} twice: name each label once")
    return labels


class HubDataset(Section):
    """A data set that `datasets.load_dataset` loads."""

    hub: str = Field(description="ORGANISATION/NAME")
    name: str | None = Field(default=None, description="the data set's configuration")
    split: str = "train"
    streaming: bool = Field(default=False, description="read while downloading, keep nothing on disk")


DataEntries = Annotated[tuple[str | HubDataset, ...], BeforeValidator(_as_sequence)]
"""Paths and globs of text, JSONL, CSV, TSV and Parquet files, and hub data sets; a single one needs no list."""


class DataConfig(Section):
    """Documents or labelled rows, their tokenizer, and the folder of the prepared rows."""

    train: DataEntries = Field(min_length=1)
    validation: DataEntries = Field(default=(), description="held-out data; empty: no evaluation")
    extra_validation: dict[str, DataEntries] = Field(
        default={}, description="name -> more held-out data, scored once, by the best weights (MNLI's mismatched set)"
    )
    text_column: str = Field(default="text", description="of JSONL, CSV, TSV, Parquet and hub data (causal-lm)")
    text_columns: tuple[str, ...] | None = Field(
        default=None, min_length=1, max_length=2, description="one or two; null: the task's own"
    )
    label_column: str | None = Field(default=None, description="null: the task's own")
    labels: Annotated[tuple[str, ...] | None, AfterValidator(_distinct)] = Field(
        default=None, min_length=2, description="their order numbers them; null: the task's own"
    )
    skip_bad_rows: bool = Field(
        default=False, description="rows that cannot be used are left out and counted; false: they end the run"
    )
    tokenizer: str = Field(description="folder or hub id for AutoTokenizer, or a SentencePiece .model file")
    trust_remote_code: bool = Field(
        default=False,
        description="run the tokenizer's own code; true if `tokenizer` is a model whose section says so",
    )
    sequence_length: int = Field(
        default=1024, ge=2, description="tokens a row (S); other tasks than causal-lm: at most, longer texts are cut"
    )
    doc_stride: PositiveInt = Field(
        default=128, description="tokens that neighbouring windows of a long context share (question answering)"
    )
    prepared: Path | None = Field(default=None, description="folder of the tokenized data; null: OUTPUT_DIR/data")
    processes: PositiveInt | None = Field(default=None, description="that tokenize; null: one a core")
    train_tokenizer: PositiveInt | None = Field(
        default=None,
        description="vocabulary size of a tokenizer to train into `tokenizer` if that is not there: SentencePiece, "
        "for other tasks than causal-lm WordPiece",
    )
