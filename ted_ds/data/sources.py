"""Data files and hub data sets -> pieces of documents, in an order that depends on the recipe alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ted_ds.config.data_section import HubDataset
from ted_ds.data.bad_rows import BadRow, BadRows, usable
from ted_ds.data.hub import hub_rows
from ted_ds.data.records import RECORD_SUFFIXES, hub_records, iter_records
from ted_ds.data.text_files import (
    CR_ENDS,
    PLAIN_SUFFIXES,
    TEXT_SUFFIXES,
    TextFile,
    file_kind,
    matching_files,
    no_format,
    text_file,
)
from ted_ds.errors import DataError

PIECE_CHARACTERS = 1 << 16
"""A text file is cut into pieces of about this size, at line ends, so that one huge file is still many tasks."""


class Piece(NamedTuple):
    """Consecutive text of one document, or all of it.

    starts, ends: whether the document begins, and is over, with it. read: bytes on disk that reading has
    gone through since the piece before, for a progress bar.
    """

    text: str
    starts: bool = True
    ends: bool = True
    read: float = 0.0


def iter_pieces(
    entries: Sequence[str | HubDataset], *, text_column: str, by_line: bool = False, bad: BadRows | None = None
) -> Iterator[Piece]:
    """The documents of all entries in order; no piece is empty.

    A text file is one document, or with `by_line` each of its lines; a JSON line or a row of a CSV, TSV or Parquet
    file or hub data set is one each (the string in `text_column`). Compressed files are read as such.
    bad: gets the rows that cannot be used, and no more pieces come once the data is refused for them; None: the first
    of them is raised.
    Raises DataError naming the file, and the line if there is one, that is missing, empty or unreadable.
    """
    for entry in entries:
        if isinstance(entry, HubDataset):
            where, rows = hub_rows(entry)
            remedy = "choose another split, or set data.text_column"
            yield from _wanted(_hub_pieces(where, rows, text_column), where, remedy, bad)
            continue
        for path in matching_files(entry):
            remedy = "remove it from the recipe's data, or fill it"
            yield from _wanted(_file_pieces(path, text_column, by_line), str(path), remedy, bad)


def _wanted(pieces: Iterator[Piece | BadRow], source: str, remedy: str, bad: BadRows | None) -> Iterator[Piece]:
    for piece in usable(pieces, source, f"no text: {remedy}", bad):
        if bad is None or not bad.refused:
            yield piece


def _file_pieces(path: Path, text_column: str, by_line: bool) -> Iterator[Piece | BadRow]:
    kind = file_kind(path)
    if kind in RECORD_SUFFIXES:
        for record in iter_records(path, (text_column,), "data.text_column"):
            if piece := _whole(record.values, record.where, text_column, record.read):
                yield piece
    elif kind in TEXT_SUFFIXES:
        with text_file(path) as file:
            if kind in PLAIN_SUFFIXES and file.looks_like_json():
                raise DataError(f"{path} holds JSON, not plain text: name JSON lines .jsonl")
            yield from _lines(file) if by_line else _text(file)
    else:
        no_format(path, ".jsonl, .csv, .tsv or .parquet, or .txt for plain text")


def _text(file: TextFile) -> Iterator[Piece]:
    """A file that is one document."""
    held: list[str] = []
    size, starts = 0, True
    for _, line in file.lines():
        if size >= PIECE_CHARACTERS:
            yield Piece("".join(held), starts=starts, ends=False, read=file.read())
            held, size, starts = [], 0, False
        held.append(line)
        size += len(line)
    text = "".join(held)
    if not starts or text.strip():
        yield Piece(text, starts=starts, ends=True, read=file.read())


def _lines(file: TextFile) -> Iterator[Piece | BadRow]:
    """A file of which each line is a document."""
    for number, line in file.lines():
        if line.strip():
            text = line.rstrip("\r\n")
            yield BadRow(f"{file.name}, line {number}: {CR_ENDS}") if "\r" in text else Piece(text, read=file.read())


def _whole(row: Mapping[str, Any] | BadRow, where: str, column: str, read: float) -> Piece | BadRow | None:
    """A document that is one string; None of an empty one."""
    if isinstance(row, BadRow):
        return row
    text = row[column]
    if not isinstance(text, str):
        return BadRow(f"{where}: {column!r} is {text!r:.40}, not a string", "set data.text_column")
    return Piece(text, read=read) if text else None


def _hub_pieces(where: str, rows: Any, column: str) -> Iterator[Piece | BadRow]:
    for place, row in hub_records(where, rows, (column,), "data.text_column"):
        piece = _whole(row, place, column, 0.0)
        if piece:
            yield piece
