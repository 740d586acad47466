"""Labelled rows and windows of contexts as token ids, in a memory-mapped Arrow file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from ted_ds.batch import Batch
from ted_ds.data.manifests import open_prepared
from ted_ds.data.squad import Question

ROWS, QUESTIONS = "rows.arrow", "questions.jsonl"

HASHED_ROWS = 4096
"""Rows that are hashed at a time."""


@dataclass(frozen=True)
class Manifest:
    """What encoded rows were made of.

    kind: of the task. examples: rows of the data, or questions, which have a row for each window of their context.
    cut: rows that had more tokens than `max_length`, whose rest is lost, or in training data questions whose answer
    no window holds whole. pad_id: the tokenizer's. left_out: bad rows of the data, of which there is nothing here.
    """

    task: str
    kind: str
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    tokenizer: str
    tokenizer_fingerprint: str
    pad_id: int
    max_length: int
    stride: int
    training: bool
    rows: int
    examples: int
    cut: int
    entries: tuple[str, ...]
    sources: dict[str, int]
    left_out: int = 0


class EncodedRows:
    """The rows of one split, memory-mapped.

    lengths: [rows] int32 tokens of each. targets: [rows] labels int64, values float32, or for questions the
    positions where answers start, int64.
    Raises DataError if the folder is not whole.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.manifest, groups = open_prepared(folder, ROWS, Manifest)
        # zero-copy views of the map: a group's tokens one after another, and where each row of it begins
        self._tokens = [_flat(group, "input_ids") for group in groups]
        self._firsts = np.cumsum([0, *(group.num_rows for group in groups)])
        self.lengths = np.concatenate([np.diff(starts) for _, starts in self._tokens]).astype(np.int32)
        there = [name for name in ("second", "label", "start", "end", "question") if name in groups[0].schema.names]
        columns = {name: np.concatenate([group.column(name).to_numpy() for group in groups]) for name in there}
        targets = columns["label" if "label" in columns else "start"]
        self.targets = targets if targets.dtype == np.float32 else targets.astype(np.int64)
        self._columns = columns
        self._offsets = [_flat(group, "offsets") for group in groups] if "question" in columns else []

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def described(self) -> str:
        """Its size in words."""
        return f"{len(self)} rows, {self.lengths.sum()} tokens"

    def batch(self, rows: np.ndarray, pad_to: int | None = None) -> Batch:
        """The rows [B], padded on the right to `pad_to` tokens (None: to the longest); `Batch.rows` is left out."""
        pad_to = int(self.lengths[rows].max()) if pad_to is None else pad_to
        shape = (len(rows), pad_to)
        ids = np.full(shape, self.manifest.pad_id, dtype=np.int64)
        for i, row in enumerate(rows.tolist()):
            tokens = self._row(self._tokens, row)
            ids[i, : len(tokens)] = tokens
        positions = np.arange(pad_to)
        mask = positions < self.lengths[rows][:, None]
        types = mask & (positions >= self._columns["second"][rows][:, None])
        ends = self._columns.get("end")
        return Batch(
            torch.from_numpy(ids),
            torch.from_numpy(self.targets[rows]),
            torch.from_numpy(mask.astype(np.int64)),
            token_type_ids=torch.from_numpy(types.astype(np.int64)),
            ends=None if ends is None else torch.from_numpy(ends[rows].astype(np.int64)),
        )

    def largest_id(self) -> int:
        """The largest id of all rows, or the padding's: padding is fed to the model too."""
        return max(self.manifest.pad_id, *(int(tokens.max()) for tokens, _ in self._tokens))

    def fingerprint(self) -> str:
        """A hash of all that a teacher's output depends on; names and paths are not part of it.

        That is ids, lengths, where second texts begin, the order of the labels that logits are in, and the padding id,
        by which a decoder that classifies finds the token that it reads.
        """
        digest = hashlib.sha256(f"{self.manifest.kind} {self.manifest.labels} {self.manifest.pad_id}".encode())
        digest.update(self.lengths.tobytes())
        for start in range(0, len(self), HASHED_ROWS):
            batch = self.batch(np.arange(start, min(start + HASHED_ROWS, len(self))))
            assert batch.attention_mask is not None and batch.token_type_ids is not None
            real = batch.attention_mask.bool()
            for tensor in (batch.input_ids, batch.token_type_ids):
                digest.update(tensor[real].int().numpy().tobytes())
        return digest.hexdigest()

    @cached_property
    def questions(self) -> list[Question]:
        """The questions of a held-out split, in order, for scoring."""
        lines = (self._folder / QUESTIONS).read_text(encoding="utf-8").splitlines()
        found = (json.loads(line) for line in lines)
        return [Question(**{**values, "answers": tuple(map(tuple, values["answers"]))}) for values in found]

    def window(self, row: int) -> tuple[int, np.ndarray]:
        """(number of a window's question, the characters [S, 2] int32 of the context that its tokens stand for)."""
        return int(self._columns["question"][row]), self._row(self._offsets, row).reshape(-1, 2)

    def _row(self, column: list[tuple[np.ndarray, np.ndarray]], row: int) -> np.ndarray:
        group = int(np.searchsorted(self._firsts, row, side="right")) - 1
        values, starts = column[group]
        place = row - self._firsts[group]
        return values[starts[place] : starts[place + 1]]


def _flat(group: pa.RecordBatch, name: str) -> tuple[np.ndarray, np.ndarray]:
    column = group.column(name)
    return column.values.to_numpy(), column.offsets.to_numpy()
