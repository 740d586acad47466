from __future__ import annotations

import bz2
import gzip
import json
import logging
import lzma
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ted_ds.config.data_section import HubDataset
from ted_ds.config.tasks import TASKS, TaskSpec
from ted_ds.data.bad_rows import BadRows
from ted_ds.data.tables import Example, iter_examples
from ted_ds.errors import DataError

OWN = TASKS["classification"].with_columns(("text",), "class", ("bad", "good"))
VALUES = TASKS["regression"].with_columns(("a", "b"), None, None)


def examples(path: Path | HubDataset, spec: TaskSpec) -> list[Example]:
    return list(iter_examples([path if isinstance(path, HubDataset) else str(path)], spec))


def read(path: Path | HubDataset, spec: TaskSpec) -> list[tuple[Any, ...]]:
    return [(*example.texts, example.label) for example in examples(path, spec)]


def tsv(folder: Path, *rows: str) -> Path:
    """A file of rows with cells separated by "|"."""
    path = folder / "set.tsv"
    path.write_text("".join(row.replace("|", "\t") + "\n" for row in rows), encoding="utf-8")
    return path


OFFICIAL: list[tuple[str, list[str], list[tuple[Any, ...]]]] = [
    ("cola", ["gj04|1||It ran .", 'gj04|0|*|"ran It'], [("It ran .", 1), ('"ran It', 0)]),
    ("cola", ["index|sentence", "0|It ran ."], [("It ran .", None)]),
    ("sst2", ["sentence|label", 'a "fine" film |1', "dull|0"], [('a "fine" film ', 1), ("dull", 0)]),
    ("sst2", ["index|sentence", "0|fine"], [("fine", None)]),
    (
        "mrpc",
        ["\ufeffQuality|#1 ID|#2 ID|#1 String|#2 String", "1|7|8|A said .|B said .", '0|9|9|"A|B'],
        [("A said .", "B said .", 1), ('"A', "B", 0)],
    ),
    ("qqp", ["id|qid1|qid2|question1|question2|is_duplicate", "1|2|3|Why?|How?|0"], [("Why?", "How?", 0)]),
    (
        "mnli",
        ["index|genre|sentence1|sentence2|label1|gold_label", "0|x|P|H|neutral|contradiction", "1|x|P|H|-|entailment"],
        [("P", "H", 2), ("P", "H", 0)],
    ),
    ("qnli", ["index|question|sentence|label", "0|Q|S|not_entailment"], [("Q", "S", 1)]),
    ("rte", ["index|sentence1|sentence2|label", "0|A|B|entailment"], [("A", "B", 0)]),
    ("wnli", ["index|sentence1|sentence2|label", "0|A|B|1"], [("A", "B", 1)]),
    ("stsb", ["index|sentence1|sentence2|score", "0|A|B|3.250"], [("A", "B", 3.25)]),
]


@pytest.mark.parametrize(("name", "rows", "expected"), OFFICIAL)
def test_glue_s_own_files(tmp_path: Path, name: str, rows: list[str], expected: list[tuple[Any, ...]]) -> None:
    assert read(tsv(tmp_path, *rows), TASKS[name]) == expected


def test_official_rows_that_lack_cells_are_passed_over_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tsv(tmp_path, "sentence1|sentence2|label", "A|B|entailment", "A|B", "C", "C|D|entailment")
    with caplog.at_level(logging.WARNING, "ted_ds"):
        found = examples(path, TASKS["rte"])
    assert [(example.texts, example.where) for example in found] == [
        (("A", "B"), f"{path}, line 2"),
        (("C", "D"), f"{path}, line 5"),
    ]
    assert [r.getMessage() for r in caplog.records] == [
        f"{path}: 2 rows lack cells and are passed over, the first in line 3"
    ]
    with pytest.raises(DataError, match=r"set\.tsv, line 3: 2 cells, the header has 3: fix or drop the row"):
        examples(path, replace(TASKS["rte"], tsv=None))


ROWS = [("one", "good"), ('tw\u00f6, "2"\nlines', "bad"), ("", "good")]


def csv_bytes(rows: Sequence[tuple[str, str]]) -> bytes:
    quoted = ((text.replace('"', '""'), label) for text, label in rows)
    return ("id,text,class\r\n" + "".join(f'7,"{text}",{label}\r\n' for text, label in quoted)).encode()


