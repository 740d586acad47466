"""Labelled rows, and questions on contexts -> token ids, with a manifest that later runs check."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ted_ds.config.tasks import KINDS, TaskSpec
from ted_ds.data.bad_rows import BadRow, BadRows
from ted_ds.data.encoded import QUESTIONS, ROWS, EncodedRows, Manifest
from ted_ds.data.manifests import Entries, check_prepared, entry_names, file_sizes, write_manifest
from ted_ds.data.squad import Question, iter_questions
from ted_ds.data.tables import iter_examples
from ted_ds.data.tokenizers import Tokenizer
from ted_ds.job.files import missing, new_folder

logger = logging.getLogger("ted_ds")

GROUP = 4096
"""Examples that are tokenized, and written as a record batch, at a time."""

Columns = dict[str, Any]

Group = tuple[Columns, int, int]
"""(columns, examples, those of them that were cut; see `Manifest`)."""


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
    windows = KINDS[spec.kind].windows
    asked: dict[str, Any] = {
        "task": spec.name,
        "columns": spec.columns,
        "labels": spec.labels,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "max_length": max_length,
        "stride": stride if windows else 0,
        "entries": entry_names(entries),
        "training": training,
    }
    with missing(folder) as absent:
        if absent:
            with new_folder(folder) as new:
                _write_folder(new, entries, spec, tokenizer, asked, skip_bad_rows=skip_bad_rows)
    rows = EncodedRows(folder)
    check_prepared(folder, rows.manifest, asked, entries, skip_bad_rows=skip_bad_rows)
    return rows


def _write_folder(
    folder: Path,
    entries: Entries,
    spec: TaskSpec,
    tokenizer: Tokenizer,
    asked: dict[str, Any],
    *,
    skip_bad_rows: bool | None,
) -> None:
    length, stride, training = (asked[name] for name in ("max_length", "stride", "training"))
    windows = KINDS[spec.kind].windows
    with BadRows(skip=skip_bad_rows) as bad:
        groups = (
            _window_groups(entries, spec, tokenizer, folder / QUESTIONS, length, stride, training, bad)
            if windows
            else _text_groups(entries, spec, tokenizer, length, bad)
        )
        counts = _write(folder / ROWS, groups)
        if not counts["rows"] and not bad.refused:  # data without any row is an error of its reader
            raise bad.nothing_left()
        if counts["cut"]:
            what = "answers are whole in no window" if windows else "rows were cut"
            cut, examples = counts["cut"], counts["examples"]
            logger.info("%s: %d of %d %s at %d tokens", folder.stem, cut, examples, what, length)
        manifest = Manifest(
            **(asked | counts),
            kind=spec.kind,
            tokenizer=tokenizer.name,
            pad_id=tokenizer.pad_id,
            sources=file_sizes(entries),
            left_out=bad.count,
        )
        write_manifest(folder, manifest)


def _write(path: Path, groups: Iterator[Group]) -> Counter[str]:
    """Writes the groups as record batches; returns how many `rows`, `examples` and `cut` ones there are."""
    counts = Counter(rows=0, examples=0, cut=0)
    writer = None
    with pa.OSFile(str(path), "wb") as sink:
        for columns, examples, cut in groups:
            group = pa.record_batch(columns)
            writer = writer or pa.ipc.new_file(sink, group.schema)
            writer.write_batch(group)
            counts.update(rows=group.num_rows, examples=examples, cut=cut)
        if writer is not None:
            writer.close()
    return counts


def _text_groups(
    entries: Entries, spec: TaskSpec, tokenizer: Tokenizer, max_length: int, bad: BadRows
) -> Iterator[Group]:
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
        labels = pa.array([e.label for e, _, _ in kept], pa.float32() if KINDS[spec.kind].numbers else pa.int32())
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
) -> Iterator[Group]:
    """Writes a held-out split's questions, too."""
    done = 0
    questions = iter_questions(entries, impossible=spec.impossible, bad=bad)
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
