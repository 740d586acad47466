from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ted_ds.config.data_section import HubDataset
from ted_ds.data import sources
from ted_ds.data.bad_rows import BadRows
from ted_ds.data.sources import Piece, iter_pieces
from ted_ds.data.text_files import matching_files
from ted_ds.errors import DataError

TEXTS = ["one\n", "two \u6f22 \U0001f600", "  three\r\n\r\n\tof \u00e9 "]


def jsonl(texts: Sequence[object], column: str = "text") -> bytes:
    return "".join(json.dumps({"id": 1, column: text}) + "\n" for text in texts).encode()


def by_arrow(codec: str) -> Callable[[bytes], bytes]:
    def compress(data: bytes) -> bytes:
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, codec) as stream:
            stream.write(data)
        return bytes(sink.getvalue().to_pybytes())

    return compress


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": by_arrow("zstd"),
    ".lz4": by_arrow("lz4"),
}


def parquet(path: Path, columns: dict[str, Any]) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


def pieces_of(*entries: str | Path | HubDataset, column: str = "text") -> list[Piece]:
    named = [entry if isinstance(entry, HubDataset) else str(entry) for entry in entries]
    return list(iter_pieces(named, text_column=column))


def documents(pieces: list[Piece]) -> list[str]:
    """The documents the pieces make up, which must begin and end in turns."""
    made: list[str] = []
    over = True
    for piece in pieces:
        assert piece.starts is over and piece.text
        made = [*made, piece.text] if piece.starts else [*made[:-1], made[-1] + piece.text]
        over = piece.ends
    assert over
    return made


@pytest.mark.parametrize("suffix", COMPRESSIONS)
@pytest.mark.parametrize("kind", ["txt", "py", "jsonl", "ndjson", "json", "jsonlines", "jl"])
def test_every_compression_gives_the_documents_and_all_bytes(tmp_path: Path, kind: str, suffix: str) -> None:
    path = tmp_path / f"a.b.{kind}{suffix}"
    path = path.with_name(path.name.upper() if kind == "jl" else path.name)
    text = "".join(TEXTS)
    path.write_bytes(COMPRESSIONS[suffix](text.encode() if kind in ("txt", "py") else jsonl(TEXTS)))
    pieces = pieces_of(path)
    assert documents(pieces) == ([text] if kind in ("txt", "py") else TEXTS)
    assert sum(piece.read for piece in pieces) == path.stat().st_size


def test_json_lines_that_are_blank_or_hold_no_text_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + jsonl(["a", ""], "body") + b"\n \r\n" + jsonl(["b"], "body"))
    assert documents(pieces_of(path, column="body")) == ["a", "b"]


