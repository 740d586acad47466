"""Labelled rows, and questions on contexts -> token ids, with a manifest that later runs check."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ted_ds.config.tasks import TaskSpec
from ted_ds.data.bad_rows import BadRow, BadRows
from ted_ds.data.encoded import QUESTIONS, ROWS, EncodedRows, Manifest
from ted_ds.data.manifests import MANIFEST, Entries, entry_names, file_sizes, refuse_differences, refuse_left_out
from ted_ds.data.squad import Question, iter_questions
from ted_ds.data.tables import iter_examples
from ted_ds.data.tokenizers import Tokenizer

logger = logging.getLogger("ted_ds")

GROUP = 4096
"""Examples that are tokenized, and written as a record batch, at a time."""

Columns = dict[str, Any]


def ensure_encoded(
    entries: Entries,
    spec: TaskSpec,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    max_length: int,
    stride: int,
    training: bool,
    skip_bad_rows: bool | None = False,
) -> EncodedRows:
    """The encoded rows in `folder`, made now if it does not exist; on one rank.

    training: the split is trained on; a held-out one keeps what scoring needs of its questions.
    skip_bad_rows: see `BadRows`; those that have no label are bad too.
    Raises DataError if the data is missing, unreadable or unlabelled, and if the folder was made otherwise.
    """
    if not folder.exists():
        _encode(entries, spec, tokenizer, folder, max_length, stride, training, skip_bad_rows)
    rows = EncodedRows(folder)
    made = rows.manifest
    refuse_left_out(folder, made.left_out, skip_bad_rows)
    question_answering = spec.kind == "question-answering"
    columns = () if question_answering else (*spec.text_columns, spec.label_column)
    sizes = file_sizes(entries) if made.entries == entry_names(entries) else {}
    wanted: list[tuple[str, object, object]] = [
        ("task", made.task, spec.name),
        ("columns", list(made.columns), list(columns)),
        ("data.labels", list(made.labels), list(spec.labels)),
        ("tokenizer", made.tokenizer_fingerprint, tokenizer.fingerprint),
        ("data.sequence_length", made.max_length, max_length),
        ("data.doc_stride", made.stride, stride if question_answering else 0),
        ("data entries", list(made.entries), list(entry_names(entries))),
        ("sizes of data files", made.sources, sizes),
        ("use (training: true or false)", made.training, training),
    ]
    refuse_differences(folder, wanted)
    return rows


def _encode(
    entries: Entries,
    spec: TaskSpec,
    tokenizer: Tokenizer,
    folder: Path,
    max_length: int,
    stride: int,
    training: bool,
    skip_bad_rows: bool | None,
) -> None:
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    question_answering = spec.kind == "question-answering"
    counts = {"rows": 0, "examples": 0, "cut": 0}
    writer = None
    with pa.OSFile(str(temporary / ROWS), "wb") as sink, BadRows(skip=skip_bad_rows) as bad:
        groups = (
            _window_groups(entries, spec, tokenizer, temporary / QUESTIONS, max_length, stride, training, bad)
            if question_answering
            else _text_groups(entries, spec, tokenizer, max_length, bad)
        )
        for columns, examples, cut in groups:
            group = pa.record_batch(columns)
            writer = writer or pa.ipc.new_file(sink, group.schema)
            writer.write_batch(group)
            counts["rows"] += group.num_rows
            counts["examples"] += examples
            counts["cut"] += cut
        if writer is not None:
            writer.close()
        elif not bad.refused:  # data without any row is an error of its reader
            raise bad.nothing_left()
    if counts["cut"]:
        what = "answers are whole in no window" if question_answering else "rows were cut"
        logger.info("%s: %d of %d %s at %d tokens", folder.name, counts["cut"], counts["examples"], what, max_length)
    manifest = Manifest(
        task=spec.name,
        kind=spec.kind,
        columns=() if question_answering else (*spec.text_columns, spec.label_column),
        labels=spec.labels,
        tokenizer=tokenizer.name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        pad_id=tokenizer.pad_id,
        max_length=max_length,
        stride=stride if question_answering else 0,
        training=training,
        entries=entry_names(entries),
        sources=file_sizes(entries),
        left_out=bad.count,
        **counts,
    )
    (temporary / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")
    temporary.rename(folder)


def _text_groups(
    entries: Entries, spec: TaskSpec, tokenizer: Tokenizer, max_length: int, bad: BadRows
) -> Iterator[tuple[Columns, int, int]]:
    """(columns, examples, cut ones) of one group after another."""
    examples = iter_examples(entries, spec, bad)
    while group := list(islice(examples, GROUP)):
        found = tokenizer.encode_texts([example.texts for example in group], max_length)
        kept = []
        for example, ids, second in zip(group, found.ids, found.seconds, strict=True):
            if example.label is None:
                bad.add(BadRow(f"{example.where} has no label: training and scoring need one in every row"))
            elif not ids:
                bad.add(BadRow(f"{example.where} has no text that makes a token"))
            else:
                kept.append((example, ids, second))
        if not kept:
            continue
        # those that fill max_length were cut or just fit; few do, so a second look costs little
        full = [example.texts for example, ids, _ in kept if len(ids) == max_length]
        cut = sum(length > max_length for length in tokenizer.lengths(full))
        labels = pa.array([e.label for e, _, _ in kept], pa.float32() if spec.kind == "regression" else pa.int32())
        yield {**_ids([ids for _, ids, _ in kept], [s for _, _, s in kept]), "label": labels}, len(kept), cut


def _window_groups(
    entries: Entries,
    spec: TaskSpec,
    tokenizer: Tokenizer,
    questions_path: Path,
    max_length: int,
    stride: int,
    training: bool,
    bad: BadRows,
) -> Iterator[tuple[Columns, int, int]]:
    """(columns, questions, those whose answer is in no window) of one group after another.

    Writes a held-out split's questions.
    """
    done = 0
    questions = iter_questions(entries, impossible=spec.name != "squad", bad=bad)
    if not training:
        questions = _of_own_ids(questions, bad)
    with questions_path.open("w", encoding="utf-8") as file:
        while group := list(islice(questions, GROUP // 4)):
            if bad.refused:
                continue
            pairs = [(question.question, question.context) for question in group]
            windows = tokenizer.encode_windows(pairs, max_length, stride)
            spans = [
                _answer_tokens(group[pair], offsets)
                for pair, offsets in zip(windows.pairs, windows.offsets, strict=True)
            ]
            columns = {
                **_ids(windows.encodings.ids, windows.encodings.seconds),
                "start": pa.array([start for start, _ in spans], pa.int32()),
                "end": pa.array([end for _, end in spans], pa.int32()),
            }
            cut = 0
            if training:
                answered = {pair for pair, span in zip(windows.pairs, spans, strict=True) if span != (0, 0)}
                cut = sum(bool(question.answers) and pair not in answered for pair, question in enumerate(group))
            else:
                columns["question"] = pa.array([done + pair for pair in windows.pairs], pa.int32())
                columns["offsets"] = _lists([offsets.reshape(-1) for offsets in windows.offsets])
                file.writelines(json.dumps(asdict(question)) + "\n" for question in group)
            done += len(group)
            yield columns, len(group), cut


def _of_own_ids(questions: Iterator[Question], bad: BadRows) -> Iterator[Question]:
    """Held-out questions without those that stand there twice: answers are scored by id, as in the official script.

    Another question of an id that was there before is a bad row.
    """
    seen: dict[str, int] = {}
    twice = 0
    for question in questions:
        content = hash((question.question, question.context, question.answers))
        if question.id not in seen:
            seen[question.id] = content
            yield question
        elif seen[question.id] == content:
            twice += 1
        else:
            bad.add(BadRow(f"{question.where}: its id was there before", "give every question its own"))
    if twice:
        logger.warning("of questions that stand in the held-out data more than once, %d are left out", twice)


def _answer_tokens(question: Question, offsets: np.ndarray) -> tuple[int, int]:
    """(first, last) token of the first gold answer in a window; (0, 0) if there is none, or not whole in it."""
    context = np.flatnonzero(offsets[:, 0] >= 0)
    if not question.answers or not len(context):
        return 0, 0
    text, start = question.answers[0]
    end = start + len(text)
    starts, ends = offsets[context, 0], offsets[context, 1]
    if start < starts[0] or end > ends[-1]:
        return 0, 0
    # the first token that ends behind the answer's start, and the last that starts before its end: a character may
    # be several tokens (bytes), and a token may begin with a space before the answer
    first = int(np.searchsorted(ends, start, side="right"))
    last = int(np.searchsorted(starts, end, side="left")) - 1
    return int(context[first]), int(context[last])


def _ids(ids: list[list[int]], seconds: list[int]) -> Columns:
    return {
        "input_ids": _lists([np.array(row, dtype=np.int32) for row in ids]),
        "second": pa.array(seconds, pa.int32()),
    }


def _lists(rows: list[np.ndarray]) -> pa.ListArray:
    starts = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(starts), pa.array(np.concatenate(rows).astype(np.int32)))
