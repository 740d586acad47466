"""Questions on a context: SQuAD's JSON, and rows of JSON lines, Parquet and hub data sets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ted_ds.config.schema import HubDataset
from ted_ds.data.files import JSON_SUFFIXES, file_kind, matching_files, no_format, readable, text_file
from ted_ds.data.hub import hub_rows
from ted_ds.data.records import PARQUET, iter_records
from ted_ds.errors import DataError

NEAR = 2
"""Characters by which `answer_start` may be off: some tools that wrote such files were."""

Answers = Sequence[tuple[str, int]]


@dataclass(frozen=True)
class Question:
    """A question with its gold answers: (text, character of the context at which it starts), none if `impossible`."""

    id: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]
    impossible: bool
    where: str


def iter_questions(entries: Sequence[str | HubDataset], *, impossible: bool) -> Iterator[Question]:
    """The questions of all entries in order.

    A `.json` file is SQuAD's (1.1 or 2.0); JSON lines and Parquet files have the columns of the hub's data
    sets: id, question, context, answers {text, answer_start}. Compressed files are read as such.
    impossible: whether a question may have no answer.
    Raises DataError naming the question and file of an answer that is not in its context, and of unreadable files.
    """
    for entry in entries:
        if isinstance(entry, HubDataset):
            where, rows = hub_rows(entry)
            yield from _checked(where, _flat(enumerate(rows, 1), where, "row"), impossible)
            continue
        for path in matching_files(entry):
            yield from _checked(str(path), _file_questions(path), impossible)


def _checked(source: str, questions: Iterator[Question], impossible: bool) -> Iterator[Question]:
    found = False
    with readable(source):
        for question in questions:
            found = True
            if question.impossible and not impossible:
                raise DataError(
                    f"{question.where} has no answer, and this task needs one: drop it, or choose task: squad_v2"
                )
            yield question
    if not found:
        raise DataError(f"{source} has no questions: remove it from the recipe's data, or fill it")


def _file_questions(path: Path) -> Iterator[Question]:
    kind = file_kind(path)
    if kind == ".json":
        with text_file(path) as file:
            text = "".join(line for _, line in file.lines())
            yield from _nested(file.json(text) if text.strip() else {"data": []}, path)
    elif kind == PARQUET or kind in JSON_SUFFIXES:
        records = iter_records(path, ("id", "question", "context", "answers"), None)
        rows = ((record.number, record.values) for record in records)
        yield from _flat(rows, str(path), "row" if kind == PARQUET else "line")
    else:
        no_format(path, ".json as SQuAD's, .jsonl or .parquet")


def _nested(content: Any, path: Path) -> Iterator[Question]:
    """The questions of SQuAD's own JSON."""
    try:
        for article in content["data"]:
            for paragraph in article["paragraphs"]:
                for qa in paragraph["qas"]:
                    # 2.0 may give an impossible question answers that only seem to be some
                    answers = [] if qa.get("is_impossible") else [(a["text"], a["answer_start"]) for a in qa["answers"]]
                    where = f"question {qa['id']} in {path}"
                    yield _question(str(qa["id"]), qa["question"], paragraph["context"], answers, where)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is not of SQuAD's form, data[].paragraphs[].qas[] ({_lacking(error)}): name JSON lines .jsonl"
        ) from error


def _flat(rows: Iterator[tuple[int, Any]], source: str, unit: str) -> Iterator[Question]:
    """The questions of rows with the hub's columns."""
    for number, row in rows:
        try:
            answers = list(zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True))
            where = f"question {row['id']} in {source}, {unit} {number}"
            yield _question(str(row["id"]), row["question"], row["context"], answers, where)
        except (KeyError, TypeError, ValueError) as error:
            there = f"only {', '.join(row)}" if isinstance(row, Mapping) else f"a {type(row).__name__}"
            raise DataError(
                f"{source}, {unit} {number}: {_lacking(error)}, {there}: expected id, question, context and "
                "answers {text, answer_start}"
            ) from error


def _lacking(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error)


def _question(id_: str, question: Any, context: Any, answers: Answers, where: str) -> Question:
    for name, text in (("question", question), ("context", context)):
        if not isinstance(text, str):
            raise DataError(f"{where}: {name} is {text!r:.40}, not a string: fix or drop it")
    placed = tuple(_placed(text, start, context, where) for text, start in answers)
    return Question(id_, question, context, placed, not placed, where)


def _placed(text: Any, start: Any, context: str, where: str) -> tuple[str, int]:
    """The answer without white space around it, at its true place, which may be `NEAR` the one that the file says."""
    if not isinstance(text, str) or not isinstance(start, int):
        raise DataError(
            f"{where}: the answer is {text!r:.40} at {start!r:.40}, not a string at a number: fix or drop it"
        )
    bare = text.strip()
    for at in (start + len(text) - len(text.lstrip()), start):
        for shift in sorted(range(-NEAR, NEAR + 1), key=abs):
            if bare and at + shift >= 0 and context.startswith(bare, at + shift):
                return bare, at + shift
    there = context[max(0, start) :][: len(text)]
    raise DataError(
        f"{where}: the answer {text!r:.60} is not at {start} of its context, which has {there!r:.60} there: fix or "
        "drop it"
    )
