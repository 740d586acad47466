"""Rows of like length in a step, so that little padding is computed; a function of (seed, step) alone."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from ted_ds.batch import Batch
from ted_ds.data.encoded import EncodedRows
from ted_ds.data.loader import EndlessRows
from ted_ds.errors import DataError

MULTIPLE = 8
"""Rows are padded to a multiple of it: GEMMs of such sizes are faster, and shapes repeat."""

POOL_STEPS = 128
"""Steps whose rows are ordered by length together. More of them leave less padding and less chance."""


class BucketedRows:
    """The training rows of every optimizer step, dealt to ranks and micro-batches.

    Step s takes positions [s * G, (s + 1) * G) of the endless sequence of epochs, each an order of its own. The
    steps that begin in an epoch are cut into pools of at most `POOL_STEPS`; a pool's rows are ordered by length, to
    `MULTIPLE` tokens, otherwise left in their order, and dealt to its steps, which are shuffled. So after the last
    step of an epoch every row has been read once more (and less than G of the next epoch's with it). All of a step
    is padded to its longest row, on every rank: ranks work alike, and nothing depends on the split.
    Micro-batch m of rank r holds the step's rows (m * world_size + r) * mb on.

    Raises DataError if an epoch has fewer rows than a step.
    """

    def __init__(
        self,
        rows: EncodedRows,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        if len(rows) < global_batch_size:
            raise DataError(
                f"the training data has {len(rows)} rows, a step takes {global_batch_size}: set "
                "train.global_batch_size lower, or give more data"
            )
        self._rows, self._seed, self._endless = rows, seed, EndlessRows(len(rows), seed)
        self._global, self._micro = global_batch_size, micro_batch_size
        self._rank, self._world = rank, world_size
        self._pool: tuple[range, np.ndarray] | None = None

    def micro_batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of the 0-based `step`."""
        rows = self.step_rows(step)
        width = self.width(step)
        starts = range(self._rank * self._micro, self._global, self._world * self._micro)
        return [self._batch(rows[start : start + self._micro], width) for start in starts]

    def tokens(self, step: int) -> int:
        """Real tokens of a step over all ranks."""
        return int(self._rows.lengths[self.step_rows(step)].sum())

    def width(self, step: int) -> int:
        """S of a step: its longest row, rounded up, but never over the data's max_length."""
        longest = int(self._rows.lengths[self.step_rows(step)].max())
        return min(-(-longest // MULTIPLE) * MULTIPLE, self._rows.manifest.max_length)

    def step_rows(self, step: int) -> np.ndarray:
        """[G] the numbers of a step's rows."""
        if self._pool is None or step not in self._pool[0]:
            steps = self._pool_of(step)
            self._pool = (steps, self._deal(steps))
        steps, rows = self._pool
        chosen: np.ndarray = rows[step - steps.start]
        return chosen

    def _batch(self, rows: np.ndarray, width: int) -> Batch:
        return replace(self._rows.batch(rows, width), rows=torch.from_numpy(rows))

    def _pool_of(self, step: int) -> range:
        """The steps of the pool that `step` is in: equal parts of an epoch's steps."""
        epoch = step * self._global // len(self._rows)
        first, end = (-(-e * len(self._rows) // self._global) for e in (epoch, epoch + 1))
        pools = -(-(end - first) // POOL_STEPS)
        bounds = [first + (end - first) * i // pools for i in range(pools + 1)]
        number = bisect_right(bounds, step) - 1
        return range(bounds[number], bounds[number + 1])

    def _deal(self, steps: range) -> np.ndarray:
        """[steps, G] the rows of a pool."""
        rows = self._endless.at(range(steps.start * self._global, steps.stop * self._global))
        order = np.argsort(-(-self._rows.lengths[rows] // MULTIPLE), kind="stable")
        dealt = rows[order].reshape(len(steps), self._global)
        return dealt[np.random.default_rng([self._seed, steps.start, 1]).permutation(len(steps))]


class ScoringRows:
    """Held-out rows, each once over all ranks, the longest first: if they fit, all do.

    Every rank gets as many batches of one size, the last ones possibly with fillers (`Batch.rows` -1): under
    ZeRO-3 a forward is a collective.
    """

    def __init__(self, rows: EncodedRows, *, batch_size: int, rank: int, world_size: int) -> None:
        self._rows, self._size, self._rank, self._world = rows, batch_size, rank, world_size
        self._order = np.argsort(-rows.lengths, kind="stable")

    def __len__(self) -> int:
        """Batches of every rank."""
        return -(-len(self._rows) // (self._size * self._world))

    def __iter__(self) -> Iterator[Batch]:
        for turn in range(len(self)):
            first = (turn * self._world + self._rank) * self._size
            places = np.arange(first, first + self._size)
            rows = self._order[places.clip(max=len(self._rows) - 1)]
            longest = int(self._rows.lengths[rows].max())
            batch = self._rows.batch(rows, min(-(-longest // MULTIPLE) * MULTIPLE, self._rows.manifest.max_length))
            yield replace(batch, rows=torch.from_numpy(np.where(places < len(self._rows), rows, -1)))
