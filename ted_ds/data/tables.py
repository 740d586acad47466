"""Labelled rows of one or two texts: GLUE's TSV files, CSV, JSON lines, Parquet, hub data sets."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from ted_ds.config.data_section import HubDataset
from ted_ds.config.tasks import KINDS, TaskSpec, Tsv
from ted_ds.data.bad_rows import BadRow, BadRows
from ted_ds.data.records import (
    PARQUET,
    RECORD_SUFFIXES,
    Record,
    check_columns,
    class_names,
    hub_records,
    iter_records,
    tsv_rows,
    usable,
)
from ted_ds.data.text_files import TSV_SUFFIXES, file_kind, no_format, text_file
from ted_ds.errors import DataError

logger = logging.getLogger("ted_ds")

LARGEST = 3e38
"""A label of a regression that float32 holds."""

SETTINGS = "data.text_columns and data.label_column"


@dataclass(frozen=True)
class Example:
    """One row. label: a label's number, a regression's value, or None if the row is not labelled."""

    texts: tuple[str, ...]
    label: int | float | None
    where: str


def iter_examples(entries: Sequence[str | HubDataset], spec: TaskSpec, bad: BadRows | None = None) -> Iterator[Example]:
    """The rows of all entries in order.

    Labels are names of `spec.labels`, or numbers of `spec.numbered` or of the names that a Parquet file or hub data set
    gives them; an empty one is none, and so is GLUE's -1. In a `.tsv`, cells are never quoted. One of a GLUE task has
    the official layout: rows of it that lack cells are passed over with one warning a file (QQP has some), and it may
    be without labels. Compressed files are read as such.
    bad: gets the rows that cannot be used; None: the first of them is raised.
    Raises DataError naming the file and line of what is missing, unreadable or not a label.
    """
    yield from usable(
        entries,
        lambda path: _file_examples(path, spec),
        lambda where, rows: _hub_examples(where, rows, spec),
        "rows",
        bad,
    )


def _hub_examples(where: str, rows: Any, spec: TaskSpec) -> Iterator[Example | BadRow]:
    names = getattr((rows.features or {}).get(spec.label_column), "names", None)
    yield from _examples(hub_records(where, rows, spec.columns, SETTINGS), where, names, spec)


def _file_examples(path: Path, spec: TaskSpec) -> Iterator[Example | BadRow]:
    kind = file_kind(path)
    if kind not in RECORD_SUFFIXES:
        no_format(path, ".tsv, .csv, .jsonl or .parquet")
    official = kind in TSV_SUFFIXES and spec.tsv is not None
    records = _official_records(path, spec) if official else iter_records(path, spec.columns, SETTINGS)
    names = class_names(path, spec.label_column) if kind == PARQUET else None
    yield from _examples(records, str(path), names, spec)


def _examples(
    records: Iterator[Record], source: str, names: Sequence[str] | None, spec: TaskSpec
) -> Iterator[Example | BadRow]:
    """names: the data's own, of the labels that are numbers; None: it has none."""
    if names is not None and sorted(names) != sorted(spec.labels):
        raise DataError(
            f"{source} has the labels {', '.join(names)}, the task {', '.join(spec.labels) or 'none'}: set data.labels"
        )
    for where, row, _ in records:
        try:
            if isinstance(row, BadRow):
                raise row
            value = row.get(spec.label_column)
            if names is not None and isinstance(value, int) and value >= 0:  # -1 is no label
                if value >= len(names):
                    raise BadRow(f"{where}: the label is {value}, and the data names {len(names)}")
                value = names[value]
            texts = tuple(_text(row[name], name, where) for name in spec.text_columns)
            found: Example | BadRow = Example(texts, _label(value, spec, where), where)
        except BadRow as error:
            found = error
        yield found


def _official_records(path: Path, spec: TaskSpec) -> Iterator[Record]:
    """GLUE's own files, whose cells are never quoted."""
    layout, short = spec.tsv or Tsv(), list[int]()
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
        needed = spec.columns if spec.label_column in header else spec.text_columns
        check_columns(str(path), header, needed, SETTINGS, official)
        for number, cells in table:
            if len(cells) < len(header):
                short.append(number)
            else:
                yield Record(f"{path}, line {number}", dict(zip(header, cells, strict=False)))
    if short:
        logger.warning("%s: %d rows lack cells and are passed over, the first in line %d", path, len(short), short[0])


def _text(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{where}: {column!r} is {value!r:.40}, not a string")
    return value


def _label(value: Any, spec: TaskSpec, where: str) -> int | float | None:
    text = "" if value is None else str(value).strip()
    if KINDS[spec.kind].numbers:
        return _number(text, spec, where)
    # pandas turns a column of numbers into 1.0 and nan if a row of it is empty
    whole = re.sub(r"(?<=[0-9])\.0+$", "", text)
    # JSON and YAML spell true what Python spells True
    for name in (text, text.lower()) if isinstance(value, bool) else (text, whole):
        if name in spec.labels:
            return spec.labels.index(name)
    if whole in ("", "-1") or (isinstance(value, float) and math.isnan(value)):
        return None
    # a number is a place in its own data's order of names, which the recipe's need not be
    numbers = {str(i): spec.labels.index(name) for i, name in enumerate(spec.numbered) if name in spec.labels}
    if whole in numbers:
        return numbers[whole]
    names = ", ".join(spec.labels)
    if numbers or not re.fullmatch("[0-9]+", whole):
        hint = f", or {', '.join(numbers)}" if numbers else ""
        raise BadRow(f"{where}: the label is {text!r:.60}, expected one of {names}{hint}", "set data.labels")
    raise BadRow(
        f"{where}: the label is the number {whole:.20}, and nothing says which of {names} it means",
        "write labels by name, or name the numbers themselves in data.labels, in quotes",
    )


def _number(text: str, spec: TaskSpec, where: str) -> float | None:
    try:
        value = float(text or "nan")
    except ValueError:
        value = math.inf
    # Python reads 1_0 as 10; labels are kept in float32
    if abs(value) > LARGEST or "_" in text:
        raise BadRow(f"{where}: the label is {text!r:.60}, expected a number")
    return None if math.isnan(value) or value == spec.unlabelled else value
