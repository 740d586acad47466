from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ted_ds.batch import Batch
from ted_ds.errors import TrainingError
from ted_ds.train.loop import run_steps

NAMES = ("loss", "pred_loss")


class Alone:
    """A world of one rank without a process group."""

    rank, size, device = 0, 1, torch.device("cpu")

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values

    min = sum


class Engine:
    """Reports what it is told, step by step, and writes down what happens to it."""

    def __init__(self, losses: list[float], skips: int | None = None) -> None:
        self.losses, self.skips = losses, skips
        self.step_number = self.skipped_steps = 0
        self.events: list[Any] = []

    def __call__(self, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        value = torch.tensor(self.losses[self.step_number])
        return value, torch.stack([value, 2 * value])

    def train(self) -> None:
        self.events.append("train")

    def backward(self, loss: torch.Tensor, scale_wrt_gas: bool) -> None:
        assert not scale_wrt_gas

    def step(self) -> None:
        self.step_number += 1
        self.skipped_steps += self.step_number == self.skips

    def get_lr(self) -> list[float]:
        return [0.1 * (self.step_number + 1)]

    def get_global_grad_norm(self) -> None:
        return None

    def log(self, record: dict[str, Any]) -> None:
        self.events.append(("log", record))

    def advance(self) -> None:
        pass

    def micro_batches(self, step: int) -> list[Batch]:
        ids = torch.zeros(1, 2, dtype=torch.int64)
        return [Batch(ids, ids)]

    def tokens(self, step: int) -> int:
        return 2


def run(engine: Engine, **periods: int) -> dict[str, Any]:
    def evaluate(step: int) -> dict[str, float]:
        engine.events.append(("evaluate", step))
        return {"validation_loss": 1.0}

    return run_steps(
        engine,
        engine,
        Alone(),
        engine,
        names=NAMES,
        start=0,
        steps=len(engine.losses),
        log_every=periods.get("log", 1),
        seed=0,
        evaluate=(periods.get("evaluate", 0), evaluate),
        save=(periods.get("save", 0), lambda step: engine.events.append(("save", step))),
    )


def test_a_step_is_recorded_with_its_evaluation_before_it_is_saved() -> None:
    engine = Engine([3.0, 2.0, 1.0, 0.5])
    last = run(engine, log=10, evaluate=2, save=2)
    kinds = [event if isinstance(event, str) else event[0] for event in engine.events]
    assert kinds == ["train", *("evaluate", "log", "save") * 2]
    assert last["step"] == 4 and last["tokens"] == 8 and last["validation_loss"] == 1.0
    assert (last["loss"], last["pred_loss"], last["lr"]) == pytest.approx((0.5, 1.0, 0.4))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_first_step_that_was_not_finite_is_named_before_anything_is_saved(bad: float) -> None:
    engine = Engine([3.0, bad, 2.0, 1.0])
    with pytest.raises(TrainingError, match="loss, pred_loss not finite at step 2;"):
        run(engine, log=3, save=1 << 20)
    assert engine.events == ["train"]


def test_a_step_that_deepspeed_skipped_is_named_though_losses_are_finite() -> None:
    with pytest.raises(TrainingError, match="gradients not finite at step 2;"):
        run(Engine([3.0, 2.0, 1.0, 0.5], skips=2), log=4)
