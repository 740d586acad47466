from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ted_ds.config.schema import HubDataset
from ted_ds.data.squad import Question, iter_questions
from ted_ds.errors import DataError

CONTEXT = "Caf\u00e9s in \u6f22\u5b57 opened in 1890."
YEAR = CONTEXT.index("1890")


def qa(name: str, *answers: tuple[str, int], **more: Any) -> dict[str, Any]:
    return {"id": name, "question": "When?", "answers": [{"text": t, "answer_start": s} for t, s in answers], **more}


def squad(path: Path, *questions: dict[str, Any], context: Any = CONTEXT) -> Path:
    content = {"version": "x", "data": [{"title": "t", "paragraphs": [{"context": context, "qas": list(questions)}]}]}
    data = json.dumps(content, ensure_ascii=False).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def flat(name: str, *answers: tuple[str, int], **changes: Any) -> dict[str, Any]:
    columns = {"text": [t for t, _ in answers], "answer_start": [s for _, s in answers]}
    return {"id": name, "title": "t", "question": "When?", "context": CONTEXT, "answers": columns, **changes}


def questions(path: Path | HubDataset, *, impossible: bool = True) -> list[Question]:
    return list(iter_questions([path if isinstance(path, HubDataset) else str(path)], impossible=impossible))


@pytest.mark.parametrize("name", ["set.json", "set.json.gz"])
def test_squad_s_own_files(tmp_path: Path, name: str) -> None:
    path = squad(
        tmp_path / name,
        qa("a", ("1890", YEAR), ("in 1890", YEAR - 3)),
        qa("b", is_impossible=True, plausible_answers=[{"text": "1890", "answer_start": YEAR}]),
        qa("c", ("1890", YEAR), is_impossible=True),
        qa("d", ("1890", YEAR), is_impossible=False),
    )
    where = [f"question {i} in {path}" for i in "abcd"]
    assert questions(path) == [
        Question("a", "When?", CONTEXT, (("1890", YEAR), ("in 1890", YEAR - 3)), False, where[0]),
        Question("b", "When?", CONTEXT, (), True, where[1]),
        Question("c", "When?", CONTEXT, (), True, where[2]),
        Question("d", "When?", CONTEXT, (("1890", YEAR),), False, where[3]),
    ]
    with pytest.raises(
        DataError, match=rf"^{where[1]} has no answer, and this task needs one: drop it, or choose task"
    ):
        questions(path, impossible=False)


