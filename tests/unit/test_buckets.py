from __future__ import annotations

from itertools import chain
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ted_ds.batch import Batch
from ted_ds.data.buckets import POOL_STEPS, BucketedRows, ScoringRows
from ted_ds.data.loader import row_order
from ted_ds.errors import DataError


class Rows:
    """Rows of `lengths` tokens; every token of a row is the row's number + 1, padding is 0."""

    def __init__(self, lengths: Any, max_length: int = 60) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int32)
        self.manifest = SimpleNamespace(max_length=max_length)

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, rows: np.ndarray, pad_to: int) -> Batch:
        assert self.lengths[rows].max() <= pad_to
        mask = torch.from_numpy(np.arange(pad_to) < self.lengths[rows][:, None])
        return Batch(mask * torch.from_numpy(rows + 1)[:, None], torch.from_numpy(rows), mask.long())


LENGTHS = np.random.default_rng(5).integers(3, 61, 200)


def bucketed(micro: int = 8, rank: int = 0, world: int = 1, lengths: Any = LENGTHS, seed: int = 3) -> Any:
    rows: Any = Rows(lengths)
    return BucketedRows(rows, seed=seed, global_batch_size=8, micro_batch_size=micro, rank=rank, world_size=world)


def numbers(batches: list[Batch]) -> list[int]:
    return [int(row) for batch in batches for row in batch.targets]


@pytest.mark.parametrize("step", [0, 7, 24, 25, 61])
def test_a_step_has_the_same_rows_and_width_however_it_is_split(step: int) -> None:
    (whole,) = bucketed().micro_batches(step)
    order = numbers([whole])
    for micro, world in ((1, 1), (4, 1), (2, 2), (1, 4), (2, 4), (1, 8)):
        for rank in range(world):
            batches = bucketed(micro, rank, world).micro_batches(step)
            assert {batch.input_ids.shape for batch in batches} == {(micro, whole.input_ids.shape[1])}
            starts = [(m * world + rank) * micro for m in range(8 // (micro * world))]
            assert numbers(batches) == [row for start in starts for row in order[start : start + micro]]
            assert all(torch.equal(batch.rows, batch.targets) for batch in batches)


def test_the_width_is_the_longest_row_s_to_a_multiple_of_8_within_the_longest_allowed() -> None:
    rows = bucketed()
    widths = []
    for step in range(50):
        (batch,) = rows.micro_batches(step)
        longest = max(LENGTHS[row] for row in numbers([batch]))
        assert batch.input_ids.shape[1] == rows.width(step) == min(60, 8 * ((longest + 7) // 8))
        assert rows.tokens(step) == batch.attention_mask.sum() == sum(LENGTHS[row] for row in numbers([batch]))
        widths.append(rows.width(step))
    assert {16, 60} <= set(widths)  # rows of up to 60 tokens are not padded to 64


def test_every_epoch_reads_every_row_once() -> None:
    rows = bucketed()  # a pool of 25 steps is an epoch
    steps = [numbers(rows.micro_batches(step)) for step in range(75)]
    epochs = [list(chain(*steps[i : i + 25])) for i in range(0, 75, 25)]
    assert all(sorted(epoch) == list(range(200)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert steps != [numbers(bucketed(seed=4).micro_batches(step)) for step in range(75)]


@pytest.mark.parametrize(("count", "size"), [(21, 8), (2490, 16), (2490, 32), (100, 7), (8, 8)])
def test_after_every_epoch_each_row_was_read_as_often(count: int, size: int) -> None:
    """But for the rows of the next epoch that fill the last step."""
    rows: Any = Rows(np.random.default_rng(1).integers(3, 61, count))
    loader = BucketedRows(rows, seed=3, global_batch_size=size, micro_batch_size=size, rank=0, world_size=1)
    seen, step = np.zeros(count, dtype=int), 0
    for epoch in range(1, 7):
        while step * size < epoch * count:
            np.add.at(seen, loader.step_rows(step), 1)
            step += 1
        assert set(seen) <= {epoch, epoch + 1} and (seen > epoch).sum() == step * size - epoch * count < size


def test_a_pool_is_the_next_rows_by_length_in_steps_that_are_shuffled() -> None:
    lengths = np.random.default_rng(6).integers(3, 61, 8 * (2 * POOL_STEPS - 20))  # two pools an epoch
    pool = POOL_STEPS - 10
    rows = bucketed(lengths=lengths)
    steps = [numbers(rows.micro_batches(step)) for step in range(pool)]
    by_hand = sorted(row_order(len(lengths), 3, 0)[: 8 * pool].tolist(), key=lambda row: (lengths[row] + 7) // 8)
    assert sorted(steps) == sorted(by_hand[i : i + 8] for i in range(0, 8 * pool, 8))
    buckets = [int(lengths[step].max() + 7) // 8 for step in steps]
    assert buckets != sorted(buckets) and buckets != sorted(buckets, reverse=True)


def test_rows_as_long_as_rtes_are_padded_by_less_than_a_tenth() -> None:
    """RTE in BERT's tokens: 2490 rows, geometric mean 61, standard deviation of logs 0.52; batch 32, at most 256."""
    lengths = np.random.default_rng(0).lognormal(np.log(61), 0.52, 2490).clip(12, 256).astype(int)
    rows: Any = Rows(lengths, max_length=256)
    loader = BucketedRows(rows, seed=0, global_batch_size=32, micro_batch_size=32, rank=0, world_size=1)
    assert 1 - sum(map(loader.tokens, range(78))) / sum(32 * loader.width(step) for step in range(78)) < 0.1
    order = row_order(2490, 0, 0)[: 32 * 77].reshape(-1, 32)
    assert 1 - lengths[order].sum() / (32 * lengths[order].max(1)).sum() > 0.5  # random batches, to their longest


def test_steps_may_be_asked_for_in_any_order() -> None:
    rows, again = bucketed(), bucketed()
    forward = [numbers(rows.micro_batches(step)) for step in range(60)]
    assert forward == [numbers(again.micro_batches(step)) for step in reversed(range(60))][::-1]


def test_fewer_rows_than_a_step_are_an_error() -> None:
    assert len(numbers(bucketed(lengths=[5] * 8).micro_batches(3))) == 8
    with pytest.raises(
        DataError, match=r"the training data has 7 rows, a step takes 8: set train\.global_batch_size low"
    ):
        bucketed(lengths=[5] * 7)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 5, 12, 30])
def test_scoring_takes_every_row_once_the_longest_first(count: int, world: int) -> None:
    rows: Any = Rows(LENGTHS[:count])
    turns = []
    for rank in range(world):
        scoring = ScoringRows(rows, batch_size=4, rank=rank, world_size=world)
        mine = list(scoring)
        assert len(mine) == len(scoring) == -(-count // (4 * world))
        turns.append(mine)
    dealt = [batch for turn in zip(*turns, strict=True) for batch in turn]
    found: list[int] = []
    for batch in dealt:
        assert batch.rows is not None and batch.input_ids.shape[0] == 4
        real = batch.rows >= 0
        assert torch.equal(batch.rows[real], batch.targets[real])
        longest = int(rows.lengths[batch.targets.numpy()].max())
        assert batch.input_ids.shape[1] == min(60, -(-longest // 8) * 8)
        found += batch.rows[real].tolist()
    assert sorted(found) == list(range(count))
    assert [rows.lengths[row] for row in found] == sorted(rows.lengths, reverse=True)
