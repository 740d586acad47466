"""Which rows a rank reads at a step: a function of (seed, epoch, index), never of the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch

from ted_ds.batch import IGNORED, Batch
from ted_ds.data.packed import PackedBlocks


def row_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of [0, num_rows) in which an epoch reads the rows."""
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


class Rows(Protocol):
    """The training rows of every optimizer step, a function of (seed, step), dealt to ranks and micro-batches."""

    def micro_batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of the 0-based `step`."""
        ...

    def tokens(self, step: int) -> int:
        """Real tokens of a step over all ranks."""
        ...


class EndlessRows:
    """The rows in the order in which training reads them: epoch after epoch, each an order of its own."""

    def __init__(self, num_rows: int, seed: int) -> None:
        self._num_rows, self._seed = num_rows, seed
        self._order: tuple[int, np.ndarray] | None = None

    def at(self, positions: range) -> np.ndarray:
        """[len(positions)] the rows at these positions of the sequence."""
        return np.array([self._row(position) for position in positions])

    def _row(self, position: int) -> int:
        epoch, index = divmod(position, self._num_rows)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, row_order(self._num_rows, self._seed, epoch))
        return int(self._order[1][index])


class TrainingRows:
    """The training rows of every optimizer step, dealt to ranks and micro-batches.

    Step s takes positions [s * G, (s + 1) * G) of the endless sequence of epochs, each an order of its own:
    the same rows for every split. Micro-batch m of rank r holds positions (m * world_size + r) * mb on.
    """

    def __init__(
        self,
        blocks: PackedBlocks,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        self._blocks, self._endless = blocks, EndlessRows(len(blocks), seed)
        self._global, self._micro = global_batch_size, micro_batch_size
        self._rank, self._world = rank, world_size

    def micro_batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of the 0-based `step`.

        A row's last position predicts nothing, and no position predicts what the tokenizer put before a document.
        """
        starts = range(self._rank * self._micro, self._global, self._world * self._micro)
        return [self._batch(step * self._global + start) for start in starts]

    def tokens(self, step: int) -> int:
        """Tokens of a step over all ranks: rows are full."""
        return self._global * self._blocks.manifest.sequence_length

    def _batch(self, position: int) -> Batch:
        rows = self._endless.at(range(position, position + self._micro))
        ids = torch.from_numpy(self._blocks.rows(rows))
        targets = torch.full_like(ids, IGNORED)
        targets[:, :-1] = ids[:, 1:]
        inserted = self._blocks.inserted(rows)
        if inserted is not None:
            targets[:, :-1].masked_fill_(torch.from_numpy(inserted[:, 1:]), IGNORED)
        return Batch(ids, targets, rows=torch.from_numpy(rows))


class EvaluationRows:
    """Held-out rows in order: over all ranks, every token but the stream's first is predicted exactly once.

    A row's last position predicts the next row's first token. What the tokenizer put before documents is not
    predicted. Every rank gets as many batches, the last ones possibly without targets: under ZeRO-3 a forward is a
    collective.
    """

    def __init__(self, blocks: PackedBlocks, *, batch_size: int, rank: int, world_size: int) -> None:
        self._blocks, self._size, self._rank, self._world = blocks, batch_size, rank, world_size

    def __len__(self) -> int:
        """Batches of every rank."""
        return -(-len(self._blocks) // (self._size * self._world))

    def __iter__(self) -> Iterator[Batch]:
        for turn in range(len(self)):
            first = (turn * self._world + self._rank) * self._size
            yield self._batch(np.arange(first, first + self._size))

    def _batch(self, rows: np.ndarray) -> Batch:
        count, last = len(self._blocks), len(self._blocks) - 1
        here, next_ = rows.clip(max=last), (rows + 1).clip(max=last)
        ids = torch.from_numpy(self._blocks.rows(here))
        targets = torch.cat([ids[:, 1:], torch.from_numpy(self._blocks.rows(next_))[:, :1]], dim=1)
        inserted = _of_targets(self._blocks.inserted(here), self._blocks.inserted(next_))
        if inserted is not None:
            targets.masked_fill_(inserted, IGNORED)
        ends = _of_targets(self._blocks.ends(here), self._blocks.ends(next_))
        length = self._blocks.row_length(last)
        for i, row in enumerate(rows):
            if row >= count:
                targets[i] = IGNORED
            elif row == last:
                targets[i, length - 1 :] = IGNORED  # padding follows, which causal attention keeps out of sight
        return Batch(ids, targets, own=None if ends is None else ~ends)


def _of_targets(here: np.ndarray | None, following: np.ndarray | None) -> torch.Tensor | None:
    """Marks [B, S] of the tokens that rows predict, from the marks of the rows and of those that follow."""
    if here is None or following is None:
        return None
    return torch.from_numpy(np.concatenate([here[:, 1:], following[:, :1]], axis=1))