def json_bytes(rows: Sequence[tuple[str, str]]) -> bytes:
    return "".join(json.dumps({"class": label, "text": text}) + "\n\n" for text, label in rows).encode()


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("suffix", COMPRESSIONS)
@pytest.mark.parametrize("kind", ["csv", "jsonl", "ndjson", "json"])
def test_a_user_s_own_files(tmp_path: Path, kind: str, suffix: str, bom: bytes) -> None:
    path = tmp_path / f"own.{kind}{suffix}"
    path.write_bytes(COMPRESSIONS[suffix](bom + (csv_bytes(ROWS) if kind == "csv" else json_bytes(ROWS))))
    found = examples(path, OWN)
    assert [(e.texts, e.label) for e in found] == [
        ((ROWS[0][0],), 1),
        ((ROWS[1][0],), 0),
        (("",), 1),
    ]
    # the second row of the CSV goes on over two lines; JSON lines have blank ones between
    lines = [2, 3, 5] if kind == "csv" else [1, 3, 5]
    assert [e.where for e in found] == [f"{path}, line {line}" for line in lines]


def test_a_user_s_own_tsv_has_a_header_and_no_quotes(tmp_path: Path) -> None:
    assert read(tsv(tmp_path, "class|text", 'good|"a\rb', "bad|c"), OWN) == [('"a\rb', 1), ("c", 0)]


def test_parquet_rows(tmp_path: Path) -> None:
    pq.write_table(pa.table({"b": ["x", "y"], "label": [0.5, None], "a": ["p", "q"]}), tmp_path / "own.parquet")
    assert read(tmp_path / "own.parquet", VALUES) == [("p", "x", 0.5), ("q", "y", None)]
    assert examples(tmp_path / "own.parquet", VALUES)[1].where == f"{tmp_path / 'own.parquet'}, row 2"


def labelled(folder: Path, label: Any) -> Path:
    (folder / "own.jsonl").write_text(json.dumps({"text": "t", "sentence": "t", "class": label, "label": label}))
    return folder / "own.jsonl"


@pytest.mark.parametrize(
    ("label", "number"),
    [("good", 1), (" good ", 1), ("", None), (None, None), (-1, None), ("-1", None), (-1.0, None), (math.nan, None)],
)
def test_labels_are_names(tmp_path: Path, label: Any, number: int | None) -> None:
    assert read(labelled(tmp_path, label), OWN) == [("t", number)]


@pytest.mark.parametrize("label", [1, 0, "1", " 1 ", 1.0, "1.0", "0.0", 2, "007"])
def test_a_number_has_no_name_of_its_own(tmp_path: Path, label: Any) -> None:
    """By place it would be guessed: the order of data.labels is the recipe's, not the data's."""
    path, written = labelled(tmp_path, label), str(label).strip().split(".")[0]
    said = (
        f"{path}, line 1: the label is the number {written}, and nothing says which of bad, good it means: fix or "
        "drop the row, or write labels by name, or name the numbers themselves in data.labels, in quotes"
    )
    with pytest.raises(DataError, match=f"^{re.escape(said)}$"):
        examples(path, OWN)


@pytest.mark.parametrize("label", [1, "1", 1.0, "1.0", "1 ", "1.00"])
def test_numbers_that_are_named_are_found_however_they_are_written(tmp_path: Path, label: Any) -> None:
    path = labelled(tmp_path, label)
    assert read(path, replace(OWN, labels=("1", "0"))) == [("t", 0)]
    assert read(path, TASKS["sst2"]) == [("t", 1)]  # GLUE's own numbers


def test_numbers_of_a_glue_task_are_its_official_ones_whatever_the_recipe_s_order(tmp_path: Path) -> None:
    path = labelled(tmp_path, 1)
    assert read(path, TASKS["sst2"].with_columns(None, None, ("positive", "negative"))) == [("t", 0)]
    with pytest.raises(DataError, match=r"the label is the number 1, and nothing says which of good, bad it means"):
        examples(path, TASKS["sst2"].with_columns(None, None, ("good", "bad")))
    with pytest.raises(DataError, match=r"the label is '7', expected one of negative, positive, or 0, 1: fix or drop"):
        examples(labelled(tmp_path, 7), TASKS["sst2"])


