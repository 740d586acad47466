"""Rows with columns of JSON lines, CSV, TSV, Parquet and hub data sets as records, the same for every reader."""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ted_ds.config.data_section import HubDataset
from ted_ds.data.bad_rows import BadRow, BadRows
from ted_ds.data.hub import cause, hub_rows
from ted_ds.data.text_files import (
    CR_ENDS,
    JSON_SUFFIXES,
    TSV_SUFFIXES,
    TextFile,
    TwiceNamed,
    file_kind,
    matching_files,
    refuse_binary,
    text_file,
)
from ted_ds.errors import DataError

Usable = TypeVar("Usable")

logger = logging.getLogger("ted_ds")

csv.field_size_limit(1 << 30)  # a cell may hold a document; the default is 128 KiB

PARQUET = ".parquet"
RECORD_SUFFIXES = (*JSON_SUFFIXES, ".csv", *TSV_SUFFIXES, PARQUET)

_QUOTED = re.compile(r'"(?:[^"]|"")*"', re.DOTALL)


class Record(NamedTuple):
    """A row.

    where: what messages call it: its file and line, or row, from 1. values: of a row that cannot be used, what is wrong
    with it. read: bytes on disk since the record before, for a progress bar; 0 of a hub data set.
    """

    where: str
    values: Mapping[str, Any] | BadRow
    read: float = 0.0


def usable(
    entries: Sequence[str | HubDataset],
    of_file: Callable[[Path], Iterator[Usable | BadRow]],
    of_hub: Callable[[str, Any], Iterator[Usable | BadRow]],
    what: str,
    bad: BadRows | None,
    *,
    hub_remedy: str = "remove it from the recipe's data, or fill it",
) -> Iterator[Usable]:
    """What can be used of all entries in order, as `of_file` reads a path, and `of_hub` what `hub_rows` gives.

    what: they read, for messages. bad: gets the rest; None: the first of it is raised. hub_remedy: what to do about a
    data set without any.
    Raises DataError for a file or data set without any, and with the cause if an error of a library ends reading.
    """
    for entry in entries:
        if isinstance(entry, HubDataset):
            where, rows = hub_rows(entry)
            yield from _usable(of_hub(where, rows), where, f"no {what}: {hub_remedy}", bad)
            continue
        for path in matching_files(entry):
            nothing = f"no {what}: remove it from the recipe's data, or fill it"
            yield from _usable(of_file(path), str(path), nothing, bad)


def _usable(rows: Iterator[Usable | BadRow], source: str, nothing: str, bad: BadRows | None) -> Iterator[Usable]:
    found = False
    try:
        for row in rows:
            found = True
            if not isinstance(row, BadRow):
                yield row
            elif bad is None:
                raise row
            else:
                bad.add(row)
    except DataError:
        raise
    except Exception as error:  # decompressors, Arrow, hub and builders raise errors of their own
        raise DataError(f"{source} cannot be read: {cause(error)}") from error
    if not found:
        raise DataError(f"{source} has {nothing}")


def iter_records(path: Path, columns: Sequence[str], setting: str | None) -> Iterator[Record]:
    """The records of a file with one of `RECORD_SUFFIXES`, in order.

    columns: those that are needed. setting: the recipe's key that names them, and of a Parquet file no others are
    read; None: whoever reads the records looks whether they are there. Cells of a TSV are taken as they are, so that
    those of a writer that quotes are refused.
    Raises DataError naming the file and line of what is missing, there twice, or not of the format.
    """
    kind = file_kind(path)
    if kind == PARQUET:
        yield from _parquet(path, columns, setting)
        return
    reader = _json if kind in JSON_SUFFIXES else _csv if kind == ".csv" else _tsv
    with text_file(path) as file:
        yield from reader(file, columns, setting)


def hub_records(where: str, rows: Any, columns: Sequence[str], setting: str | None) -> Iterator[Record]:
    """The records of a data set as `hub_rows` gives it; DataError as `iter_records` raises it."""
    needed = frozenset(columns)
    if rows.column_names is not None:
        check_columns(where, _as_written(rows.column_names, rows), columns, setting)
    for number, row in enumerate(rows, 1):
        place = f"{where}, row {number}"
        # a data set that is streamed may not know its columns, or have files that differ
        if number == 1 or not needed <= row.keys():
            check_columns(place, _as_written(list(row), rows), columns, setting)
        yield Record(place, row)


def _as_written(names: list[str], rows: Any) -> list[str]:
    """The columns of a data set by the names in its files: of two in a CSV file, pandas calls the second NAME.1."""
    by_pandas = getattr(rows.info, "builder_name", None) == "csv"
    return [name.removesuffix(".1") if by_pandas and name.removesuffix(".1") in names else name for name in names]


def check_columns(
    where: str, there: Sequence[str], needed: Sequence[str], setting: str | None, shown: Sequence[str] | None = None
) -> None:
    """Raises DataError for a needed column that is missing (not if `setting` is None) or there twice."""
    if setting and (missing := [name for name in needed if name not in there]):
        only = ", ".join(shown or there) or "none"
        one_cell = len(there) == 1 and re.search(r"[,;\t|]", only)
        hint = ", or separate cells of a .csv by commas, of a .tsv by tabs" if one_cell else ""
        raise DataError(f"{where} has no column {missing[0]!r}, only {only}: set {setting}{hint}")
    if twice := [name for name in needed if there.count(name) > 1]:
        raise DataError(f"{where} has {there.count(twice[0])} columns {twice[0]!r}: rename or drop all but one")


