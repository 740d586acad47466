"""Outputs of all ranks in the order of the split; counts of a batch."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from ted_ds.batch import IGNORED, Batch, BatchCounts
from ted_ds.evaluation.outputs import collect_outputs


class Together:
    """Ranks as threads: `gather` waits for all of them and concatenates."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=20)
        self.parts: list[Any] = [None] * size


class Rank:
    """The world as one rank of several sees it."""

    device = torch.device("cpu")

    def __init__(self, rank: int, group: Together) -> None:
        self.rank, self.group = rank, group

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        self.group.parts[self.rank] = values
        self.group.barrier.wait()
        whole = torch.cat(self.group.parts)
        self.group.barrier.wait()
        return whole


class Engine:
    """Returns (id, 10 * id) for each row in half precision; nan, which would show, for fillers."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def eval(self) -> None:
        self.events.append("eval")

    def train(self) -> None:
        self.events.append("train")

    def __call__(self, *, batch: Batch) -> torch.Tensor:
        self.events.append("gradients" if torch.is_grad_enabled() else "forward")
        values = torch.where(batch.rows < 0, torch.nan, batch.input_ids[:, 0].double())
        return torch.stack([values, 10 * values], dim=1).half()


def scoring_batch(rows: list[int]) -> Batch:
    """Rows whose first id is 100 + their number."""
    numbers = torch.tensor(rows)
    return Batch(100 + numbers[:, None].expand(-1, 3), torch.zeros(len(rows), dtype=torch.int64), rows=numbers)


def test_rows_of_all_ranks_come_back_in_order_and_fillers_do_not() -> None:
    dealt = [[[3, 0], [6, 2]], [[5, 1], [4, -1]]]
    group, engines = Together(2), [Engine(), Engine()]

    def collect(rank: int) -> np.ndarray:
        batches = [scoring_batch(rows) for rows in dealt[rank]]
        return collect_outputs(engines[rank], batches, 7, Rank(rank, group))  # type: ignore[arg-type]

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(collect, range(2)))
    for outputs in found:
        assert outputs.dtype == np.float32
        assert outputs.tolist() == [[100.0 + i, 1000.0 + 10 * i] for i in range(7)]
    for engine in engines:
        assert engine.events == ["eval", "forward", "forward", "train"]


def test_a_split_of_fillers_but_for_one_row() -> None:
    batches = [scoring_batch([-1, -1]), scoring_batch([-1, 0])]
    found = collect_outputs(Engine(), batches, 1, Rank(0, Together(1)))  # type: ignore[arg-type]
    assert found.tolist() == [[100.0, 1000.0]]


IDS = torch.zeros(3, 4, dtype=torch.int64)
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])


@pytest.mark.parametrize(
    ("batch", "targets", "ends", "tokens"),
    [
        (Batch(IDS, torch.where(MASK == 0, IGNORED, 7)), 7, 0, 12),
        (Batch(IDS, torch.tensor([0, IGNORED, 2]), MASK), 2, 0, 7),
        (Batch(IDS, torch.tensor([0.0, float("nan"), -100.0]), MASK), 2, 0, 7),
        # position 4 is beyond the four of the row, and IGNORED is no position here
        (Batch(IDS, torch.tensor([0, 4, 3]), MASK, ends=torch.tensor([3, 4, 9])), 2, 1, 7),
    ],
)
def test_counts_of_a_batch(batch: Batch, targets: int, ends: int, tokens: int) -> None:
    counts = BatchCounts.of(batch)
    assert counts.values.tolist() == [targets, ends, 3, tokens, 12] and counts.values.dtype == torch.int64
    named = (counts.targets, counts.ends, counts.rows, counts.tokens, counts.positions)
    assert [int(count) for count in named] == counts.values.tolist()


def test_a_batch_moves_whole() -> None:
    batch = Batch(IDS, IDS[:, 0], MASK, ends=IDS[:, 1], rows=IDS[:, 2])
    moved = batch.to(torch.device("meta"))
    assert moved.token_type_ids is None
    assert all(t.is_meta for t in (moved.input_ids, moved.targets, moved.attention_mask, moved.ends, moved.rows))