@pytest.mark.parametrize(("labels", "number"), [(("true", "false"), 0), (("False", "True"), 1)])
def test_booleans_are_found_by_both_their_names(tmp_path: Path, labels: tuple[str, str], number: int) -> None:
    path = labelled(tmp_path, True)
    assert read(path, replace(OWN, labels=labels)) == [("t", number)]
    for spec in (replace(OWN, labels=("0", "1")), TASKS["sst2"]):
        with pytest.raises(DataError, match=r"the label is 'True', expected one of "):
            examples(path, spec)


def test_a_label_that_is_called_a_number_is_meant_by_name(tmp_path: Path) -> None:
    path = tsv(tmp_path, "text|class", "a|1", "b|-1", "c|3")
    assert read(path, replace(OWN, labels=("3", "1", "-1"))) == [("a", 1), ("b", 2), ("c", 0)]


@pytest.mark.parametrize("label", ["Good", "\u00b2", "\u0661", "-2", "1.5", "1,0", "."])
def test_what_is_no_label_is_named_with_its_place(tmp_path: Path, label: str) -> None:
    path = tsv(tmp_path, "text|class", "a|good", f"b|{label}")
    said = f"{path}, line 3: the label is {label!r}, expected one of bad, good: fix or drop the row, or set data.labels"
    with pytest.raises(DataError, match=re.escape(said)):
        examples(path, OWN)


def test_values_are_numbers_and_minus_one_is_none_in_stsb_alone(tmp_path: Path) -> None:
    path = tsv(tmp_path, "a|b|label", "x|y|-1", "x|y|1e-1", "x|y|", "x|y|nan")
    assert [row[2] for row in read(path, VALUES)] == [-1.0, 0.1, None, None]
    assert read(tsv(tmp_path, "sentence1|sentence2|label", "x|y|-1.0"), TASKS["stsb"]) == [("x", "y", None)]
    for wrong in ("high", "inf", "1,5", "1_0", "1e39"):
        with pytest.raises(
            DataError, match=rf"set\.tsv, line 2: the label is '{wrong}', expected a number: fix or drop"
        ):
            examples(tsv(tmp_path, "a|b|label", f"x|y|{wrong}"), VALUES)


ERRORS: list[tuple[str, bytes, str]] = [
    ("e.csv", b"", "e.csv has no rows: remove it"),
    ("e.csv", b"text,class\n\n", "e.csv has no rows: remove it"),
    ("e.tsv", b"\n", "e.tsv has no rows: remove it"),
    ("e.jsonl", b"\n", "e.jsonl has no rows: remove it"),
    ("e.csv", b"text,label\na,good\n", "e.csv has no column 'class', only text, label: set data.text_columns"),
    ("e.tsv", b"Text\tclass\na\tgood\n", "e.tsv has no column 'text', only Text, class: set data.text_columns"),
    ("e.jsonl", b'{"text": "a"}\n', "e.jsonl, line 1 has no column 'class', only text: set data.text_columns"),
    ("e.csv", b"text,class\na,good\nb\n", "e.csv, line 3: 1 cells, the header has 2: fix or drop the row"),
    ("e.csv", b"text,class\na,b,good\n", "e.csv, line 2: 3 cells, the header has 2: fix or drop the row"),
    ("e.csv", b'text,class\n"a\n,good\n', "e.csv, line 2: not valid CSV (unexpected end of data): fix or drop"),
    ("e.jsonl", b"[1]\n", "e.jsonl, line 1: not an object with columns: fix or drop the row"),
    (
        "e.json",
        b'[{"text": "a"}]\n',
        "e.json, line 1: not an object with columns: fix or drop the row, or write each obj",
    ),
    ("e.jsonl", b'{"a": ' + b"[" * 10**5, "e.jsonl, line 1: not valid JSON (maximum recursion depth exceeded"),
    (
        "e.jsonl",
        b"{}\r{}\r",
        "e.jsonl, line 1: not valid JSON (Extra data: line 1 column 4 (char 3)): fix or drop the row, "
        "or end lines by LF, not by CR alone",
    ),
    (
        "e.csv",
        b"text;class\na;good\n",
        "e.csv has no column 'text', only text;class: set data.text_columns and data.label"
        "_column, or separate cells of a .csv by commas",
    ),
    (
        "e.tsv",
        b"text,class\na,good\n",
        "e.tsv has no column 'text', only text,class: set data.text_columns and data.label"
        "_column, or separate cells of a .csv by commas, of a .tsv by tabs",
    ),
    ("e.csv", b"text,class\ra,good\r", "e.csv, line 1: a carriage return within the line, so that its end may be one"),
    ("e.csv", b"text,class\na,good\rb,bad\n", "e.csv, line 2: a carriage return within the line"),
    ("e.tsv", b"text\tclass\ra\tgood\r", "e.tsv, line 1: a carriage return within the line"),
    ("e.jsonl", b"\n{\n", "e.jsonl, line 2: not valid JSON (Expecting"),
    ("e.jsonl", b'{"text": null, "class": 1}', "e.jsonl, line 1: 'text' is None, not a string: fix or drop the row"),
    ("e.tsv", b"text\tclass\n\xff\tgood\n", "e.tsv, line 2: not UTF-8 (invalid start byte): convert the file"),
    ("e.tsv.gz", b"text", "e.tsv.gz cannot be read: Not a gzipped file"),
    ("e.parquet", b"text", "e.parquet cannot be read: Parquet"),
    ("e.txt", b"text\tclass\n", "e.txt has a suffix that says no format: give .tsv, .csv, .jsonl or .parquet"),
]


