from __future__ import annotations

import numpy as np
import pytest
import torch

from ted_ds.batch import IGNORED
from ted_ds.data.loader import EvaluationRows, TrainingRows, row_order


class Blocks:
    """A token stream of `total` ascending ids in rows of `length`, the last one possibly short.

    own, last: ids that the tokenizer put before documents, and that close one; None: that is not known.
    """

    def __init__(self, total: int, length: int, own: set[int] | None = None, last: set[int] | None = None) -> None:
        self.total, self.length, self.own, self.last = total, length, own, last

    def __len__(self) -> int:
        return -(-self.total // self.length)

    def row_length(self, row: int) -> int:
        return min(self.length, self.total - row * self.length)

    def inserted(self, indices: np.ndarray) -> np.ndarray | None:
        return None if self.own is None else np.isin(self.rows(indices), list(self.own))

    def ends(self, indices: np.ndarray) -> np.ndarray | None:
        return None if self.last is None else np.isin(self.rows(indices), list(self.last))

    def rows(self, indices: np.ndarray) -> np.ndarray:
        stream = np.arange(len(self) * self.length)
        return np.where(stream < self.total, stream, 0).reshape(len(self), self.length)[indices]


def rows_of(step: int, *, micro: int, world: int, total: int = 70) -> list[int]:
    seen = []
    for rank in range(world):
        rows = TrainingRows(
            Blocks(total, 7), seed=3, global_batch_size=8, micro_batch_size=micro, rank=rank, world_size=world
        )
        for batch in rows.micro_batches(step):
            seen += (batch.input_ids[:, 0] // 7).tolist()
            assert batch.rows is not None and batch.rows.tolist() == (batch.input_ids[:, 0] // 7).tolist()
    return seen


@pytest.mark.parametrize("step", [0, 1, 5])
def test_a_step_takes_the_same_rows_however_it_is_split(step: int) -> None:
    whole = rows_of(step, micro=8, world=1)
    for micro, world in ((1, 1), (4, 1), (2, 2), (1, 4), (2, 4)):
        assert sorted(rows_of(step, micro=micro, world=world)) == sorted(whole)


def test_every_epoch_reads_every_row_once_in_an_order_of_its_own() -> None:
    seen = [row for step in range(5) for row in rows_of(step, micro=8, world=1)]  # 40 positions, 10 rows
    epochs = [seen[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert epochs[0] == row_order(10, 3, 0).tolist()


def test_fewer_rows_than_a_batch_go_on_into_the_next_epoch() -> None:
    assert len(rows_of(0, micro=8, world=1, total=21)) == 8


def test_training_targets_are_the_next_ids_within_the_row() -> None:
    rows = TrainingRows(Blocks(70, 7), seed=0, global_batch_size=2, micro_batch_size=2, rank=0, world_size=1)
    (batch,) = rows.micro_batches(0)
    assert torch.equal(batch.targets[:, :-1], batch.input_ids[:, 1:])
    assert (batch.targets[:, -1] == IGNORED).all()


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("total", [70, 64, 71, 5])
def test_evaluation_predicts_every_token_but_the_first_exactly_once(total: int, world: int) -> None:
    predicted, batches = [], set()
    for rank in range(world):
        rows = EvaluationRows(Blocks(total, 7), batch_size=2, rank=rank, world_size=world)
        mine = list(rows)
        batches.add(len(mine))
        for batch in mine:
            assert batch.input_ids.shape == (2, 7)
            kept = batch.targets != IGNORED
            assert torch.equal(batch.targets[kept], batch.input_ids[kept] + 1)
            predicted += batch.targets[kept].tolist()
    assert sorted(predicted) == list(range(1, total))
    assert len(batches) == 1


OWN = {0, 7, 13, 14, 15, 40}
"""At the beginning, in the middle and at the end of rows of seven, one after another, and in a row of padding."""


@pytest.mark.parametrize("world", [1, 2])
def test_what_the_tokenizer_put_before_documents_is_no_target(world: int) -> None:
    predicted = []
    for rank in range(world):
        for batch in EvaluationRows(Blocks(64, 7, OWN), batch_size=2, rank=rank, world_size=world):
            kept = batch.targets != IGNORED
            assert torch.equal(batch.targets[kept], batch.input_ids[kept] + 1)
            predicted += batch.targets[kept].tolist()
    assert sorted(predicted) == [i for i in range(1, 64) if i not in OWN]
    assert batch.own is None
    rows = TrainingRows(Blocks(70, 7, OWN), seed=0, global_batch_size=10, micro_batch_size=10, rank=0, world_size=1)
    (batch,) = rows.micro_batches(0)
    for ids, targets in zip(batch.input_ids.tolist(), batch.targets.tolist(), strict=True):
        assert targets == [IGNORED if i in OWN else i for i in ids[1:]] + [IGNORED]


@pytest.mark.parametrize("world", [1, 2])
def test_evaluation_knows_which_targets_close_a_document(world: int) -> None:
    last, closed = {6, 12, 14, 28, 63}, []
    for rank in range(world):
        for batch in EvaluationRows(Blocks(64, 7, None, last), batch_size=2, rank=rank, world_size=world):
            assert batch.own is not None and batch.own.shape == batch.targets.shape
            closed += batch.targets[~batch.own & (batch.targets != IGNORED)].tolist()
    assert set(closed) == last and len(closed) == len(last)
