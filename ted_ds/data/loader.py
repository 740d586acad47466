"""Which rows a rank reads at a step: a function of (seed, epoch, index), never of the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from functools import lru_cache
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch

from ted_ds.batch import IGNORED, Batch
from ted_ds.data.packed import PackedBlocks

Source = TypeVar("Source", bound=Sized)


@lru_cache(maxsize=2)  # a step may go on into the next epoch
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


class DealtRows(Generic[Source]):
    """The training rows of every optimizer step, dealt to ranks and micro-batches; subclasses read them.

    Micro-batch m of rank r holds a step's positions (m * world_size + r) * mb on.
    """

    def __init__(
        self,
        source: Source,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        self._source, self._seed = source, seed
        self._global, self._micro = global_batch_size, micro_batch_size
        self._starts = range(rank * micro_batch_size, global_batch_size, world_size * micro_batch_size)

    def _rows_at(self, positions: range) -> np.ndarray:
        """[len(positions)] the rows at these positions of the endless sequence of epochs, each an order of its own."""
        size = len(self._source)
        return np.array([row_order(size, self._seed, at // size)[at % size] for at in positions])


class TrainingRows(DealtRows[PackedBlocks]):
    """The blocks of every optimizer step.

    Step s takes positions [s * G, (s + 1) * G) of the endless sequence of epochs, each an order of its own:
    the same rows for every split.
    """

    def micro_batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of the 0-based `step`.

        A row's last position predicts nothing, and no position predicts what the tokenizer put before a document.
        """
        return [self._batch(step * self._global + start) for start in self._starts]

    def tokens(self, step: int) -> int:
        """Tokens of a step over all ranks: rows are full."""
        return self._global * self._source.manifest.sequence_length

    def _batch(self, position: int) -> Batch:
        rows = self._rows_at(range(position, position + self._micro))
        ids = torch.from_numpy(self._source.rows(rows))
        targets = torch.full_like(ids, IGNORED)
        targets[:, :-1] = ids[:, 1:]
        inserted = self._source.inserted(rows)
        if inserted is not None:
            targets[:, :-1].masked_fill_(torch.from_numpy(inserted[:, 1:]), IGNORED)
        return Batch(ids, targets, rows=torch.from_numpy(rows))


class HeldOutRows(Generic[Source]):
    """Held-out rows, in as many batches of one size on every rank: under ZeRO-3 a forward is a collective."""

    def __init__(self, source: Source, *, batch_size: int, rank: int, world_size: int) -> None:
        self._source, self._size, self._rank, self._world = source, batch_size, rank, world_size

    def __len__(self) -> int:
        """Batches of every rank."""
        return -(-len(self._source) // (self._size * self._world))

    def __iter__(self) -> Iterator[Batch]:
        for turn in range(len(self)):
            first = (turn * self._world + self._rank) * self._size
            yield self._batch(np.arange(first, first + self._size))

    def _batch(self, places: np.ndarray) -> Batch:
        """The rows at these places, the last ones possibly behind all rows."""
        raise NotImplementedError


class EvaluationRows(HeldOutRows[PackedBlocks]):
    """Held-out rows in order: over all ranks, every token but the stream's first is predicted exactly once.

    A row's last position predicts the next row's first token. What the tokenizer put before documents is not
    predicted. Rows behind the last have no targets.
    """

    def _batch(self, rows: np.ndarray) -> Batch:
        count, last = len(self._source), len(self._source) - 1
        here, next_ = rows.clip(max=last), (rows + 1).clip(max=last)
        ids = torch.from_numpy(self._source.rows(here))
        targets = torch.cat([ids[:, 1:], torch.from_numpy(self._source.rows(next_))[:, :1]], dim=1)
        inserted = _of_targets(self._source.inserted(here), self._source.inserted(next_))
        if inserted is not None:
            targets.masked_fill_(inserted, IGNORED)
        ends = _of_targets(self._source.ends(here), self._source.ends(next_))
        length = self._source.row_length(last)
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
