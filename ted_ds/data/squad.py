"""Questions on a context: SQuAD's JSON, JSON lines, hub data sets."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ted_ds.config.schema import HubDataset
from ted_ds.data.sources import hub_rows, matching_files, opened
from ted_ds.errors import DataError

NEAR = 2
"""Characters by which `answer_start` may be off: some tools that wrote such files were."""


@dataclass(frozen=True)
class Question:
    """A question with its gold answers: (text, character of the context at which it starts)."""

    id: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]
    impossible: bool
    where: str


def iter_questions(entries: Sequence[str | HubDataset], *, impossible: bool) -> Iterator[Question]:
    """The questions of all entries in order.

    Files are SQuAD's JSON (1.1 or 2.0), or JSON lines with the columns of the hub's data sets: id, question,
    context, answers {text, answer_start}. impossible: whether a question may have no answer.
    Raises DataError naming the question and file of an answer that is not in its context, and of unreadable files.
    """
    for entry in entries:
        found = False
        for question in _questions(entry):
            found = True
            if question.impossible and not impossible:
                raise DataError(
                    f"question {question.id} in {question.where} has no answer, and this task needs one: drop it, or "
                    "use task: squad_v2"
                )
            yield question
        if not found:
            name = entry if isinstance(entry, str) else f"data set {entry.hub}"
            raise DataError(f"{name} has no questions: remove it from the recipe's data, or fill it")


def _questions(entry: str | HubDataset) -> Iterator[Question]:
    if isinstance(entry, HubDataset):
        where, rows = hub_rows(entry)
        for row in rows:
            yield _flat(row, where)
        return
    for path in matching_files(entry):
        yield from _file_questions(path)


def _file_questions(path: Path) -> Iterator[Question]:
    try:
        with opened(path) as (plain, _):
            text = plain.read().decode("utf-8-sig")
    except Exception as error:  # each decompressor raises errors of its own
        raise DataError(f"{path} cannot be read: {str(error) or type(error).__name__}") from error
    try:
        first = json.loads(text if text.lstrip().startswith("[") else text.splitlines()[0]) if text.strip() else {}
        lines = isinstance(first, dict) and "context" in first
    except ValueError:
        lines = False  # a JSON file over several lines
    if lines:
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                yield _flat(_parsed(line, f"{path}, line {number}"), f"{path}, line {number}")
        return
    content = _parsed(text, str(path)) if text.strip() else {"data": []}
    try:
        for article in content["data"]:
            for paragraph in article["paragraphs"]:
                for qa in paragraph["qas"]:
                    answers = [(a["text"], a["answer_start"]) for a in qa["answers"]]
                    yield _question(str(qa["id"]), qa["question"], paragraph["context"], answers, str(path))
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is not of SQuAD's form (no {error}): see data[].paragraphs[].qas[]") from error


def _flat(row: Mapping[str, Any], where: str) -> Question:
    try:
        answers = list(zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True))
        return _question(str(row["id"]), row["question"], row["context"], answers, where)
    except (KeyError, TypeError) as error:
        there = ", ".join(row) if isinstance(row, Mapping) else type(row).__name__
        raise DataError(
            f"{where} has no column {error}, only {there}: expected id, question, context, answers"
        ) from error


def _question(id_: str, question: str, context: str, answers: Sequence[tuple[str, int]], where: str) -> Question:
    placed = tuple(_placed(id_, text, start, context, where) for text, start in answers)
    return Question(id_, question, context, placed, not placed, where)


def _placed(id_: str, text: str, start: int, context: str, where: str) -> tuple[str, int]:
    """The answer at its true place, which may be `NEAR` the one that the file says."""
    for shift in sorted(range(-NEAR, NEAR + 1), key=abs):
        if start + shift >= 0 and context.startswith(text, start + shift):
            return text, start + shift
    there = context[start : start + len(text)]
    raise DataError(
        f"question {id_} in {where}: the answer {text!r:.60} is not at {start} of its context, which has {there!r:.60} "
        "there: fix or drop it"
    )


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{where}: not valid JSON ({error}): fix the file") from error
