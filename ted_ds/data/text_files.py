"""Local files as users bring them: those an entry means, their format and compression, and their lines."""

from __future__ import annotations

import glob
import gzip
import json
import logging
import lzma
import re
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn
from zipfile import ZipFile

from ted_ds.data.bad_rows import BadRow
from ted_ds.errors import DataError

logger = logging.getLogger("ted_ds")

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonlines", ".jl")
TSV_SUFFIXES = (".tsv", ".tab")

PLAIN_SUFFIXES = frozenset({".txt", ".text", ".raw", ".tokens", ".log"})
"""Suffixes of plain text that say nothing of what is written in it."""

_MARKUP_AND_CODE = """
.adoc .bash .bat .bib .c .cc .cfg .clj .cmake .conf .cpp .cs .css .cu .cuh .cxx .dart .el .erl .ex .exs .f .f90
.fs .go .gradle .h .hh .hpp .hs .htm .html .ini .java .js .jsx .kt .kts .less .lisp .lua .m .mako .markdown .md
.mdx .mk .ml .mli .nim .nix .org .pas .patch .php .pl .pm .properties .proto .ps1 .py .pyi .pyx .r .rb .rmd .rs
.rst .s .sass .scala .scm .scss .sh .sol .sql .srt .sty .sv .swift .tcl .tex .textile .toml .ts .tsx .v .vb .vhd
.vim .vtt .vue .wiki .xhtml .xml .yaml .yml .zig .zsh
"""

TEXT_SUFFIXES = PLAIN_SUFFIXES | frozenset(_MARKUP_AND_CODE.split())
"""Suffixes of files that are a text of their own."""

CR_ENDS = "a carriage return within the line, so that its end may be one: end lines by LF"
"""What is wrong with a line of a file in which several may be one, as old Macs wrote them."""

POINTER = "version https://git-lfs.github.com/"
"""How a file begins that is only a pointer to its content."""

ARCHIVES: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", "a zip archive"),
    (b"PK\x05\x06", "a zip archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!\x1a\x07", "a rar archive"),
    (b"PAR1", "Parquet"),
    (b"ARROW1", "Arrow"),
    (b"Obj\x01", "Avro"),
    (b"SEQ\x06", "a Hadoop sequence file"),
    (b"%PDF-", "PDF"),
    (b"\x1f\x8b", "gzip data"),
    (b"\x28\xb5\x2f\xfd", "zstd data"),
    (b"\xfd7zXZ\0", "xz data"),
    (b"\x04\x22\x4d\x18", "lz4 data"),
    *((b"BZh%d1AY&SY" % level, "bzip2 data") for level in range(1, 10)),
)
"""How a file begins that is no text, whatever its name says."""

