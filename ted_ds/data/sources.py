"""Data files and hub data sets -> pieces of documents, in an order that depends on the recipe alone."""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn

from fsspec.compression import compr
from fsspec.utils import infer_compression

from ted_ds.config.schema import HubDataset
from ted_ds.errors import DataError

PIECE_CHARACTERS = 1 << 16
"""A text file is cut into pieces of about this size, at line ends, so that one huge file is still many tasks."""

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")


@dataclass(frozen=True)
class Piece:
    """Consecutive text of one document, or all of it.

    starts, ends: whether the document begins, and is over, with it. read: bytes on disk that reading has
    gone through since the piece before, for a progress bar.
    """

    text: str
    starts: bool = True
    ends: bool = True
    read: float = 0.0


def iter_pieces(entries: Sequence[str | HubDataset], *, text_column: str) -> Iterator[Piece]:
    """The documents of all entries in order; no piece is empty.

    A text file is one document, a JSON line or a row of a Parquet file or hub data set one each (the string
    in `text_column`). Compressed files (.gz, .xz, .bz2, .zip, .zst) are read as such.
    Raises DataError naming the file, and the line where there is one, that is missing, empty or unreadable.
    """
    for entry in entries:
        if isinstance(entry, HubDataset):
            yield from _hub_pieces(entry, text_column)
            continue
        for path in matching_files(entry):
            found = False
            for piece in _file_pieces(path, text_column):
                found = True
                yield piece
            if not found:
                raise DataError(f"{path} has no text: remove it from the recipe's data, or fill it")


def matching_files(entry: str) -> list[Path]:
    """The files of a path or glob, sorted. Raises DataError where there is none."""
    files = [Path(path) for path in sorted(glob.glob(entry, recursive=True)) if Path(path).is_file()]
    if Path(entry).is_file():  # a name with brackets in it
        return [Path(entry)]
    if not files:
        what = "is a folder: give files or a glob such as FOLDER/*.jsonl" if Path(entry).is_dir() else "matches no file"
        raise DataError(f"data entry {entry!r} {what} (paths are relative to {Path.cwd()})")
    return files


def _file_pieces(path: Path, text_column: str) -> Iterator[Piece]:
    kind = file_kind(path)
    with readable(path):
        if kind == ".parquet":
            yield from _parquet_pieces(path, text_column)
        else:
            yield from _line_pieces(path, text_column if kind in JSON_SUFFIXES else None)


@contextmanager
def readable(what: object) -> Iterator[None]:
    """Within it, an error that is none of ours is a DataError: `what` cannot be read."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # decompressors, Arrow, hub and builders raise errors of their own
        raise DataError(f"{what} cannot be read: {_first_line(error)}") from error


@contextmanager
def opened(path: Path) -> Iterator[tuple[BufferedReader, BufferedReader]]:
    """(its content, the file as it lies on disk): .gz, .xz, .bz2, .zip and .zst are unpacked."""
    name = infer_compression(path.name)
    with path.open("rb") as raw, BufferedReader(compr[name](raw, mode="rb")) if name else raw as plain:
        yield plain, raw


def file_kind(path: Path) -> str:
    """The suffix that tells a file's format, without the one of its compression."""
    return Path(path.stem).suffix if infer_compression(path.name) else path.suffix


def _line_pieces(path: Path, json_column: str | None) -> Iterator[Piece]:
    """Pieces of a text file or, where `json_column` is given, of JSON lines."""
    with opened(path) as (plain, raw):
        position = 0

        def read() -> float:
            nonlocal position
            before, position = position, raw.tell()
            return position - before

        lines = numbered_lines(plain, path)
        yield from _text(lines, read) if json_column is None else _json(lines, path, json_column, read)


def numbered_lines(file: BufferedReader, path: Path) -> Iterator[tuple[int, str]]:
    """(1-based number, line with its end) of each line; a byte order mark is dropped."""
    for number, line in enumerate(file, 1):
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}, line {number}: not UTF-8 ({error.reason}): convert the file") from error


def _text(lines: Iterator[tuple[int, str]], read: Callable[[], float]) -> Iterator[Piece]:
    held: list[str] = []
    size, starts = 0, True
    for _, line in lines:
        if size >= PIECE_CHARACTERS:
            yield Piece("".join(held), starts=starts, ends=False, read=read())
            held, size, starts = [], 0, False
        held.append(line)
        size += len(line)
    text = "".join(held)
    if not starts or text.strip():
        yield Piece(text, starts=starts, ends=True, read=read())


def _json(lines: Iterator[tuple[int, str]], path: Path, column: str, read: Callable[[], float]) -> Iterator[Piece]:
    for number, line in lines:
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not valid JSON ({error}): fix or drop the line") from error
        if not isinstance(record, dict) or column not in record:
            keys = sorted(record) if isinstance(record, dict) else f"a {type(record).__name__}"
            raise DataError(f"{path}, line {number}: no {column!r} in {keys}: set data.text_column")
        yield from _whole(record[column], f"{path}, line {number}", column, read())


def _whole(text: Any, where: str, column: str, read: float) -> Iterator[Piece]:
    """A document that is one string; an empty one is passed over."""
    if not isinstance(text, str):
        raise DataError(f"{where}: {column!r} is {text!r:.40}, not a string: fix or drop it, or set data.text_column")
    if text:
        yield Piece(text, read=read)


def _parquet_pieces(path: Path, column: str) -> Iterator[Piece]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        if column not in file.schema_arrow.names:
            _no_column(str(path), column, file.schema_arrow.names)
        row, share = 0, path.stat().st_size / max(1, file.metadata.num_rows)
        for batch in file.iter_batches(batch_size=1024, columns=[column]):
            for text in batch.column(0).to_pylist():
                row += 1
                yield from _whole(text, f"{path}, row {row}", column, share)


def _hub_pieces(entry: HubDataset, column: str) -> Iterator[Piece]:
    where, rows = hub_rows(entry)
    names = rows.column_names
    if names is not None and column not in names:
        _no_column(where, column, names)
    found = False
    with readable(where):  # a streamed file is parsed, and perhaps found broken, only here
        for number, row in enumerate(rows, 1):
            for piece in _whole(row[column], f"{where}, row {number}", column, 0.0):
                found = True
                yield piece
    if not found:
        raise DataError(f"{where} has no text: choose another split, or set data.text_column")


def hub_rows(entry: HubDataset) -> tuple[str, Any]:
    """(what messages call it, the data set as `datasets` loads it)."""
    from datasets import load_dataset

    where = f"data set {entry.hub} ({entry.name or 'default'}, {entry.split})"
    try:
        return where, load_dataset(entry.hub, entry.name, split=entry.split, streaming=entry.streaming)
    except Exception as error:  # network, hub, builder and file errors have no common base
        raise DataError(f"{where} cannot be loaded: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _no_column(where: str, column: str, there: Sequence[str]) -> NoReturn:
    raise DataError(f"{where} has no column {column!r}, only {', '.join(there)}: set data.text_column")
