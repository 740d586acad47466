"""What users' files hold against what their names say, at every reader: corpora, tables, questions, LAMBADA."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import logging
import lzma
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ted_ds.config.tasks import TASKS
from ted_ds.data.sources import iter_pieces
from ted_ds.data.squad import iter_questions
from ted_ds.data.tables import iter_examples
from ted_ds.data.text_files import ARCHIVES
from ted_ds.errors import DataError
from tests.unit.test_sources import by_arrow

OWN = TASKS["classification"].with_columns(("text",), "label", ("bad", "good"))


def corpus(path: Path) -> list[str]:
    return [piece.text for piece in iter_pieces([str(path)], text_column="text")]


def passages(path: Path) -> list[str]:
    return [piece.text for piece in iter_pieces([str(path)], text_column="text", by_line=True)]


def table(path: Path) -> list[str]:
    return [example.texts[0] for example in iter_examples([str(path)], OWN)]


def asked(path: Path) -> list[str]:
    return [question.question for question in iter_questions([str(path)], impossible=True)]


def row(text: str) -> dict[str, object]:
    """A row that every reader takes, and returns `text` of."""
    answers: dict[str, list[object]] = {"text": [], "answer_start": []}
    return {"text": text, "label": "good", "id": "1", "question": text, "context": "c", "answers": answers}


def lines(*texts: str) -> bytes:
    return "".join(json.dumps(row(text)) + "\n" for text in texts).encode()


READERS = [corpus, passages, table, asked]
Reader = Callable[[Path], list[str]]


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def refused(reader: Reader, path: Path, message: str) -> None:
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}{message}"):
        reader(path)


@pytest.mark.parametrize("reader", READERS)
def test_suffixes_of_json_lines(tmp_path: Path, reader: Reader) -> None:
    data = b"\xef\xbb\xbf" + lines("one", "two")
    for name in ("a.jsonl", "a.JSONL", "a.jsonlines", "a.jl", "a.NDJSON", "a.v1.JsonL.GZ"):
        path = write(tmp_path / name, gzip.compress(data) if name.endswith("GZ") else data)
        assert reader(path) == ["one", "two"]


def test_squad_s_own_json_in_capitals(tmp_path: Path) -> None:
    qa = {"id": "1", "question": "q", "answers": []}
    content = {"data": [{"paragraphs": [{"context": "c", "qas": [qa]}]}]}
    assert asked(write(tmp_path / "SET.JSON", json.dumps(content).encode())) == ["q"]
    refused(
        asked, write(tmp_path / "l.json", lines("a", "b")), r": not valid JSON .*: fix the file, or name JSON lines"
    )


UNKNOWN = ["part-00000", "a.jsonl_00", "a.dat", "a.json.bak", "a", "a.gz", "a.snappy", "a.arrow", "a.pkl", ".jsonl"]


@pytest.mark.parametrize("reader", READERS)
def test_a_suffix_that_is_not_known_is_refused(tmp_path: Path, reader: Reader) -> None:
    for name in UNKNOWN:
        pack = gzip.compress if name.endswith("gz") else bytes
        refused(reader, write(tmp_path / name, pack(b"some text\n")), " has a suffix that says no format: give .*json")
        path = write(tmp_path / name, pack(lines("a")))
        refused(reader, path, r" has a suffix that says no format: it looks like JSON, .* named \.jsonl .*; give ")


@pytest.mark.parametrize("reader", [corpus, passages])
def test_json_in_a_file_of_plain_text_is_refused(tmp_path: Path, reader: Reader) -> None:
    long = lines("x" * 100_000)
    for data in (lines("a"), b'\xef\xbb\xbf\n {"a": 1', b'[{"a":', b'{\n  "data" : [', long, b'{"a\\"b": 1}'):
        refused(reader, write(tmp_path / "a.jsonl.txt", data), r" holds JSON, not plain text: name JSON lines \.jsonl")


def test_plain_text_may_have_braces(tmp_path: Path) -> None:
    for text in ("{not json}", '"quoted"', "[1] a note", "{'a': 1}", "{}", '{"a" and more}'):
        assert corpus(write(tmp_path / "a.txt", text.encode())) == [text]
    assert corpus(write(tmp_path / "a.py", b'{"a": 1}')) == ['{"a": 1}']  # a manifest of some frameworks


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
SUFFIXES = {corpus: (".txt", ".csv"), passages: (".txt", ".tsv"), table: (".csv", ".tsv", ".txt"), asked: (".json",)}


@pytest.mark.parametrize("reader", READERS)
def test_a_pointer_of_git_lfs_is_refused(tmp_path: Path, reader: Reader) -> None:
    for suffix in (".jsonl", ".parquet", ".jsonl.gz", ".zst", *SUFFIXES[reader]):
        path = write(tmp_path / f"a{suffix}", LFS)
        refused(reader, path, " is a pointer of git LFS, not the file itself: run `git lfs")


def tar(name: str, data: bytes) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return made.getvalue()


def zipped(**members: bytes) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return made.getvalue()


def arrow() -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, pa.schema([("text", pa.string())])):
        pass
    return bytes(sink.getvalue().to_pybytes())


def parquet(path: Path, **columns: object) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


NOT_TEXT: list[tuple[bytes, str]] = [
    (
        gzip.compress(lines("a"), mtime=0),
        " holds gzip data, and its name does not say so: add the suffix, or unpack it",
    ),
    (lzma.compress(lines("a")), " holds xz data, "),
    (bz2.compress(lines("a")), " holds bzip2 data, "),
    (by_arrow("zstd")(lines("a")), " holds zstd data, "),
    (by_arrow("lz4")(lines("a")), " holds lz4 data, "),
    (tar("a.jsonl", lines("a")), " holds a tar archive, not text: unpack or convert it"),
    (zipped(a=lines("a")), " holds a zip archive, not text: "),
    (arrow(), " holds Arrow, not text: "),
    (lines("a").decode().encode("utf-16"), " is UTF-16, not UTF-8: convert the file"),
    (b"\xfe\xff" + lines("a").decode().encode("utf-16-be"), " is UTF-16, not UTF-8: convert the file"),
    (lines("a").decode().encode("utf-32"), " is UTF-32, not UTF-8: convert the file"),
    (lines("a").decode().encode("utf-16-le"), ", line 1: a NUL byte, so binary or UTF-16, not UTF-8: convert the file"),
    (lines("a", "b") + b'{"text": "\0', ", line 3: a NUL byte, so binary or UTF-16, not UTF-8: convert the file"),
]


@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_text_is_refused_whatever_it_is_called(tmp_path: Path, reader: Reader) -> None:
    for suffix in (".jsonl", ".parquet", *SUFFIXES[reader]):
        for data, message in NOT_TEXT:
            refused(reader, write(tmp_path / f"a{suffix}", data), message)


@pytest.mark.parametrize("reader", READERS)
def test_parquet_by_another_name(tmp_path: Path, reader: Reader) -> None:
    path = parquet(tmp_path / "a.parquet", **{name: [value] for name, value in row("t").items()})
    refused(reader, path.rename(tmp_path / "a.jsonl"), " holds Parquet, not text: name it .parquet")
    packed = write(tmp_path / "a.parquet.gz", gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    refused(reader, packed, " is a Parquet file that is compressed as a whole: unpack it")


def test_each_known_beginning_is_refused(tmp_path: Path) -> None:
    for begin, what in ARCHIVES:
        refused(corpus, write(tmp_path / "a.txt", begin + b" and so on"), f" holds {what}")


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.tsv"])
def test_a_nul_far_down_is_named_by_its_line(tmp_path: Path, name: str) -> None:
    rest = {"a.txt": "a\n" * 9000, "a.csv": "text,n\n" + "a,1\n" * 8999, "a.tsv": "text\tn\n" + "a\t1\n" * 8999}[name]
    path = write(tmp_path / name, rest.encode() + b"a\0b\n")
    refused(corpus, path, ", line 9001: a NUL byte, so binary or UTF-16: convert the file")


@pytest.mark.parametrize("reader", READERS)
def test_archives_and_empty_members(tmp_path: Path, reader: Reader) -> None:
    for more in ({}, {"__MACOSX/._any": b"\0\5\x16\7"}):
        assert reader(write(tmp_path / "a.jsonl.zip", zipped(any=lines("a", "b"), **more))) == ["a", "b"]
    for name, data, message in [
        ("a.jsonl.zip", zipped(a=lines("a"), b=lines("b")), " is an archive of 2 files: unpack it, and give its files"),
        ("a.jsonl.zip", zipped(), " is an archive of 0 files: unpack it"),
        ("a.jsonl.zip", zipped(a=b""), " has no (text|rows|questions): remove it"),
        ("a.zip", zipped(**{"a.jsonl": lines("a")}), " has a suffix that says no format: it looks like JSON"),
        ("a.jsonl.zip", zipped(a=lines("a"))[:60], " cannot be read: "),
        ("a.tar", tar("a.jsonl", lines("a")), " holds a tar archive, not text"),
        ("a.tar.gz", gzip.compress(tar("a.jsonl", lines("a")), mtime=0), " holds a tar archive, not text"),
        ("a.tgz", gzip.compress(tar("a.jsonl", lines("a")), mtime=0), " holds gzip data, "),
        ("a.jsonl.gz", gzip.compress(gzip.compress(lines("a"), mtime=0), mtime=0), " holds gzip data, "),
        *((f"a.jsonl{s}", pack(b""), " has no (text|rows|questions): remove it") for s, pack in PACKED.items()),
        *((f"a.jsonl{s}", b"", " (has no (text|rows|questions)|cannot be read): ") for s in PACKED),
    ]:
        refused(reader, write(tmp_path / name, data), message)


PACKED: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": by_arrow("zstd"),
    ".lz4": by_arrow("lz4"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("suffix", PACKED)
def test_all_frames_are_read_and_a_cut_one_is_refused(tmp_path: Path, reader: Reader, suffix: str) -> None:
    one, two = (PACKED[suffix](lines(text)) for text in ("one", "two"))
    assert reader(write(tmp_path / f"a.jsonl{suffix}", one + two)) == ["one", "two"]
    for cut in (one[:-1], one[: len(one) // 2], one + two[:-3]):
        path = write(tmp_path / f"a.jsonl{suffix}", cut)
        refused(reader, path, " cannot be read: Compressed file ended before the end of its frame: copy or download it")
    refused(reader, write(tmp_path / f"a.jsonl{suffix}", lines("a")), " cannot be read: ")


@pytest.mark.parametrize("suffix", [".bz2", ".zst"])
def test_a_broken_later_frame_is_no_end(tmp_path: Path, suffix: str) -> None:
    one = PACKED[suffix](lines("one"))
    refused(corpus, write(tmp_path / f"a.jsonl{suffix}", one + b"broken" + one), " cannot be read: ")


def test_half_of_a_big_zst_is_refused(tmp_path: Path) -> None:
    data = by_arrow("zstd")("".join(f"{i * i} words\n" for i in range(40_000)).encode())
    assert sum(map(len, corpus(write(tmp_path / "a.txt.zst", data)))) > 500_000
    refused(corpus, write(tmp_path / "a.txt.zst", data[: len(data) // 2]), " cannot be read: Compressed file ended")


@pytest.mark.parametrize("reader", READERS)
def test_lone_surrogates_become_u_fffd_with_one_warning(
    tmp_path: Path, reader: Reader, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "a.jsonl", lines("fine \U0001f30a", "broken \ud83d", "\ude00\udbff two", "\\ud83d is text"))
    with caplog.at_level(logging.WARNING, "ted_ds"):
        found = reader(path)
    assert found == ["fine \U0001f30a", "broken \ufffd", "\ufffd\ufffd two", "\\ud83d is text"]
    count = 3 * sum(isinstance(part, str) and part == "t" for part in row("t").values())
    assert [r.getMessage() for r in caplog.records] == [
        f"{path}: {count} lone surrogates are read as U+FFFD, the first in line 2"
    ]


def test_lone_surrogates_of_squad_s_own_json_and_of_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    answer = {"text": "b\ud83d", "answer_start": 2}
    qa = {"id": "i\ud83d", "question": "q", "answers": [answer]}
    content = {"data": [{"paragraphs": [{"context": "a b\ud83d c", "qas": [qa]}]}]}
    path = write(tmp_path / "a.json", json.dumps(content).encode())
    with caplog.at_level(logging.WARNING, "ted_ds"):
        (question,) = iter_questions([str(path)], impossible=False)
    assert (question.id, question.context, question.answers) == ("i\ufffd", "a b\ufffd c", (("b\ufffd", 2),))
    assert [r.getMessage() for r in caplog.records] == [f"{path}: 3 lone surrogates are read as U+FFFD"]
    path = write(tmp_path / "a.jsonl", b'{"text": "a", "\\ud800": [{"\\udc00": 1}]}\n')
    assert corpus(path) == ["a"]


@pytest.mark.parametrize("reader", READERS)
def test_a_column_there_twice_is_refused(tmp_path: Path, reader: Reader) -> None:
    name = "question" if reader is asked else "text"
    data = lines("a").replace(b"}\n", f', "other": 1, "other": 2, "{name}": "b"}}\n'.encode())
    path = write(tmp_path / "a.jsonl", lines("a") + data)
    refused(reader, path, f", line 2 has 2 columns '{name}': rename or drop all but one")
    assert reader(write(tmp_path / "a.jsonl", lines("a").replace(b'"c"', b'"c", "other": {"text": 1}, "o": 1, "o": 2')))
    values = row("t")
    arrays = [pa.array([value]) for value in values.values()]
    doubled = pa.Table.from_arrays([*arrays, pa.array(["b"])], names=[*values, name])
    pq.write_table(doubled, tmp_path / "a.parquet")
    refused(reader, tmp_path / "a.parquet", f" has 2 columns '{name}': rename or drop all but one")


@pytest.mark.parametrize("reader", [corpus, passages, table])
@pytest.mark.parametrize("kind", ["csv", "tsv", "TAB"])
def test_a_column_of_csv_or_tsv_there_twice_is_refused(tmp_path: Path, reader: Reader, kind: str) -> None:
    mark = "," if kind == "csv" else "\t"
    rows = ["text,label,n,n", "a,good,1,2"]
    path = tmp_path / f"a.{kind}"
    assert reader(write(path, "\n".join(rows).replace(",", mark).encode())) == ["a"]
    path.write_text("\n".join([rows[0].replace("n,n", "n,text"), rows[1]]).replace(",", mark))
    refused(reader, path, " has 2 columns 'text': rename or drop all but one")


def test_official_layout_s_column_there_twice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", b"sentence\tlabel\tsentence\na\t1\tb\n")
    with pytest.raises(DataError, match="has 2 columns 'sentence'"):
        list(iter_examples([str(path)], TASKS["sst2"]))


def test_rows_of_csv_and_tsv_are_documents(tmp_path: Path) -> None:
    path = write(tmp_path / "a.CSV", b'\xef\xbb\xbf"text",id\r\n"A ""q"", and\nmore",1\r\n,2\r\nlast,3')
    pieces = list(iter_pieces([str(path)], text_column="text"))
    assert [piece.text for piece in pieces] == ['A "q", and\nmore', "last"]
    assert all(piece.starts and piece.ends for piece in pieces)
    path = write(tmp_path / "a.tsv.gz", gzip.compress(b'\xef\xbb\xbfid\ttext\r\n1\tsays "it\r\n\r\n2\t\r\n3\tb\n'))
    assert corpus(path) == ['says "it', "b"]
    for name, data in (("b.csv", b"id,body\n1,a\n"), ("b.tsv", b"id\tbody\n1\ta\n")):
        refused(corpus, write(tmp_path / name, data), r" has no column 'text', only id, body: set data\.text_column")
    refused(corpus, write(tmp_path / "c.csv", b"id,text\n1,a\n2\n"), ", line 3: 1 cells, the header has 2: fix or drop")
    refused(corpus, write(tmp_path / "c.csv", b"id,text\n1,\n"), " has no text: remove it")


@pytest.mark.parametrize("reader", [corpus, passages, table])
def test_a_tsv_of_a_writer_that_quotes_is_refused(
    tmp_path: Path, reader: Reader, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.tsv"
    said = "cells of a .tsv are taken as they are: write the file as .csv, or without quotes"
    for data, line in [
        ('text\tlabel\nplain\tbad\n"He said ""never"" twice"\tgood\n', 3),
        ('text\tlabel\n""\tgood\n', 2),
        ('"text"\t"label"\n"a"\t"good"\n', 1),
    ]:
        refused(reader, write(path, data.encode()), rf", line {line}: the cell .* is quoted, and {re.escape(said)}")
    for broken in ('text\tlabel\n"two\nlines"\tgood\n', 'text\tlabel\n"a\ttab"\tgood\n'):
        message = r", line 2: \d cells, the header has 2; cells of a \.tsv are not quoted: fix or drop the row"
        refused(reader, write(path, broken.encode()), message)
    own = ['"Never."', '"a" b "c"', '"a" "b"', '""ab""', '"', '"begun', 'ended"']
    with caplog.at_level(logging.WARNING, "ted_ds"):
        assert reader(write(path, "".join(["text\tlabel\n", *(f"{text}\tgood\n" for text in own)]).encode())) == own
    assert [r.getMessage().split(": if")[0] for r in caplog.records] == [
        f"{path}: 1 rows have a cell in quotation marks, which are kept as text, the first in line 2"
    ]


def test_official_tsv_keep_their_quotes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.tsv", b'sentence\tlabel\n"He said ""never"" twice"\t1\n')
    with caplog.at_level(logging.WARNING, "ted_ds"):
        (example,) = iter_examples([str(path)], TASKS["sst2"])
    assert example.texts == ('"He said ""never"" twice"',) and not caplog.records


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.md"])
def test_a_line_of_plain_text_is_a_passage(tmp_path: Path, name: str) -> None:
    data = "\ufeffone two\r\n\n  \n a three \u2028 four\nlast".encode()
    path = write(tmp_path / name, gzip.compress(data) if name.endswith("gz") else data)
    assert passages(path) == ["one two", " a three \u2028 four", "last"]
    pieces = list(iter_pieces([str(path)], text_column="text", by_line=True))
    assert all(piece.starts and piece.ends for piece in pieces)


def test_passages_that_end_by_cr_are_no_passage(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"one two\nthree four\rfive six\r")
    refused(passages, path, ", line 2: a carriage return within the line, so that its end may be one: end lines by LF")
    assert corpus(path) == ["one two\nthree four\rfive six\r"]


def test_passages_are_rows_of_other_files(tmp_path: Path) -> None:
    assert passages(parquet(tmp_path / "a.parquet", text=["a b\nc", "d e"])) == ["a b\nc", "d e"]
    assert passages(write(tmp_path / "a.csv", b'text\n"a b\nc"\nd e\n')) == ["a b\nc", "d e"]
    assert passages(write(tmp_path / "a.jsonl", lines("a b\nc", "d e"))) == ["a b\nc", "d e"]


@pytest.mark.parametrize("reader", READERS)
def test_parquet_strings_that_are_not_utf_8_are_named_by_row(tmp_path: Path, reader: Reader) -> None:
    values = {name: pa.array([value] * 3) for name, value in row("t").items()}
    name = "question" if reader is asked else "text"
    buffers = pa.array([b"ok", b"\xff\xfe", b"ok"]).buffers()
    values[name] = pa.Array.from_buffers(pa.string(), 3, buffers)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(values), path)
    refused(reader, path, r", row 2: not UTF-8 \(invalid start byte\): fix or drop the row")


def test_json_over_several_lines_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", json.dumps(row("a"), indent=1).encode())
    for reader in (corpus, passages, table):
        refused(reader, path, r", line 1: not valid JSON .*: fix or drop the row, or write each object on one line")