def test_parquet_rows_are_documents(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", {"n": [1, 2, 3], "body": TEXTS})
    pieces = pieces_of(path, column="body")
    assert documents(pieces) == TEXTS
    assert sum(piece.read for piece in pieces) == pytest.approx(path.stat().st_size)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_big_text_file_is_cut_at_line_ends_into_pieces_that_make_it_up(tmp_path: Path, suffix: str) -> None:
    text = "".join(f"{i} \u00e9\r\n" + "\n" * (i % 7 == 0) for i in range(40_000)) + "no end of line"
    path = tmp_path / f"big.txt{suffix}"
    path.write_bytes(COMPRESSIONS[suffix]((b"\xef\xbb\xbf" if not suffix else b"") + text.encode()))
    pieces = pieces_of(path)
    assert documents(pieces) == [text]
    assert len(pieces) > 3 and all(piece.text.endswith("\n") for piece in pieces[:-1])
    assert all(len(piece.text) < sources.PIECE_CHARACTERS + 20 for piece in pieces)
    assert sum(piece.read for piece in pieces) == path.stat().st_size


def test_entries_come_in_the_recipe_s_order_and_globs_sorted(tmp_path: Path) -> None:
    for name in ("c.txt", "a.txt", "deep/b.txt", "odd[1].txt", "a.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert documents(pieces_of(tmp_path / "c.txt", tmp_path / "[ab]*")) == ["c.txt", "a.md", "a.txt"]
    assert matching_files(f"{tmp_path}/odd[1].txt") == [tmp_path / "odd[1].txt"]
    deep = [path.name for path in matching_files(f"{tmp_path}/**/*.txt")]
    assert deep == ["a.txt", "c.txt", "b.txt", "odd[1].txt"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two files that `datasets` loads like a hub repository."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "train-0.jsonl").write_bytes(jsonl([TEXTS[0], ""]))
    (folder / "train-1.jsonl").write_bytes(jsonl(TEXTS[1:]))
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_rows_are_documents(hub: Path, streaming: bool) -> None:
    assert documents(pieces_of(HubDataset(hub=str(hub), streaming=streaming))) == TEXTS


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("second", "changes", "column", "message"),
    [
        (None, {}, "body", r"data set .*hub \(default, train\) has no column 'body', only id, text: set data\."),
        (None, {"split": "none"}, "text", r"data set .*hub \(default, none\) cannot be loaded: .+"),
        (None, {"name": "other"}, "text", r"data set .*hub \(other, train\) cannot be loaded: .+"),
        (jsonl([""]), {}, "text", r"data set .*hub \(default, train\) has no text: choose another split"),
        (
            b'{"id": 1, "text": "a"}\n{"id"',
            {},
            "text",
            r"data set .*hub \(default, train\) cannot be (loaded|read): .+",
        ),
        (jsonl([None]), {}, "text", r"data set .*hub \(default, train\), row 2: 'text' is None, not a string"),
    ],
)
def test_hub_errors(
    hub: Path, second: bytes | None, changes: dict[str, Any], column: str, message: str, streaming: bool
) -> None:
    if second is not None:
        (hub / "train-0.jsonl").write_bytes(jsonl([""]))
        (hub / "train-1.jsonl").write_bytes(second)
    with pytest.raises(DataError, match=message):
        pieces_of(HubDataset(hub=str(hub), streaming=streaming, **changes), column=column)


ERRORS: list[tuple[str, bytes, str]] = [
    ("e.txt", b"", "e.txt has no text: remove it"),
    ("e.txt", b" \n\t\n", "e.txt has no text: remove it"),
    ("e.jsonl", b"\n" + jsonl([""]), "e.jsonl has no text: remove it"),
    ("e.jsonl", jsonl(["a"]) + b'\n{"text": \n', "e.jsonl, line 3: not valid JSON (Expecting value: "),
    (
        "e.jsonl",
        jsonl(["a"]) + b'{"b": 1, "a": 2}',
        "e.jsonl, line 2 has no column 'text', only b, a: fix or drop the row, or set data.",
    ),
    (
        "e.jsonl.gz",
        gzip.compress(b"[1]", mtime=0),
        "e.jsonl.gz, line 1: not an object with columns: fix or drop the row",
    ),
    ("e.jsonl", jsonl(["a", None]), "e.jsonl, line 2: 'text' is None, not a string: fix or drop the row, or set data."),
    ("e.jsonl", jsonl([["a" * 99]]), "e.jsonl, line 1: 'text' is ['" + "a" * 38 + ", not a string"),
    ("e.txt", b"a\nb\n\xe9t\xe9\n", "e.txt, line 3: not UTF-8 (invalid continuation byte): convert the file"),
    ("e.jsonl", jsonl(["a"]) + b'{"text": "\xff"}\n', "e.jsonl, line 2: not UTF-8 (invalid start byte): convert"),
    ("e.txt", "a".encode("utf-16"), "e.txt is UTF-16, not UTF-8: convert the file"),
    (
        "e.txt.gz",
        gzip.compress(bytes(range(32, 127)) * 9, mtime=0)[:-9],
        "e.txt.gz cannot be read: Compressed file ended",
    ),
    ("e.txt.gz", b"plain", "e.txt.gz cannot be read: Not a gzipped file"),
    ("e.txt.xz", lzma.compress(b"a")[:-9], "e.txt.xz cannot be read: Compressed file ended"),
    ("e.parquet", b"PAR1 and then no footer", "e.parquet cannot be read: Parquet magic bytes not found"),
    ("e.parquet", b"", "e.parquet cannot be read: Parquet file size is 0 bytes"),
]


@pytest.mark.parametrize(("name", "data", "message"), ERRORS)
def test_file_errors_name_file_and_line(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=f"^{re.escape(str(tmp_path / message))}"):
        pieces_of(tmp_path / name)


def test_parquet_errors_name_file_and_row(tmp_path: Path) -> None:
    path = parquet(tmp_path / "e.parquet", {"text": ["a", "b", None], "n": [1, 2, 3]})
    with pytest.raises(DataError, match=r"e\.parquet, row 3: 'text' is None, not a string: fix or drop the row"):
        pieces_of(path)
    with pytest.raises(DataError, match=r"e\.parquet has no column 'body', only text, n: set data\.text_column"):
        pieces_of(path, column="body")
    data = path.read_bytes()
    path.write_bytes(data[:4] + b"\xff" * 60 + data[64:])
    with pytest.raises(DataError, match=r"e\.parquet cannot be read: "):
        pieces_of(path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [("none.txt", "matches no file"), ("*.csv", "matches no file"), ("", r"is a folder: give files or a glob such as")],
)
def test_an_entry_without_files(tmp_path: Path, entry: str, message: str) -> None:
    with pytest.raises(DataError, match=rf"^data entry '{re.escape(str(tmp_path / entry))}' {message}.*relative to"):
        pieces_of(tmp_path / entry)


def test_all_bad_rows_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every kind of file; from the first on, nothing more is given out of data that is refused for them."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    deep = b'{"text": ' + b"[" * 100_000 + b"\n"
    (tmp_path / "a.jsonl").write_bytes(jsonl(["a", None, 3]) + b"{\n[1]\n" + b'{"b": 1}\n' + deep + jsonl(["b"]))
    (tmp_path / "b.csv").write_bytes(b"text,n\nc,1\nd\ne,2\n")
    parquet(tmp_path / "c.parquet", {"text": ["f", None, "g"]})
    buffers = pa.array([b"i", b"\xff", b"j"]).buffers()
    parquet(tmp_path / "d.parquet", {"text": pa.StringArray.from_buffers(3, buffers[1], buffers[2])})
    (tmp_path / "hub").mkdir()
    parquet(tmp_path / "hub" / "train.parquet", {"text": [None, "h"]})
    entries = [str(tmp_path / "*.*"), HubDataset(hub=str(tmp_path / "hub"))]
    with BadRows(skip=True) as bad:
        assert documents(list(iter_pieces(entries, text_column="text", bad=bad))) == list("abcefgijh")
    assert bad.count == 6 + 1 + 1 + 1 + 1
    said = r"^10 rows cannot be used: .*a\.jsonl, line 2: 'text' is None, not a string; "
    with pytest.raises(DataError, match=said), BadRows(skip=False) as refused:
        assert documents(list(iter_pieces(entries, text_column="text", bad=refused))) == ["a"]


def test_a_file_of_bad_rows_alone_is_not_called_empty(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl([None, None]))
    with BadRows(skip=True) as bad:
        assert list(iter_pieces([str(tmp_path / "a.jsonl")], text_column="text", bad=bad)) == []
    assert bad.count == 2
