"""Rows of like length in a step, so that little padding is computed; a function of (seed, step) alone."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch

from ted_ds.batch import Batch
from ted_ds.data.encoded import EncodedRows
from ted_ds.data.loader import DealtRows, HeldOutRows
from ted_ds.errors import DataError

MULTIPLE = 8
"""Rows are padded to a multiple of it: GEMMs of such sizes are faster, and shapes repeat."""

POOL_STEPS = 128
"""Steps whose rows are ordered by length together. More of them leave less padding and less chance."""


class BucketedRows(DealtRows[EncodedRows]):
    """The rows of like length of every optimizer step.

    Step s takes positions [s * G, (s + 1) * G) of the endless sequence of epochs, each an order of its own. The
    steps that begin in an epoch are cut into pools of at most `POOL_STEPS`; a pool's rows are ordered by length, to
    `MULTIPLE` tokens, otherwise left in their order, and dealt to its steps, which are shuffled. So after the last
    step of an epoch every row has been read once more (and less than G of the next epoch's with it). All of a step
    is padded to its longest row, on every rank: ranks work alike, and nothing depends on the split.

    Raises DataError if an epoch has fewer rows than a step.
    """

    def __init__(self, source: EncodedRows, **dealing: int) -> None:
        super().__init__(source, **dealing)
        self._pool: tuple[range, np.ndarray] | None = None
        if len(source) < self._global:
            raise DataError(
                f"the training data has {len(source)} rows, a step takes {self._global}: set "
                "train.global_batch_size lower, or give more data"
            )

    def micro_batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of the 0-based `step`."""
        rows, width = self.step_rows(step), self.width(step)
        parts = [rows[start : start + self._micro] for start in self._starts]
        return [replace(self._source.batch(part, width), rows=torch.from_numpy(part)) for part in parts]

    def tokens(self, step: int) -> int:
        """Real tokens of a step over all ranks."""
        return int(self._source.lengths[self.step_rows(step)].sum())

    def width(self, step: int) -> int:
        """S of a step: that of its longest row."""
        return padded_width(self._source, self.step_rows(step))

    def step_rows(self, step: int) -> np.ndarray:
        """[G] the numbers of a step's rows."""
        if self._pool is None or step not in self._pool[0]:
            steps = self._pool_of(step)
            self._pool = (steps, self._deal(steps))
        steps, rows = self._pool
        chosen: np.ndarray = rows[step - steps.start]
        return chosen

    def _pool_of(self, step: int) -> range:
        """The steps of the pool that `step` is in: equal parts of an epoch's steps."""
        epoch = step * self._global // len(self._source)
        first, end = (-(-e * len(self._source) // self._global) for e in (epoch, epoch + 1))
        pools = -(-(end - first) // POOL_STEPS)
        bounds = [first + (end - first) * i // pools for i in range(pools + 1)]
        number = bisect_right(bounds, step) - 1
        return range(bounds[number], bounds[number + 1])

    def _deal(self, steps: range) -> np.ndarray:
        """[steps, G] the rows of a pool."""
        rows = self._rows_at(range(steps.start * self._global, steps.stop * self._global))
        order = np.argsort(-(-self._source.lengths[rows] // MULTIPLE), kind="stable")
        dealt = rows[order].reshape(len(steps), self._global)
        return dealt[np.random.default_rng([self._seed, steps.start, 1]).permutation(len(steps))]


class ScoringRows(HeldOutRows[EncodedRows]):
    """Held-out rows, each once over all ranks, the longest first: if they fit, all do.

    The last batches may have fillers (`Batch.rows` -1).
    """

    @cached_property
    def _order(self) -> np.ndarray:
        return np.argsort(-self._source.lengths, kind="stable")

    def _batch(self, places: np.ndarray) -> Batch:
        rows = self._order[places.clip(max=len(self._source) - 1)]
        batch = self._source.batch(rows, padded_width(self._source, rows))
        return replace(batch, rows=torch.from_numpy(np.where(places < len(self._source), rows, -1)))


def padded_width(source: EncodedRows, rows: np.ndarray) -> int:
    """The longest of the rows, rounded up, but never over the data's max_length."""
    longest = int(source.lengths[rows].max())
    return min(-(-longest // MULTIPLE) * MULTIPLE, source.manifest.max_length)