ROWS = [flat("a", ("1890", YEAR)), flat("b", context=CONTEXT + "\u2028\x85 end")]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Path | HubDataset, list[str]]]:
    """Format -> (the rows in it, what messages call the places of both)."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    lines, table = tmp_path / "set.jsonl", tmp_path / "hub" / "set.parquet"
    lines.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in ROWS), encoding="utf-8")
    table.parent.mkdir()
    answers = pa.array(
        [row["answers"] for row in ROWS],
        pa.struct({"text": pa.list_(pa.string()), "answer_start": pa.list_(pa.int32())}),
    )
    pq.write_table(pa.table({k: [row[k] for row in ROWS] if k != "answers" else answers for k in ROWS[0]}), table)
    hub = f"data set {table.parent} (default, train)"
    return {
        "jsonl": (lines, [f"{lines}, line 1", f"{lines}, line 3"]),
        "parquet": (table, [f"{table}, row 1", f"{table}, row 2"]),
        "hub": (HubDataset(hub=str(table.parent)), [f"{hub}, row 1", f"{hub}, row 2"]),
    }


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hub"])
def test_rows_with_the_hub_s_columns(files: dict[str, tuple[Path | HubDataset, list[str]]], kind: str) -> None:
    path, places = files[kind]
    assert questions(path) == [
        Question("a", "When?", CONTEXT, (("1890", YEAR),), False, f"question a in {places[0]}"),
        Question("b", "When?", CONTEXT + "\u2028\x85 end", (), True, f"question b in {places[1]}"),
    ]


@pytest.mark.parametrize(
    ("text", "start", "found"),
    [
        ("1890", YEAR - 2, YEAR),
        ("1890", YEAR + 1, YEAR),
        ("  1890", YEAR - 2, YEAR),
        (" 1890", YEAR - 1, YEAR),
        (" 1890 ", YEAR, YEAR),
        ("   1890", YEAR - 3, YEAR),
        ("\u6f22", CONTEXT.index("\u6f22"), CONTEXT.index("\u6f22")),
        ("C", 1, 0),
    ],
)
def test_an_answer_may_be_off_by_two_or_have_spaces(tmp_path: Path, text: str, start: int, found: int) -> None:
    (question,) = questions(squad(tmp_path / "set.json", qa("a", (text, start))))
    assert question.answers == ((text.strip(), found),)
    assert CONTEXT[found:].startswith(text.strip())


def test_the_nearest_place_of_an_answer_is_taken(tmp_path: Path) -> None:
    path = squad(tmp_path / "set.json", qa("a", ("aa", 1), ("b", 4)), context="aaab b")
    assert questions(path)[0].answers == (("aa", 1), ("b", 3))
    path = squad(tmp_path / "set.json", qa("a", ("b", 0)), context="ab")  # not the place -1, which is the end
    assert questions(path)[0].answers == (("b", 1),)


ANSWERS: list[tuple[Any, Any, str]] = [
    ("1890", YEAR + 3, f"the answer '1890' is not at {YEAR + 3} of its context, which has '0.' there: fix or drop it"),
    (
        "1890",
        YEAR - 3,
        f"the answer '1890' is not at {YEAR - 3} of its context, which has 'in 1' there: fix or drop it",
    ),
    ("1890", -1, "the answer '1890' is not at -1 of its context, which has "),
    ("Cafes", 0, "the answer 'Cafes' is not at 0 of its context, which has 'Caf\u00e9s' there"),
    (" ", 5, "the answer ' ' is not at 5 of its context"),
    ("1890", "24", "the answer is '1890' at '24', not a string at a number: fix or drop it"),
    (1890, YEAR, f"the answer is 1890 at {YEAR}, not a string at a number: fix or drop it"),
]


@pytest.mark.parametrize(("text", "start", "message"), ANSWERS)
def test_an_answer_elsewhere_is_an_error(tmp_path: Path, text: Any, start: Any, message: str) -> None:
    path = squad(tmp_path / "set.json", qa("good", ("1890", YEAR)), qa("q7", (text, start)))
    with pytest.raises(DataError, match=f"^{re.escape(f'question q7 in {path}: {message}')}"):
        questions(path)


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


ERRORS: list[tuple[str, bytes, str]] = [
    ("e.json", b"", "e.json has no questions: remove it"),
    ("e.json", b'{"data": []}', "e.json has no questions: remove it"),
    ("e.jsonl", b"\n", "e.jsonl has no questions: remove it"),
    ("e.json", b'{"data": [', "e.json: not valid JSON (Expecting value: line 1 column 11 (char 10)): fix the file"),
    ("e.json", b'{"version": 1}', "e.json is not of SQuAD's form, data[].paragraphs[].qas[] (no 'data'): name JSON"),
    ("e.json", b"[1]", "e.json is not of SQuAD's form, data[].paragraphs[].qas[] ("),
    ("e.json", b'{"data": [{"paragraphs": [{"qas": [{"id": 1}]}]}]}', "e.json is not of SQuAD's form, data[].par"),
    ("e.jsonl", lines(ROWS[0]) + b"{", "e.jsonl, line 2: not valid JSON (Expecting"),
    ("e.jsonl", lines({"id": 1}), "e.jsonl, line 1: no 'answers', only id: expected id, question, context and"),
    ("e.jsonl", lines(ROWS[0], 3), "e.jsonl, line 2: 'int' object is not subscriptable, a int: expected id, quest"),
    ("e.jsonl", lines(flat("a") | {"answers": {"text": ["x"], "answer_start": []}}), "e.jsonl, line 1: zip() argum"),
    ("e.json", b"\xff", "e.json, line 1: not UTF-8"),
    ("e.json.gz", b"{}", "e.json.gz cannot be read: Not a gzipped file"),
    ("e.txt", b"{}", "e.txt has a suffix that says no format: give .json as SQuAD's, .jsonl or .parquet"),
]


@pytest.mark.parametrize(("name", "data", "message"), ERRORS)
def test_errors_name_the_file(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=f"^{re.escape(str(tmp_path / message))}"):
        questions(tmp_path / name)


def test_a_context_that_is_no_text_is_an_error(tmp_path: Path) -> None:
    path = squad(tmp_path / "set.json", qa("a"), context=None)
    with pytest.raises(DataError, match=rf"^question a in {path}: context is None, not a string: fix or drop it"):
        questions(path)