@pytest.mark.parametrize(("name", "data", "message"), ERRORS)
def test_errors_name_file_and_line(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=f"^{re.escape(str(tmp_path / message))}"):
        examples(tmp_path / name, OWN)


def test_an_official_file_s_missing_column_is_named_with_those_it_has(tmp_path: Path) -> None:
    path = tsv(tmp_path, "Quality|#1 String", "1|A")
    with pytest.raises(DataError, match=r"set\.tsv has no column 'sentence2', only Quality, #1 String: set data\."):
        examples(path, TASKS["mrpc"])


def test_every_file_of_a_glob_has_rows(tmp_path: Path) -> None:
    for name, data in (("a.csv", b"text,class\nx,good\n"), ("b.csv", b"")):
        (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=r"b\.csv has no rows"):
        examples(tmp_path / "*.csv", OWN)
    assert len(list(iter_examples([str(tmp_path / "a.csv")] * 2, OWN))) == 2


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose Parquet file `datasets` loads like a hub repository, with named labels."""
    from datasets import ClassLabel, Dataset, Features, Value

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    features = Features({"text": Value("string"), "class": ClassLabel(names=["good", "bad"])})
    rows = Dataset.from_dict({"text": ["a", "b", "c"], "class": [0, 1, -1]}, features=features)
    (tmp_path / "hub").mkdir()
    rows.to_parquet(tmp_path / "hub" / "train.parquet")
    return tmp_path / "hub"


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_rows_are_numbered_by_the_names_of_their_labels(hub: Path, streaming: bool) -> None:
    entry = HubDataset(hub=str(hub), streaming=streaming)
    assert read(entry, OWN) == [("a", 1), ("b", 0), ("c", None)]
    assert examples(entry, OWN)[1].where == f"data set {hub} (default, train), row 2"
    with pytest.raises(DataError, match=r"hub \(default, train\) has the labels good, bad, the task yes, no: set data"):
        examples(entry, replace(OWN, labels=("yes", "no")))
    with pytest.raises(DataError, match=r"hub \(default, train\) has no column 'body', only text, class: set data\."):
        examples(entry, replace(OWN, text_columns=("body",)))
    with pytest.raises(DataError, match=r"hub \(default, test\) cannot be loaded: "):
        examples(HubDataset(hub=str(hub), split="test", streaming=streaming), OWN)


def test_all_bad_rows_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "own.jsonl"
    rows: list[Any] = [("a", "good"), (None, "good"), ("b", "fair"), ("c", 1), (3, "bad"), ("d", "bad")]
    path.write_text("".join(json.dumps({"text": text, "class": label}) + "\n" for text, label in rows))
    with pytest.raises(DataError) as error, BadRows(skip=False) as refused:
        assert [e.texts for e in iter_examples([str(path)], OWN, refused)] == [("a",), ("d",)]
    assert str(error.value) == (
        f"4 rows cannot be used: {path}, line 2: 'text' is None, not a string; {path}, line 3: the label is 'fair', "
        f"expected one of bad, good; {path}, line 4: the label is the number 1, and nothing says which of bad, good it "
        "means; and 1 more: fix or drop such rows, or set data.labels, or write labels by "
        "name, or name the numbers themselves in data.labels, in quotes, or set data.skip_bad_rows: true, which leaves "
        "them out"
    )
    with caplog.at_level(logging.WARNING, "ted_ds"), BadRows(skip=True) as bad:
        assert [e.texts for e in iter_examples([str(path)] * 2, OWN, bad)] == [("a",), ("d",)] * 2
    assert [record.getMessage()[:27] for record in caplog.records] == ["8 bad rows are left out: /t"]


def test_lines_that_are_no_rows_are_bad_rows_too(tmp_path: Path) -> None:
    """But for a first line without the columns: there the recipe is wrong."""
    good, bad = '{"text": "a", "class": "good"}\n', ['{"text"\n', "[1]\n", '{"text": "b"}\n', '"text class"\n']
    files = {
        "a.jsonl": good + "".join(bad) + good,
        "a.csv": "text,class\na,good\nb\nc,d,e\na,good\n",
        "a.tsv": 'text\tclass\na\tgood\nb\n"c" d\te\tf\na\tgood\n',
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with BadRows(skip=True) as found:
        assert [e.texts for e in iter_examples([str(tmp_path / "a.*")], OWN, found)] == [("a",)] * 6
    assert found.count == 2 + 4 + 2
    with pytest.raises(DataError) as error, BadRows(skip=False) as refused:
        list(iter_examples([str(tmp_path / "a.jsonl")], OWN, refused))
    assert str(error.value) == (
        f"4 rows cannot be used: {tmp_path}/a.jsonl, line 2: not valid JSON (Expecting ':' delimiter: line 2 column 1 "
        f"(char 8)); {tmp_path}/a.jsonl, line 3: not an object with columns; {tmp_path}/a.jsonl, line 4 has no column "
        "'class', only text; and 1 more: fix or drop such rows, or write each object on one line, or set "
        "data.text_columns and data.label_column, or set data.skip_bad_rows: true, which leaves them out"
    )
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n' + good)
    with pytest.raises(DataError, match=r"b\.jsonl, line 1 has no column 'class', only text: set data"), found:
        list(iter_examples([str(tmp_path / "b.jsonl")], OWN, found))


def test_a_parquet_file_s_own_names_are_those_of_its_numbers(hub: Path) -> None:
    path = hub / "train.parquet"
    assert read(path, OWN) == [("a", 1), ("b", 0), ("c", None)]
    message = re.escape(f"{path} has the labels good, bad, the task yes, no: set data.labels")
    with pytest.raises(DataError, match=f"^{message}"):
        examples(path, replace(OWN, labels=("yes", "no")))
    with pytest.raises(DataError, match=r"has the labels good, bad, the task none: set data\.labels"):
        examples(path, TASKS["regression"].with_columns(("text",), "class", None))
    table = pq.read_table(path)
    pq.write_table(
        table.set_column(1, "class", pa.array([0, 2, 1])).replace_schema_metadata(table.schema.metadata), path
    )
    with pytest.raises(DataError, match=r"train\.parquet, row 2: the label is 2, and the data names 2: fix or drop"):
        examples(path, OWN)


def test_glue_s_parquet_files_are_read_by_their_names(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["positive", "negative"])})
    rows = Dataset.from_dict({"sentence": ["fine", "dull"], "label": [0, 1]}, features=features)
    rows.to_parquet(tmp_path / "sst2.parquet")
    assert read(tmp_path / "sst2.parquet", TASKS["sst2"]) == [("fine", 1), ("dull", 0)]


def test_arrow_s_dictionaries_are_their_names(tmp_path: Path) -> None:
    labels = pa.DictionaryArray.from_arrays(pa.array([0, 1, None]), pa.array(["good", "bad"]))
    pq.write_table(pa.table({"text": ["a", "b", "c"], "class": labels}), tmp_path / "own.parquet")
    assert read(tmp_path / "own.parquet", OWN) == [("a", 1), ("b", 0), ("c", None)]
