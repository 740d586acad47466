"""Labelled rows of one or two texts: GLUE's TSV files, CSV, JSON lines, Parquet, hub data sets."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

from ted_ds.config.schema import HubDataset
from ted_ds.config.tasks import TaskSpec, Tsv
from ted_ds.data.files import TSV_SUFFIXES, file_kind, matching_files, no_format, readable, text_file
from ted_ds.data.hub import hub_rows
from ted_ds.data.records import (
    PARQUET,
    RECORD_SUFFIXES,
    check_columns,
    class_names,
    hub_records,
    iter_records,
    tsv_rows,
)
from ted_ds.errors import DataError

logger = logging.getLogger("ted_ds")

Row = Mapping[str, Any]

SETTINGS = "data.text_columns and data.label_column"


@dataclass(frozen=True)
class Example:
    """One row. label: a label's number, a regression's value, or None where the row is not labelled."""

    texts: tuple[str, ...]
    label: int | float | None
    where: str


def iter_examples(entries: Sequence[str | HubDataset], spec: TaskSpec) -> Iterator[Example]:
    """The rows of all entries in order.

    Labels are names or numbers of `spec.labels`, or of the names that a Parquet file or hub data set gives them; an
    empty one is none, and so is GLUE's -1. In a `.tsv`, cells are never quoted. One of a GLUE task has the official
    layout: rows of it that lack cells are passed over with one warning a file (QQP has some), and it may be without
    labels. Compressed files are read as such.
    Raises DataError naming the file and line of what is missing, unreadable or not a label.
    """
    for entry in entries:
        if isinstance(entry, HubDataset):
            where, rows = hub_rows(entry)
            yield from _examples(where, _hub_table(where, rows, spec), spec)
            continue
        for path in matching_files(entry):
            yield from _examples(str(path), _file_table(path, spec), spec)


def _examples(source: str, rows: Iterator[tuple[str, Row]], spec: TaskSpec) -> Iterator[Example]:
    found = False
    with readable(source):
        for where, row in rows:
            found = True
            texts = tuple(_text(row[name], name, where) for name in spec.text_columns)
            yield Example(texts, _label(row.get(spec.label_column), spec, where), where)
    if not found:
        raise DataError(f"{source} has no rows: remove it from the recipe's data, or fill it")


def _hub_table(where: str, rows: Any, spec: TaskSpec) -> Iterator[tuple[str, Row]]:
    names = getattr((rows.features or {}).get(spec.label_column), "names", None)
    yield from _named(hub_records(where, rows, _columns(spec), SETTINGS), where, names, spec)


def _file_table(path: Path, spec: TaskSpec) -> Iterator[tuple[str, Row]]:
    kind = file_kind(path)
    if kind not in RECORD_SUFFIXES:
        no_format(path, ".tsv, .csv, .jsonl or .parquet")
    if kind in TSV_SUFFIXES and spec.tsv is not None:
        yield from _official_table(path, spec, spec.tsv)
        return
    records = ((record.where, record.values) for record in iter_records(path, _columns(spec), SETTINGS))
    names = class_names(path, spec.label_column) if kind == PARQUET else None
    yield from _named(records, str(path), names, spec)


def _named(
    rows: Iterator[tuple[str, Row]], source: str, names: Sequence[str] | None, spec: TaskSpec
) -> Iterator[tuple[str, Row]]:
    """Rows whose labels are numbers of the data's own `names`, with these names in their place."""
    if names is None:
        yield from rows
        return
    if sorted(names) != sorted(spec.labels):
        raise DataError(
            f"{source} has the labels {', '.join(names)}, the task {', '.join(spec.labels) or 'none'}: set data.labels"
        )
    for where, row in rows:
        label = row[spec.label_column]
        if isinstance(label, int) and label >= len(names):
            raise DataError(f"{where}: the label is {label}, and the data names {len(names)}: fix or drop the row")
        # -1 is no label
        yield where, row if not isinstance(label, int) or label < 0 else {**row, spec.label_column: names[label]}


def _official_table(path: Path, spec: TaskSpec, layout: Tsv) -> Iterator[tuple[str, Row]]:
    """GLUE's own files, whose cells are never quoted."""
    short: list[int] = []
    with text_file(path) as file:
        table = tsv_rows(file)
        first = next(table, None)
        if first is None:
            return
        official = first[1]
        if layout.header and not set(spec.text_columns) <= set(official):
            official = list(layout.header)
            table = chain([first], table)
        header = [layout.names.get(name, name) for name in official]
        # GLUE's test sets have no labels
        needed = _columns(spec) if spec.label_column in header else spec.text_columns
        check_columns(str(path), header, needed, SETTINGS, official)
        for number, cells in table:
            if len(cells) < len(header):
                short.append(number)
            else:
                yield f"{path}, line {number}", dict(zip(header, cells, strict=False))
    if short:
        logger.warning("%s: %d rows lack cells and are passed over, the first in line %d", path, len(short), short[0])


def _columns(spec: TaskSpec) -> tuple[str, ...]:
    return (*spec.text_columns, spec.label_column)


def _text(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {column!r} is {value!r:.40}, not a string: fix or drop the row")
    return value


def _label(value: Any, spec: TaskSpec, where: str) -> int | float | None:
    text = "" if value is None else str(value).strip()
    if spec.kind == "regression":
        return _number(text, spec, where)
    if text in spec.labels:
        return spec.labels.index(text)
    if text in ("", "-1"):
        return None
    if text.isdecimal() and int(text) < len(spec.labels):
        return int(text)
    _bad_label(text, f"one of {', '.join(spec.labels)}, or its number", where)


def _number(text: str, spec: TaskSpec, where: str) -> float | None:
    try:
        value = float(text or "nan")
    except ValueError:
        value = math.inf
    if math.isinf(value):
        _bad_label(text, "a number", where)
    # -1 is a value like others in a user's own data
    return None if math.isnan(value) or (spec.name == "stsb" and value == -1) else value


def _bad_label(text: str, expected: str, where: str) -> NoReturn:
    hint = "" if expected == "a number" else ", or set data.labels"
    raise DataError(f"{where}: the label is {text!r:.60}, expected {expected}: fix or drop the row{hint}")
