from __future__ import annotations

import gzip
import json
import math
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ted_ds.config.data_section import HubDataset
from ted_ds.data.bad_rows import BadRows
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
        DataError, match=rf"^{where[1]} has no answer, and this task needs one: fix or drop the row, or choose task"
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
    (
        "1890",
        YEAR + 3,
        f"the answer '1890' is not at {YEAR + 3} of its context, which has '0.' there: fix or drop the row",
    ),
    (
        "1890",
        YEAR - 3,
        f"the answer '1890' is not at {YEAR - 3} of its context, which has 'in 1' there: fix or drop the row",
    ),
    ("1890", -1, "the answer '1890' is not at -1 of its context, which has "),
    ("Cafes", 0, "the answer 'Cafes' is not at 0 of its context, which has 'Caf\u00e9s' there"),
    (" ", 5, "the answer ' ' is not at 5 of its context"),
    ("1890", "0x18", "the answer is '1890' at '0x18', not a string at a number: fix or drop the row"),
    ("1890", 24.5, "the answer is '1890' at 24.5, not a string at a number: fix or drop the row"),
    ("1890", True, "the answer is '1890' at True, not a string at a number: fix or drop the row"),
    ("1890", None, "the answer is '1890' at None, not a string at a number: fix or drop the row"),
    (1890, YEAR, f"the answer is 1890 at {YEAR}, not a string at a number: fix or drop the row"),
    (None, YEAR, f"the answer is None at {YEAR}, not a string at a number: fix or drop the row"),
    ("", 5, "the answer '' is not at 5 of its context, which has '' there: fix or drop the row"),
    ("IN 1890", YEAR - 3, f"the answer 'IN 1890' is not at {YEAR - 3} of its context, which has 'in 1890' there"),
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
    (
        "e.json",
        b'{"version": 1}',
        "e.json is not of SQuAD's form, data[].paragraphs[].qas[] (no list 'data'): name JSON",
    ),
    ("e.json", b"[1]", "e.json is not of SQuAD's form, data[].paragraphs[].qas[] ("),
    ("e.json", lines(ROWS[0]) * 2, "e.json: not valid JSON (Extra data: line 2 column 1 (char 157)): fix the file, or"),
    ("e.jsonl", lines(ROWS[0]) + b"{", "e.jsonl, line 2: not valid JSON (Expecting"),
    ("e.jsonl", lines(ROWS[0], 3), "e.jsonl, line 2: not an object with columns: fix or drop the row"),
    (
        "e.jsonl",
        lines({"question": "q"}),
        "e.jsonl, line 1: no 'id', only question: expected id, question, context and",
    ),
    ("e.jsonl", lines(flat("a", id=None)), "e.jsonl, line 1: its id is null: fix or drop the row"),
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
    with pytest.raises(DataError, match=rf"^question a in {path}: context is None, not a string: fix or drop the row"):
        questions(path)


FORMS: list[tuple[Any, list[tuple[str, int]]]] = [
    ({"text": ["1890", "in 1890"], "answer_start": [YEAR, YEAR - 3]}, [("1890", YEAR), ("in 1890", YEAR - 3)]),
    ([{"text": "1890", "answer_start": YEAR}], [("1890", YEAR)]),
    ([{"text": "1890", "answer_start": YEAR, "answer_id": 7}] * 2, [("1890", YEAR)] * 2),
    ([{"text": ["1890"], "answer_start": [YEAR]}], [("1890", YEAR)]),
    ({"text": "1890", "answer_start": YEAR}, [("1890", YEAR)]),
    ({"text": "1890", "answer_start": [YEAR]}, [("1890", YEAR)]),
    ({"text": ["1890"], "answer_start": [float(YEAR)]}, [("1890", YEAR)]),
    ({"text": ["1890"], "answer_start": [str(YEAR)]}, [("1890", YEAR)]),
    ({"text": ["1890"], "answer_start": [f"{YEAR}.0"]}, [("1890", YEAR)]),
    (None, []),
    ([], []),
    ({"text": [], "answer_start": []}, []),
    ({"text": None, "answer_start": None}, []),
    ({"text": [None], "answer_start": [None]}, []),
    ({"text": "", "answer_start": -1}, []),
    ({"text": [""], "answer_start": [-1]}, []),
    ({"text": [""], "answer_start": ["-1"]}, []),
    ({"text": [""], "answer_start": [0]}, []),
    ({"text": [""], "answer_start": [float("nan")]}, []),
    ([{"text": "", "answer_start": None}], []),
    ([{"text": "", "answer_start": -1}, {"text": "1890", "answer_start": YEAR}], [("1890", YEAR)]),
]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("answers", "found"), FORMS)
def test_the_forms_of_answers(tmp_path: Path, answers: Any, found: list[tuple[str, int]], nested: bool) -> None:
    path = tmp_path / ("set.json" if nested else "set.jsonl")
    if nested:
        squad(path, qa("a") | {"answers": answers})
    else:
        path.write_bytes(lines(flat("a", answers=answers)))
    (question,) = questions(path)
    assert (question.answers, question.impossible) == (tuple(found), not found)


