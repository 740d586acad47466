"""Questions on a context: SQuAD's JSON, and rows of JSON lines, Parquet and hub data sets."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ted_ds.config.data_section import HubDataset
from ted_ds.data.bad_rows import BadRow, BadRows
from ted_ds.data.records import PARQUET, Record, hub_records, iter_records, usable
from ted_ds.data.text_files import JSON_SUFFIXES, TwiceNamed, file_kind, no_format, text_file
from ted_ds.errors import DataError

NEAR = 2
"""Characters by which `answer_start` may be off: some tools that wrote such files were."""


@dataclass(frozen=True)
class Question:
    """A question with its gold answers: (text, character of the context at which it starts), none if `impossible`."""

    id: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]
    impossible: bool
    where: str


def iter_questions(
    entries: Sequence[str | HubDataset], *, impossible: bool, bad: BadRows | None = None
) -> Iterator[Question]:
    """The questions of all entries in order.

    A `.json` file is SQuAD's (1.1 or 2.0); JSON lines and Parquet files have the columns of the hub's data
    sets: id, question, context, answers {text, answer_start}. Compressed files are read as such. Answers may be
    lists of both, one of each, or a list of {text, answer_start}; null, an empty list and "" at -1 are none.
    impossible: whether a question may have no answer.
    bad: gets the questions that cannot be used; None: the first of them is raised.
    Raises DataError naming the question and file of an answer that is not in its context, and of unreadable files.
    """
    yield from usable(
        entries,
        lambda path: _answered(_file_questions(path), impossible),
        lambda where, rows: _answered(_flat(hub_records(where, rows, (), None)), impossible),
        "questions",
        bad,
    )


def _answered(questions: Iterator[Question | BadRow], impossible: bool) -> Iterator[Question | BadRow]:
    """The questions; without `impossible`, a bad row in place of each that has no answer."""
    for question in questions:
        if isinstance(question, Question) and question.impossible and not impossible:
            yield BadRow(f"{question.where} has no answer, and this task needs one", "choose task: squad_v2")
        else:
            yield question


def _file_questions(path: Path) -> Iterator[Question | BadRow]:
    kind = file_kind(path)
    if kind == ".json":
        with text_file(path) as file:
            text = "".join(line for _, line in file.lines())
            yield from _nested(file.json(text) if text.strip() else {"data": []}, path)
    elif kind == PARQUET or kind in JSON_SUFFIXES:
        yield from _flat(iter_records(path, ("id", "question", "context", "answers", "is_impossible"), None))
    else:
        no_format(path, ".json as SQuAD's, .jsonl or .parquet")


def _nested(content: Any, path: Path) -> Iterator[Question | BadRow]:
    """The questions of SQuAD's own JSON."""
    articles = content.get("data") if isinstance(content, dict) else None
    if not isinstance(articles, list):
        raise DataError(
            f"{path} is not of SQuAD's form, data[].paragraphs[].qas[] (no list 'data'): name JSON lines .jsonl"
        )
    for number, article in enumerate(articles, 1):
        where = f"article {number} in {path}"
        for place, paragraph in enumerate(_listed(article, "paragraphs", where), 1):
            inner = f"paragraph {place} of {where}"
            for index, qa in enumerate(_listed(paragraph, "qas", inner), 1):
                yield _read(qa, paragraph, f"question {index} of {inner}", str(path))


def _listed(parent: Any, key: str, where: str) -> list[Any]:
    """The list in `parent`, or what is wrong with it in its place."""
    if isinstance(parent, BadRow):
        return [parent]
    try:
        _refuse_twice(parent, (key,), where)
    except BadRow as error:
        return [error]
    found = parent.get(key) if isinstance(parent, dict) else None
    return found if isinstance(found, list) else [BadRow(f"{where}: no list {key!r}")]


def _flat(records: Iterator[Record]) -> Iterator[Question | BadRow]:
    """The questions of records with the hub's columns."""
    return (_read(row, row, where, where) for where, row, _ in records)


def _read(qa: Any, paragraph: Any, place: str, source: str) -> Question | BadRow:
    """One question. place: what it is called without an id; with one, it is question ID in `source`."""
    try:
        if isinstance(qa, BadRow):
            raise qa
        if not isinstance(qa, Mapping):
            raise BadRow(f"{place}: not an object with columns")
        where = place if qa.get("id") is None else f"question {qa['id']} in {source}"
        return _question(qa, paragraph, where)
    except BadRow as error:
        return error


