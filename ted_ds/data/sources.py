"""Data files and hub data sets -> pieces of documents, in an order that depends on the recipe alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ted_ds.config.data_section import HubDataset
from ted_ds.data.bad_rows import BadRow, BadRows
from ted_ds.data.records import RECORD_SUFFIXES, Record, hub_records, iter_records, usable
from ted_ds.data.text_files import CR_ENDS, PLAIN_SUFFIXES, TEXT_SUFFIXES, TextFile, file_kind, no_format, text_file
from ted_ds.errors import DataError

SETTING = "data.text_column"

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
    pieces = usable(
        entries,
        lambda path: _file_pieces(path, text_column, by_line),
        lambda where, rows: _row_pieces(hub_records(where, rows, (text_column,), SETTING), text_column),
        "text",
        bad,
        hub_remedy="choose another split, or set data.text_column",
    )
    for piece in pieces:
        if bad is None or not bad.refused:
            yield piece


def _file_pieces(path: Path, text_column: str, by_line: bool) -> Iterator[Piece | BadRow]:
    kind = file_kind(path)
    if kind in RECORD_SUFFIXES:
        yield from _row_pieces(iter_records(path, (text_column,), SETTING), text_column)
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


def _row_pieces(records: Iterator[Record], column: str) -> Iterator[Piece | BadRow]:
    """Rows that are a document each, without the empty ones."""
    for where, row, read in records:
        text = row if isinstance(row, BadRow) else row[column]
        if isinstance(text, BadRow):
            yield text
        elif not isinstance(text, str):
            yield BadRow(f"{where}: {column!r} is {text!r:.40}, not a string", "set data.text_column")
        elif text:
            yield Piece(text, read=read)
