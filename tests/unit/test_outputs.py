"""What tasks make of a model's outputs: gathered from all ranks in order, in half precision, without labels."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from ted_ds.batch import IGNORED, Batch, BatchCounts
from ted_ds.evaluation.collect import collect_outputs
from ted_ds.models.filters import FilterPlan
from ted_ds.models.pooler import find_pooler
from ted_ds.tasks.base import DisposableHead, Reading, Task
from ted_ds.tasks.classification import Classification, PoolerHead, Regression
from ted_ds.tasks.question_answering import QuestionAnswering, SpanHead
from tests.project import loss_config


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
        (Batch(IDS, torch.tensor([float("nan"), float("nan"), -100.0]), MASK), 1, 0, 7),
        # position 4 is beyond the four of the row, and IGNORED is no position here
        (Batch(IDS, torch.tensor([0, 4, 3]), MASK, ends=torch.tensor([3, 4, 9])), 2, 1, 7),
    ],
)
def test_counts_of_a_batch(batch: Batch, targets: int, ends: int, tokens: int) -> None:
    counts = BatchCounts.of(batch)
    assert counts.values.tolist() == [targets, ends, 3, tokens, 12] and counts.values.dtype == torch.int64
    named = (counts.targets, counts.ends, counts.rows, counts.tokens, counts.positions)
    assert [int(count) for count in named] == counts.values.tolist()


def test_a_batch_moves_whole_but_for_its_rows_which_the_host_reads() -> None:
    batch = Batch(IDS, IDS[:, 0], MASK, ends=IDS[:, 1], rows=IDS[:, 2])
    moved = batch.to(torch.device("meta"))
    assert moved.token_type_ids is None
    assert all(t.is_meta for t in (moved.input_ids, moved.targets, moved.attention_mask, moved.ends))
    assert moved.rows is batch.rows


TASKS: dict[str, tuple[Task, tuple[int, ...]]] = {
    "classification": (Classification(("a", "b", "c")), (3, 3)),
    "regression": (Regression(lambda y: y), (3, 1)),
    "questions": (QuestionAnswering(), (3, 2, 4)),
}
HEADS: dict[str, DisposableHead] = {
    "classification": PoolerHead(find_pooler(AutoConfig.for_model("bert"), 0.0), 3),
    "regression": PoolerHead(find_pooler(AutoConfig.for_model("bert"), 0.0), 1, regression=True),
    "questions": SpanHead(mask_padding=True),
}
WEIGHTS = loss_config(kl_alpha=0.7, mse_alpha=0.0, temperature=2.5)


def labelled(kind: str, *, nothing: bool = False) -> Batch:
    """Three rows, or the same without a label."""
    if kind == "questions":
        places = torch.tensor([4, 4, 4]) if nothing else torch.tensor([1, 0, 0])
        return Batch(IDS, places, MASK, ends=places.clone())
    if kind == "regression":
        return Batch(IDS, torch.tensor([float("nan")] * 3) if nothing else torch.tensor([1.0, 4.0, 2.5]), MASK)
    return Batch(IDS, torch.tensor([IGNORED] * 3) if nothing else torch.tensor([2, 0, 1]), MASK)


@pytest.mark.parametrize("kind", TASKS)
def test_losses_of_half_precision_outputs_are_computed_in_single(kind: str) -> None:
    task, shape = TASKS[kind]
    batch = labelled(kind)
    torch.manual_seed(0)
    student, teacher = torch.randn(2, *shape).mul(3).bfloat16().unbind()
    half, single = (
        task.losses(Reading(s, None), Reading(t, None), batch, BatchCounts.of(batch), WEIGHTS)
        for s, t in ((student, teacher), (student.float(), teacher.float()))
    )
    assert {term.dtype for term in half} == {torch.float32}
    assert half == single


@pytest.mark.parametrize("kind", HEADS)
def test_stage1_s_losses_of_half_precision_states_are_computed_in_single(kind: str) -> None:
    head, batch = HEADS[kind], labelled(kind)
    torch.manual_seed(0)
    tensors = {name: t.detach().bfloat16() for name, t in head.tensors(FilterPlan((0,), 8, 8).build()[0]).items()}
    states = torch.randn(3, 4 if kind == "questions" else 1, 8).bfloat16()
    loss = head.loss(states, batch.targets, tensors, batch, BatchCounts.of(batch), training=False)
    assert loss.dtype == torch.float32
    assert float(loss) != float(loss.bfloat16())  # no half-precision number that was cast up


@pytest.mark.parametrize("kind", TASKS)
def test_a_batch_without_labels_costs_nothing_and_keeps_its_kl(kind: str) -> None:
    """A global batch of rows without labels (unlabelled data, answers cut off) must not make the loss nan."""
    task, shape = TASKS[kind]
    batch = labelled(kind, nothing=True)
    counts = BatchCounts.of(batch)
    assert int(counts.targets) == int(counts.ends) == 0
    student, teacher = torch.randn(2, *shape).unbind()
    alone = task.losses(Reading(student, None), None, batch, counts, WEIGHTS)
    assert (float(alone.total), float(alone.pred_loss), float(alone.kl_loss)) == (0.0, 0.0, 0.0)
    both = task.losses(Reading(student, None), Reading(teacher, None), batch, counts, WEIGHTS)
    assert float(both.pred_loss) == 0.0 and float(both.kl_loss) > 0
    assert float(both.total) == pytest.approx(0.7 * float(both.kl_loss))
    head = HEADS[kind]
    tensors = {name: t.detach() for name, t in head.tensors(FilterPlan((0,), 8, 8).build()[0]).items()}
    states = torch.randn(3, 4 if kind == "questions" else 1, 8)
    assert float(head.loss(states, batch.targets, tensors, batch, counts, training=True)) == 0.0


def test_no_answer_is_found_in_padding() -> None:
    logits = torch.zeros(3, 2, 4)
    logits[:, :, 3] = 9.0  # padding in two rows
    logits[:, 0, 1], logits[:, 1, 0] = 2.0, 3.0
    candidates = QuestionAnswering().predict(Reading(logits, None), labelled("questions"))
    assert candidates.shape == (3, 81)
    assert candidates[:, 0].tolist() == [3.0, 1.0, 0.0] and candidates[:, 40].tolist() == [3.0, 0.0, 0.0]
    assert candidates[:, 20].tolist() == [9.0, 2.0, 0.0] and candidates[:, 60].tolist() == [9.0, 3.0, 3.0]
    assert candidates[:, -1].tolist() == [3.0, 3.0, 3.0]


def test_stage1_s_head_has_dropout_in_training_alone() -> None:
    head = PoolerHead(find_pooler(AutoConfig.for_model("bert"), 0.5), 3)
    batch = labelled("classification")
    torch.manual_seed(0)
    tensors = {name: t.detach() for name, t in head.tensors(FilterPlan((0,), 8, 8).build()[0]).items()}
    states = torch.randn(3, 1, 8)
    losses = {
        training: {
            float(head.loss(states, batch.targets, tensors, batch, BatchCounts.of(batch), training=training))
            for _ in range(5)
        }
        for training in (True, False)
    }
    assert len(losses[True]) == 5 and len(losses[False]) == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_padding_takes_no_part_in_a_question_s_kl_at_any_temperature(temperature: float) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 1, 2, 4).unbind()
    short, long = (slice(0, 3), slice(0, 4))
    losses = []
    for part in (short, long):
        batch = Batch(IDS[:1, part], torch.tensor([1]), torch.tensor([[1, 1, 1, 0]])[:, part], ends=torch.tensor([2]))
        readings = (Reading(logits[..., part], None) for logits in (student, teacher))
        losses.append(
            QuestionAnswering().losses(
                *readings,
                batch,
                BatchCounts.of(batch),
                loss_config(kl_alpha=1.0, mse_alpha=0.0, temperature=temperature),
            )
        )
    torch.testing.assert_close(losses[1], losses[0])