def test_parquet_s_floats_and_structs(tmp_path: Path) -> None:
    rows = [flat(n, answers=[{"text": "1890", "answer_start": float(YEAR)}]) for n in "ab"]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "set.parquet")
    assert [q.answers for q in questions(tmp_path / "set.parquet")] == [(("1890", YEAR),)] * 2


FORMLESS: list[tuple[Any, str]] = [
    ("1890", "answers are '1890', not {text, answer_start}"),
    ({"text": ["1890"]}, "answers are {'text': ['1890']}, not {text, answer_start}"),
    ([["1890", 3]], "answers are [['1890', 3]], not {text, answer_start}"),
    ({"text": ["1890"], "answer_start": []}, "1 texts of answers, 0 places"),
]


@pytest.mark.parametrize(("answers", "problem"), FORMLESS)
def test_answers_of_no_known_form(tmp_path: Path, answers: Any, problem: str) -> None:
    path = tmp_path / "set.jsonl"
    path.write_bytes(lines(flat("a", answers=answers)))
    with pytest.raises(DataError, match=re.escape(f"question a in {path}, line 1: {problem}: fix or drop the row")):
        questions(path)


@pytest.mark.parametrize(
    ("value", "impossible"),
    [
        *((value, False) for value in (False, "false", "0", 0, 0.0, "", None, "null", math.nan)),
        *((value, True) for value in (True, "true", "TRUE ", "1", 1, 1.0)),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_is_impossible_in_words_and_numbers(tmp_path: Path, value: Any, impossible: bool, nested: bool) -> None:
    answer = ("1890", YEAR)
    path = tmp_path / ("set.json" if nested else "set.jsonl")
    if nested:
        squad(path, qa("a", answer, is_impossible=value))
    else:
        path.write_bytes(lines(flat("a", answer, is_impossible=value)))
    (question,) = questions(path)
    assert (question.answers, question.impossible) == (() if impossible else (answer,), impossible)


@pytest.mark.parametrize("value", ["maybe", 2, [False]])
def test_is_impossible_in_other_words(tmp_path: Path, value: Any) -> None:
    path = squad(tmp_path / "set.json", qa("a", ("1890", YEAR), is_impossible=value))
    with pytest.raises(DataError, match=re.escape(f"{path}: is_impossible is {value!r}, not true or false: fix")):
        questions(path)


def test_all_bad_questions_are_counted(tmp_path: Path) -> None:
    """Of every layer of the file; good ones stay if the bad ones are left out."""
    good, bad = qa("a", ("1890", YEAR)), qa("b", ("1980", YEAR))
    paragraphs = [{"context": CONTEXT, "qas": [good, bad, 3, {"id": "c"}]}, {"context": CONTEXT}, "p"]
    path = tmp_path / "set.json"
    path.write_text(json.dumps({"data": [{"paragraphs": paragraphs}, {}]}))
    (tmp_path / "set.jsonl").write_bytes(lines(flat("d"), 3, flat("e", ("1890", YEAR))) + b"{\n")
    entries = [str(path), str(tmp_path / "set.jsonl")]
    with BadRows(skip=True) as found:
        assert [q.id for q in iter_questions(entries, impossible=False, bad=found)] == ["a", "e"]
    assert found.count == 9
    with pytest.raises(DataError) as error, BadRows(skip=False) as refused:
        assert [q.id for q in iter_questions(entries, impossible=False, bad=refused)] == ["a", "e"]
    assert str(error.value).startswith(
        f"9 rows cannot be used: question b in {path}: the answer '1980' is not at {YEAR} of its context, which has "
        f"'1890' there; question 3 of paragraph 1 of article 1 in {path}: not an object with columns; question c in "
        f"{path}: no 'question', only id: expected id, question, context and answers {{text, answer_start}}; and 6 "
        "more: fix or drop such rows,"
    )


@pytest.mark.parametrize("name", ["paragraphs", "context", "qas", "question", "answers", "text", "answer_start"])
def test_what_stands_twice_is_refused(tmp_path: Path, name: str) -> None:
    path = squad(tmp_path / "set.json", qa("a", ("1890", YEAR)))
    whole = path.read_text()
    assert whole.count(f'"{name}": ') == 1
    path.write_text(whole.replace(f'"{name}": ', f'"{name}": null, "{name}": '))
    with pytest.raises(DataError, match=rf" in {path}: '{name}' stands there 2 times: fix or drop the row$"):
        questions(path)
