"""Labelled rows of one or two texts: GLUE's TSV files, CSV, JSON lines, Parquet, hub data sets."""

from __future__ import annotations

import csv
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from ted_ds.config.schema import HubDataset
from ted_ds.config.tasks import TaskSpec
from ted_ds.data.bad_rows import BadRow, BadRows
from ted_ds.data.sources import JSON_SUFFIXES, file_kind, hub_rows, matching_files, numbered_lines, opened, readable
from ted_ds.errors import DataError

logger = logging.getLogger("ted_ds")

Row = Mapping[str, Any]
Lines = Iterator[tuple[int, str]]

csv.field_size_limit(1 << 30)  # a cell may hold a document; the default is 128 KiB


@dataclass(frozen=True)
class Example:
    """One row. label: a label's number, a regression's value, or None where the row is not labelled."""

    texts: tuple[str, ...]
    label: int | float | None
    where: str


def iter_examples(entries: Sequence[str | HubDataset], spec: TaskSpec, bad: BadRows | None = None) -> Iterator[Example]:
    """The rows of all entries in order.

    Labels are names of `spec.labels`, or numbers of `spec.numbered`; an empty one is none, and so is GLUE's -1. In a
    `.tsv`, cells are never quoted. One of a GLUE task has the official layout: rows of it that lack cells are passed
    over with one warning a file (QQP has some), and it may be without labels. Compressed files are read as such.
    bad: gets the rows that cannot be used; None: the first of them is raised.
    Raises DataError naming the file and line of what is missing, unreadable or not a label.
    """
    for entry in entries:
        if isinstance(entry, HubDataset):
            where, rows = hub_rows(entry)
            yield from _examples(where, _hub_table(where, rows, spec), spec, bad)
            continue
        for path in matching_files(entry):
            yield from _examples(str(path), _file_table(path, spec), spec, bad)


def _examples(
    source: str, rows: Iterator[tuple[str, Row | BadRow]], spec: TaskSpec, bad: BadRows | None
) -> Iterator[Example]:
    found = False
    with readable(source):
        for where, row in rows:
            found = True
            try:
                example = _example(row, spec, where)
            except BadRow as error:
                if bad is None:
                    raise
                bad.add(error)
                continue
            yield example
    if not found:
        raise DataError(f"{source} has no rows: remove it from the recipe's data, or fill it")


def _example(row: Row | BadRow, spec: TaskSpec, where: str) -> Example:
    if isinstance(row, BadRow):
        raise row
    texts = tuple(_text(row[name], name, where) for name in spec.text_columns)
    return Example(texts, _label(row.get(spec.label_column), spec, where), where)


def _hub_table(where: str, rows: Any, spec: TaskSpec) -> Iterator[tuple[str, Row]]:
    _check_columns(where, rows.column_names or _columns(spec), _columns(spec))
    names = getattr((rows.features or {}).get(spec.label_column), "names", None)
    if names is not None and sorted(names) != sorted(spec.labels):
        raise DataError(
            f"{where} has the labels {', '.join(names)}, the task {', '.join(spec.labels) or 'none'}: set data.labels"
        )
    for number, row in enumerate(rows, 1):
        label = row[spec.label_column]
        # a number is one of the data set's own order; -1 is no label
        named = row if not names or label is None or label < 0 else {**row, spec.label_column: names[label]}
        yield f"{where}, row {number}", named


def _file_table(path: Path, spec: TaskSpec) -> Iterator[tuple[str, Row]]:
    kind = file_kind(path)
    if kind == ".parquet":
        yield from _parquet_table(path, spec)
        return
    with opened(path) as (plain, _):
        lines = numbered_lines(plain, path)
        if kind in JSON_SUFFIXES:
            yield from _json_table(path, lines, spec)
        elif kind == ".csv":
            yield from _csv_table(path, lines, spec)
        elif kind == ".tsv":
            yield from _tsv_table(path, lines, spec)
        else:
            raise DataError(f"{path} has a suffix that says no format: give .tsv, .csv, .jsonl or .parquet")


def _parquet_table(path: Path, spec: TaskSpec) -> Iterator[tuple[str, Row]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        _check_columns(str(path), file.schema_arrow.names, _columns(spec))
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=list(_columns(spec))):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row


def _json_table(path: Path, lines: Lines, spec: TaskSpec) -> Iterator[tuple[str, Row]]:
    for number, line in lines:
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not valid JSON ({error}): fix or drop the line") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: not an object with columns: fix or drop the line")
        _check_columns(f"{path}, line {number}", list(row), _columns(spec))
        yield f"{path}, line {number}", row