def class_names(path: Path, column: str) -> list[str] | None:
    """The names of a Parquet column's numbers, where `datasets` wrote them (ClassLabel) into the file."""
    with _parquet_file(path) as file:
        schema = file.schema_arrow
    if b"huggingface" not in (schema.metadata or {}):
        return None
    from datasets import Features

    return getattr(Features.from_arrow_schema(schema).get(column), "names", None)


def _parquet_file(path: Path) -> Any:
    import pyarrow.parquet as pq

    if path.suffix.lower() != PARQUET:
        raise DataError(f"{path} is a Parquet file that is compressed as a whole: unpack it")
    with path.open("rb") as raw:
        if not (head := raw.peek()).startswith(b"PAR1"):
            refuse_binary(head, path)
    return pq.ParquetFile(path)


def _parquet(path: Path, columns: Sequence[str], setting: str | None) -> Iterator[Record]:
    with _parquet_file(path) as file:
        names = file.schema_arrow.names
        check_columns(str(path), names, columns, setting)
        number, share = 0, path.stat().st_size / max(1, file.metadata.num_rows)
        for batch in file.iter_batches(batch_size=1024, columns=list(columns) if setting else None):
            for values in _python(batch, str(path), number):
                number += 1
                yield Record(f"{path}, row {number}", values, share)


def _python(batch: Any, where: str, before: int) -> list[dict[str, Any] | BadRow]:
    """The rows of a batch; `before`: how many there were in those before it."""
    try:
        rows: list[dict[str, Any] | BadRow] = batch.to_pylist()
        return rows
    except UnicodeDecodeError as error:
        if len(batch) == 1:
            return [BadRow(f"{where}, row {before + 1}: not UTF-8 ({error.reason})")]
    # Arrow does not say which row it is
    return [row for i in range(len(batch)) for row in _python(batch.slice(i, 1), where, before + i)]


def _json(file: TextFile, columns: Sequence[str], setting: str | None) -> Iterator[Record]:
    needed, first = frozenset(columns), True
    for number, line in file.lines():
        if not line.strip():
            continue
        where = f"{file.name}, line {number}"
        try:
            values = file.json(line, number)
        except BadRow as error:
            values = error
        if isinstance(values, dict):
            if isinstance(values, TwiceNamed):
                check_columns(where, values.names, columns, None)
            if not needed <= values.keys() and setting:
                if first:  # the recipe is wrong rather than the row
                    check_columns(where, list(values), columns, setting)
                lacking = next(name for name in columns if name not in values)
                there = ", ".join(values) or "none"
                values = BadRow(f"{where} has no column {lacking!r}, only {there}", f"set {setting}")
        elif setting and not isinstance(values, BadRow):
            several = isinstance(values, list) and any(isinstance(value, dict) for value in values)
            remedy = "write each object on a line of its own" if several else ""
            values = BadRow(f"{where}: not an object with columns", remedy)
        first = False
        yield Record(where, values, file.read())


def _csv(file: TextFile, columns: Sequence[str], setting: str | None) -> Iterator[Record]:
    reader = csv.reader((line for _, line in file.lines()), strict=True)
    header: list[str] | None = None
    while True:
        first = reader.line_num + 1  # a quoted cell may go on over several lines
        where = f"{file.name}, line {first}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            what = CR_ENDS if "new-line character" in str(error) else f"not valid CSV ({error}): fix or drop the row"
            raise DataError(f"{where}: {what}") from error
        if cells is None:
            return
        if header is None:
            if cells:
                header = cells
                check_columns(file.name, header, columns, setting)
        elif cells:
            yield Record(where, _row(where, header, cells), file.read())


def tsv_rows(file: TextFile) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of each line that is not blank; split by hand: csv would stop at a carriage return.

    One in the first line is refused: it may be the end of all lines.
    """
    first = True
    for number, line in file.lines():
        if bare := line.rstrip("\r\n"):
            if first and "\r" in bare:
                raise DataError(f"{file.name}, line {number}: {CR_ENDS}")
            first = False
            yield number, bare.split("\t")


def _tsv(file: TextFile, columns: Sequence[str], setting: str | None) -> Iterator[Record]:
    rows = tsv_rows(file)
    line, header = next(rows, (0, []))
    if not header:
        return
    _refuse_quoted(f"{file.name}, line {line}", [name for name in header if _QUOTED.fullmatch(name)])
    check_columns(file.name, header, columns, setting)
    marks: list[int] = []
    for number, cells in rows:
        where = f"{file.name}, line {number}"
        quoted = [cell for cell in cells if cell[:1] == '"' == cell[-1:] and _QUOTED.fullmatch(cell)]
        # a writer that quotes doubles the marks within; else they may be the text's own
        _refuse_quoted(where, [cell for cell in quoted if '""' in cell])
        values = _row(where, header, cells, "; cells of a .tsv are not quoted" if '"' in "".join(cells) else "")
        if not isinstance(values, BadRow) and any(values.get(name) in quoted for name in columns):
            marks.append(number)
        yield Record(where, values, file.read())
    if marks:
        logger.warning(
            "%s: %d rows have a cell in quotation marks, which are kept as text, the first in line %d: if a program "
            "wrote them around cells, write the file as .csv",
            file.name,
            len(marks),
            marks[0],
        )


def _refuse_quoted(where: str, cells: Sequence[str]) -> None:
    if cells:
        raise DataError(
            f"{where}: the cell {cells[0]!r:.60} is quoted, and cells of a .tsv are taken as they are: write the file "
            "as .csv, or without quotes"
        )


def _row(where: str, header: Sequence[str], cells: Sequence[str], hint: str = "") -> Mapping[str, str] | BadRow:
    if len(cells) != len(header):
        return BadRow(f"{where}: {len(cells)} cells, the header has {len(header)}{hint}")
    return dict(zip(header, cells, strict=True))