# those of UTF-32 first: its little-endian one begins with UTF-16's
WIDE = ((b"\xff\xfe\0\0", "UTF-32"), (b"\0\0\xfe\xff", "UTF-32"), (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"))

_ESCAPE = re.compile(
    r"\\(?:\\|u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(u[dD][89a-fA-F][0-9a-fA-F]{2}))"
)
"""In JSON an escaped backslash, two surrogates that are one character, or as a group one that is alone."""

_JSON_BEGINS = re.compile(rb'\s*\[?\s*\{\s*"(?:[^"\\]|\\.)*"\s*:')


def matching_files(entry: str) -> list[Path]:
    """The files of a path or glob, sorted. Raises DataError if there is none."""
    files = [Path(path) for path in sorted(glob.glob(entry, recursive=True)) if Path(path).is_file()]
    if Path(entry).is_file():  # a name with brackets in it
        return [Path(entry)]
    if not files:
        what = "matches no file"
        if Path(entry).is_dir():
            what = "is a folder: give files or a glob such as FOLDER/*.jsonl, or {hub: FOLDER}"
        raise DataError(f"data entry {entry!r} {what} (paths are relative to {Path.cwd()})")
    return files


def file_kind(path: Path) -> str:
    """The suffix that tells a file's format, in lower case, without the one of its compression."""
    return (Path(path.stem) if path.suffix.lower() in _UNPACKED else path).suffix.lower()


def no_format(path: Path, formats: str) -> NoReturn:
    """Raises DataError for a file whose suffix is none that the reader knows; `formats` says which it does."""
    with text_file(path) as file:  # what it holds may say more
        hint = "it looks like JSON, which is named .jsonl by lines; " if file.looks_like_json() else ""
    raise DataError(f"{path} has a suffix that says no format: {hint}give {formats}")


class TextFile:
    """An open file of UTF-8 text: its lines, and how far reading has come."""

    def __init__(self, path: Path, plain: BufferedReader, raw: BufferedReader) -> None:
        self.name = str(path)
        self._plain, self._raw, self._position = plain, raw, 0
        self._mended = 0
        self._first_mended: int | None = None

    def lines(self) -> Iterator[tuple[int, str]]:
        """(1-based number, line with its end) of each line."""
        number = 0
        try:
            for number, line in enumerate(self._plain, 1):
                text = line.decode()
                if 0 in line:  # a NUL; of bytes, as of wide strings it takes ten times as long
                    raise DataError(f"{self.name}, line {number}: a NUL byte, so binary or UTF-16: convert the file")
                yield number, text
        except UnicodeDecodeError as error:
            raise DataError(f"{self.name}, line {number}: not UTF-8 ({error.reason}): convert the file") from error

    def read(self) -> float:
        """Bytes on disk that reading has gone through since the last call."""
        before, self._position = self._position, self._raw.tell()
        return self._position - before

    def json(self, text: str, number: int | None = None) -> Any:
        """JSON of a line, or with None of the file. Lone surrogates, which no tokenizer takes, become U+FFFD."""
        # most lines cost the first look alone
        lone = sum(map(bool, _ESCAPE.findall(text))) if "\\u" in text else 0
        mended = _ESCAPE.sub(lambda escape: r"\ufffd" if escape[1] else escape[0], text) if lone else text
        try:
            value = _DECODER.decode(mended)
        except (ValueError, RecursionError) as error:
            raise self._not_json(error, text, number) from error
        if lone and not self._mended:
            self._first_mended = number
        self._mended += lone
        return value

    def _not_json(self, error: Exception, text: str, number: int | None) -> DataError:
        if number is None:
            return DataError(f"{self.name}: not valid JSON ({error}): fix the file, or name JSON lines .jsonl")
        whole = getattr(error, "pos", 0) < len(text.rstrip())
        remedy = "" if whole else "write each object on one line"
        if "\r" in text.rstrip("\r\n"):
            remedy = "end lines by LF, not by CR alone"
        return BadRow(f"{self.name}, line {number}: not valid JSON ({error})", remedy)

    def looks_like_json(self) -> bool:
        """Whether it begins with an object that has a key, or with a list of such."""
        return _JSON_BEGINS.match(self._plain.peek()) is not None

    def warn(self) -> None:
        """Says once what `json` has mended."""
        if self._mended:
            where = "" if self._first_mended is None else f", the first in line {self._first_mended}"
            logger.warning("%s: %d lone surrogates are read as U+FFFD%s", self.name, self._mended, where)


@contextmanager
def text_file(path: Path) -> Iterator[TextFile]:
    """The file, unpacked if it is compressed (.gz, .xz, .lzma, .bz2, .zst, .lz4, and .zip of one file).

    Raises DataError if it holds something else than text, and if compressed data ends too early.
    """
    with _unpacked(path) as (raw, plain):
        refuse_binary(plain.peek(), path)
        if plain.peek().startswith(BOM_UTF8):
            plain.read(len(BOM_UTF8))
        file = TextFile(path, plain, raw)
        try:
            yield file
        finally:
            file.warn()


@contextmanager
def _unpacked(path: Path) -> Iterator[tuple[BufferedReader, BufferedReader]]:
    """(the file, what it holds); DataError as of `text_file` if that is not there, or not whole."""
    unpack = _UNPACKED.get(path.suffix.lower())
    with path.open("rb") as raw:
        _refuse_pointer(raw.peek(), path)
        try:
            with BufferedReader(unpack(raw)) if unpack else raw as plain:
                yield raw, plain
        except (EOFError, OSError) as error:
            if not isinstance(error, EOFError) and "Truncated" not in str(error):  # Arrow has no class for it
                raise
            raise DataError(
                f"{path} cannot be read: Compressed file ended before the end of its frame: copy or download it again"
            ) from error


def refuse_incomplete(path: Path) -> None:
    """Raises DataError for a pointer of git LFS, and for a .zst that is cut, which most readers take for its end.

    That costs another pass over a .zst.
    """
    with _unpacked(path) as (_, plain):
        while path.suffix.lower() == ".zst" and plain.read(1 << 20):
            pass


def refuse_binary(head: bytes, path: Path) -> None:
    """Raises DataError if a file begins as no text does."""
    _refuse_pointer(head, path)
    for mark, encoding in WIDE:
        if head.startswith(mark):
            raise DataError(f"{path} is {encoding}, not UTF-8: convert the file")
    what = next((what for mark, what in ARCHIVES if head.startswith(mark)), None)
    if head[257:262] == b"ustar":
        what = "a tar archive"
    if what and what.endswith(" data"):
        raise DataError(f"{path} holds {what}, and its name does not say so: add the suffix, or unpack it")
    if what:
        remedy = "name it .parquet" if what == "Parquet" else "unpack or convert it"
        raise DataError(f"{path} holds {what}, not text: {remedy}")
    if (at := head.find(b"\0")) >= 0:
        number = head.count(b"\n", 0, at) + 1
        raise DataError(f"{path}, line {number}: a NUL byte, so binary or UTF-16, not UTF-8: convert the file")


def _refuse_pointer(head: bytes, path: Path) -> None:
    if head.startswith(POINTER.encode()):
        raise DataError(f"{path} is a pointer of git LFS, not the file itself: run `git lfs pull`")


class TwiceNamed(dict[str, Any]):
    """A JSON object in which `names` come, some of them more than once; the last counts."""

    names: list[str]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        made = TwiceNamed(made)
        made.names = [name for name, _ in pairs]
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _only_member(raw: BufferedReader) -> Any:
    archive = ZipFile(raw)
    # macOS adds a file of its own for each
    members = [m for m in archive.infolist() if not m.is_dir() and not m.filename.startswith("__MACOSX/")]
    if len(members) != 1:
        raise DataError(f"{raw.name} is an archive of {len(members)} files: unpack it, and give its files")
    return archive.open(members[0])


def _by_arrow(raw: BufferedReader, codec: str) -> Any:
    """A reader that goes on to further frames, and refuses one that is cut or broken."""
    import pyarrow as pa

    return pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), codec)


_UNPACKED: dict[str, Callable[[BufferedReader], Any]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".xz": lzma.LZMAFile,
    ".lzma": lzma.LZMAFile,
    ".bz2": lambda raw: _by_arrow(raw, "bz2"),  # bz2 takes a broken later stream for the end
    ".zip": _only_member,
    ".zst": lambda raw: _by_arrow(raw, "zstd"),
    ".lz4": lambda raw: _by_arrow(raw, "lz4"),
}