def _question(qa: Mapping[str, Any], paragraph: Mapping[str, Any], where: str) -> Question:
    _refuse_twice(qa, ("id", "question", "answers", "is_impossible"), where)
    _refuse_twice(paragraph, ("context",), where)
    # 2.0 may give an impossible question answers that only seem to be some
    impossible = _truth(qa.get("is_impossible"), where)
    needed = (("id", qa), ("question", qa), ("context", paragraph), *(() if impossible else (("answers", qa),)))
    for name, there in needed:
        if name not in there:
            raise BadRow(
                f"{where}: no {name!r}, only {', '.join(map(str, there))}: expected id, question, context and "
                "answers {text, answer_start}"
            )
    for name, there in needed[1:3]:
        if not isinstance(there[name], str):
            raise BadRow(f"{where}: {name} is {there[name]!r:.40}, not a string")
    if qa["id"] is None:
        raise BadRow(f"{where}: its id is null")
    answers = [] if impossible else _answers(qa["answers"], where)
    placed = tuple(_placed(text, start, paragraph["context"], where) for text, start in answers)
    return Question(str(qa["id"]), qa["question"], paragraph["context"], placed, not placed, where)


def _refuse_twice(there: Any, names: Sequence[str], where: str) -> None:
    """Raises BadRow for one of `names` that a JSON object has twice."""
    if isinstance(there, TwiceNamed) and (twice := [name for name in names if there.names.count(name) > 1]):
        raise BadRow(f"{where}: {twice[0]!r} stands there {there.names.count(twice[0])} times")


def _truth(value: Any, where: str) -> bool:
    """A boolean, also as a string or a number, as converters write it."""
    known = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    known |= dict.fromkeys(("", "none", "null", "nan"), False)  # an empty cell
    text = str(value).strip().lower()
    if text not in known:
        raise BadRow(f"{where}: is_impossible is {value!r:.40}, not true or false")
    return known[text]


def _answers(value: Any, where: str) -> list[tuple[Any, Any]]:
    """(text, start) of each answer as it is written; null, and no text at no place, are none."""
    found: list[tuple[Any, Any]] = []
    for part in [] if value is None else value if isinstance(value, list) else [value]:
        if not isinstance(part, Mapping) or not {"text", "answer_start"} <= part.keys():
            raise BadRow(f"{where}: answers are {value!r:.60}, not {{text, answer_start}}")
        _refuse_twice(part, ("text", "answer_start"), where)
        texts, starts = (
            column if isinstance(column := part[name], list) else [column] for name in ("text", "answer_start")
        )
        if len(texts) != len(starts):
            raise BadRow(f"{where}: {len(texts)} texts of answers, {len(starts)} places")
        found += zip(texts, starts, strict=True)
    return [(text, start) for text, start in found if text not in (None, "") or not _nowhere(start)]


def _nowhere(start: Any) -> bool:
    """Whether a start is what converters write if there is no answer."""
    return start is None or start != start or ((place := _whole(start)) is not None and place <= 0)


def _whole(value: Any) -> int | None:
    """A whole number, also as a float or a string (a column with an empty cell becomes one of floats)."""
    if isinstance(value, str) and re.fullmatch(r"\s*-?[0-9]+(\.0*)?\s*", value):
        value = float(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _placed(text: Any, written: Any, context: str, where: str) -> tuple[str, int]:
    """The answer without white space around it, at its true place, which may be `NEAR` the one that the file says."""
    start = _whole(written)
    if not isinstance(text, str) or start is None:
        raise BadRow(f"{where}: the answer is {text!r:.40} at {written!r:.40}, not a string at a number")
    bare = text.strip()
    for at in (start + len(text) - len(text.lstrip()), start):
        for shift in sorted(range(-NEAR, NEAR + 1), key=abs):
            if bare and at + shift >= 0 and context.startswith(bare, at + shift):
                return bare, at + shift
    there = context[max(0, start) :][: len(text)]
    raise BadRow(f"{where}: the answer {text!r:.60} is not at {start} of its context, which has {there!r:.60} there")
