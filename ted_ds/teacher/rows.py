"""A run's training rows as a teacher sees them: their lengths, batches of any of them, a fingerprint of all."""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Protocol

import numpy as np
import torch

from ted_ds.batch import IGNORED, Batch
from ted_ds.data.encoded import EncodedRows
from ted_ds.data.packed import PackedBlocks

GROUP = 4096
"""Rows that are hashed at a time."""


class TeacherRows(Protocol):
    """What recording asks of training data."""

    @property
    def lengths(self) -> np.ndarray:
        """[rows] real tokens of each."""
        ...

    def batch(self, rows: np.ndarray) -> Batch:
        """These rows [B], padded to their longest."""
        ...

    def fingerprint(self) -> str:
        """A hash of all that a teacher's output depends on: ids, and of labelled rows their second texts and labels.

        It knows no name or path: data that was prepared anew, or moved, is the same data.
        """
        ...


class PackedRows:
    """Blocks of text: every row is full."""

    def __init__(self, blocks: PackedBlocks) -> None:
        self._blocks = blocks

    @cached_property
    def lengths(self) -> np.ndarray:
        """[rows], all of them S."""
        return np.full(len(self._blocks), self._blocks.manifest.sequence_length)

    def batch(self, rows: np.ndarray) -> Batch:
        """Ids [B, S], without targets."""
        ids = torch.from_numpy(self._blocks.rows(rows))
        return Batch(ids, torch.full_like(ids, IGNORED))

    def fingerprint(self) -> str:
        """Of the ids, hashed as they were prepared, and the rows' length."""
        manifest = self._blocks.manifest
        return hashlib.sha256(f"blocks {manifest.sequence_length} {manifest.digest}".encode()).hexdigest()


class ExampleRows:
    """Labelled rows, each as long as it is."""

    def __init__(self, rows: EncodedRows) -> None:
        self._rows = rows

    @property
    def lengths(self) -> np.ndarray:
        """[rows] tokens of each."""
        return self._rows.lengths

    def batch(self, rows: np.ndarray) -> Batch:
        """Ids, mask and token types [B, S] for the longest of the rows."""
        return self._rows.batch(rows, int(self._rows.lengths[rows].max()))

    def fingerprint(self) -> str:
        """Of ids, lengths, where second texts begin, the order of the labels that logits are in, and the padding id.

        By the last a decoder that classifies finds the token that it reads.
        """
        manifest = self._rows.manifest
        digest = hashlib.sha256(f"{manifest.kind} {manifest.labels} {manifest.pad_id}".encode())
        digest.update(self._rows.lengths.tobytes())
        for start in range(0, len(self._rows), GROUP):
            batch = self.batch(np.arange(start, min(start + GROUP, len(self._rows))))
            assert batch.attention_mask is not None and batch.token_type_ids is not None
            real = batch.attention_mask.bool()
            for tensor in (batch.input_ids, batch.token_type_ids):
                digest.update(tensor[real].int().numpy().tobytes())
        return digest.hexdigest()


def teacher_rows(rows: PackedBlocks | EncodedRows) -> TeacherRows:
    """The rows of either kind of data."""
    return PackedRows(rows) if isinstance(rows, PackedBlocks) else ExampleRows(rows)