def _csv_table(path: Path, lines: Lines, spec: TaskSpec) -> Iterator[tuple[str, Row]]:
    reader = csv.reader((line for _, line in lines), strict=True)
    header: list[str] | None = None
    while True:
        first = reader.line_num + 1  # a quoted cell may go on over several lines
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{path}, line {first}: not valid CSV ({error}): fix or drop the row") from error
        if cells is None:
            return
        if header is None:
            header = cells
            _check_columns(str(path), header, _columns(spec))
        elif cells:
            yield f"{path}, line {first}", _row(path, first, header, cells)


def _tsv_table(path: Path, lines: Lines, spec: TaskSpec) -> Iterator[tuple[str, Row]]:
    """Split by hand: csv would stop at a carriage return within a cell."""
    table: Iterator[tuple[int, list[str]]]
    table = ((number, line.rstrip("\r\n").split("\t")) for number, line in lines if line.strip("\r\n"))
    first = next(table, None)
    if first is None:
        return
    if spec.tsv is None:
        _check_columns(str(path), first[1], _columns(spec))
        yield from ((f"{path}, line {number}", _row(path, number, first[1], cells)) for number, cells in table)
        return
    official = first[1]
    if spec.tsv.header and not set(spec.text_columns) <= set(official):
        official = list(spec.tsv.header)
        table = chain([first], table)
    header = [spec.tsv.names.get(name, name) for name in official]
    # GLUE's test sets have no labels
    needed = _columns(spec) if spec.label_column in header else spec.text_columns
    _check_columns(str(path), header, needed, official)
    short: list[int] = []
    for number, cells in table:
        if len(cells) < len(header):
            short.append(number)
        else:
            yield f"{path}, line {number}", dict(zip(header, cells, strict=False))
    if short:
        logger.warning("%s: %d rows lack cells and are passed over, the first in line %d", path, len(short), short[0])


def _row(path: Path, number: int, header: Sequence[str], cells: Sequence[str]) -> Row:
    if len(cells) != len(header):
        raise DataError(f"{path}, line {number}: {len(cells)} cells, the header has {len(header)}: fix or drop the row")
    return dict(zip(header, cells, strict=True))


def _columns(spec: TaskSpec) -> tuple[str, ...]:
    return (*spec.text_columns, spec.label_column)


def _check_columns(where: str, there: Sequence[str], needed: Sequence[str], shown: Sequence[str] | None = None) -> None:
    if missing := [name for name in needed if name not in there]:
        raise DataError(
            f"{where} has no column {missing[0]!r}, only {', '.join(shown or there) or 'none'}: set data.text_columns "
            "and data.label_column"
        )


def _text(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{where}: {column!r} is {value!r:.40}, not a string")
    return value


def _label(value: Any, spec: TaskSpec, where: str) -> int | float | None:
    text = "" if value is None else str(value).strip()
    if spec.kind == "regression":
        return _number(text, spec, where)
    # pandas turns a column of numbers into 1.0 and nan if a row of it is empty
    whole = re.sub(r"(?<=[0-9])\.0+$", "", text)
    # JSON and YAML spell true what Python spells True
    for name in (text, text.lower()) if isinstance(value, bool) else (text, whole):
        if name in spec.labels:
            return spec.labels.index(name)
    if whole in ("", "-1") or (isinstance(value, float) and math.isnan(value)):
        return None
    if not re.fullmatch("[0-9]+", whole):
        raise BadRow(
            f"{where}: the label is {text!r:.60}, expected one of {', '.join(spec.labels)}",
            "set data.labels",
        )
    # a number is a place in its own data's order of names, which the recipe's need not be
    if int(whole) < len(spec.numbered) and spec.numbered[int(whole)] in spec.labels:
        return spec.labels.index(spec.numbered[int(whole)])
    raise BadRow(
        f"{where}: the label is the number {whole:.20}, and nothing says which of {', '.join(spec.labels)} it means",
        "write labels by name, or name the numbers themselves in data.labels, in quotes",
    )


def _number(text: str, spec: TaskSpec, where: str) -> float | None:
    try:
        value = float(text or "nan")
    except ValueError:
        value = math.inf
    if math.isinf(value) or "_" in text:  # Python reads 1_0 as 10
        raise BadRow(f"{where}: the label is {text!r:.60}, expected a number")
    # -1 is a value like others in a user's own data
    return None if math.isnan(value) or (spec.name == "stsb" and value == -1) else value
