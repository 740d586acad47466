from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import pytest
import torch

from ted_ds.batch import Batch
from ted_ds.errors import Stopped, TrainingError
from ted_ds.job.stop import SIGNALS, StopRequest
from ted_ds.pipeline.loop import Hooks, Steps, run_steps
from ted_ds.telemetry.flops import BatchFlops
from ted_ds.telemetry.meters import Meters
from ted_ds.telemetry.nvml import GpuCounters
from tests.alone import Alone

T = TypeVar("T")

NAMES = ("loss", "pred_loss")


class Engine:
    """Reports what it is told, step by step, and writes down what happens to it; skips: steps left out."""

    def __init__(self, losses: list[float], skips: tuple[int, ...] = (), stage: int = 3) -> None:
        self.losses, self.skips, self.stage = losses, skips, stage
        self.step_number = self.skipped_steps = 0
        self.events: list[Any] = []
        self.upstream: list[float] = []

    def __call__(self, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        value = torch.tensor(self.losses[self.step_number])
        return value, torch.stack([value, 2 * value])

    def zero_optimization_stage(self) -> int:
        return self.stage

    def bfloat16_enabled(self) -> bool:
        return False

    def train(self) -> None:
        self.events.append("train")

    def backward(self, loss: torch.Tensor, scale_wrt_gas: bool) -> None:
        assert not scale_wrt_gas
        self.upstream.append(float(loss))

    def step(self) -> None:
        self.step_number += 1
        self.skipped_steps += self.step_number in self.skips

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
        return [Batch(ids, ids, rows=torch.tensor([10 * step, 10 * step + 1]))]

    def tokens(self, step: int) -> int:
        return 2


def last(engine: Engine) -> dict[str, Any]:
    """The last line that was recorded."""
    return [event[1] for event in engine.events if event[0] == "log"][-1]


def run(engine: Engine, world: Any = None, **options: int) -> dict[str, Any]:
    class Events(Hooks):
        def evaluate(self, step: int) -> dict[str, float]:
            engine.events.append(("evaluate", step))
            return {"validation_loss": 1.0}

        def save(self, step: int) -> None:
            engine.events.append(("save", step))

    steps = Steps(0, len(engine.losses), 1)
    steps = replace(steps, **{f"{k}_every" if k != "max_skipped" else k: v for k, v in options.items()})
    run_steps(engine, engine, world or Alone(), engine, steps, Events(), names=NAMES)
    return last(engine)


def test_a_step_is_recorded_with_its_evaluation_before_it_is_saved() -> None:
    engine = Engine([3.0, 2.0, 1.0, 0.5])
    last = run(engine, log=10, evaluate=2, save=2)
    kinds = [event if isinstance(event, str) else event[0] for event in engine.events]
    assert kinds == ["train", *("evaluate", "log", "save") * 2]
    assert last["step"] == 4 and last["tokens"] == 8 and last["validation_loss"] == 1.0
    assert (last["loss"], last["pred_loss"], last["lr"]) == pytest.approx((0.5, 1.0, 0.4))
    assert "skipped_steps" not in last


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_first_step_that_was_not_finite_is_named_before_anything_is_saved(bad: float) -> None:
    engine = Engine([3.0, bad, 2.0, 1.0], skips=(2,))
    named = r"^loss, pred_loss not finite at step 2 on rank 0, training rows 10, 11; train.max_skipped_steps is 0; "
    with pytest.raises(TrainingError, match=named):
        run(engine, log=3, save=1 << 20)
    assert engine.events == ["train"]
    # whatever the loss was, its gradient is nan: what DeepSpeed looks for
    assert [math.isnan(value) for value in engine.upstream] == [False, True, False]


def test_a_step_that_deepspeed_skipped_is_named_though_losses_are_finite() -> None:
    with pytest.raises(TrainingError, match=r"^gradients not finite at step 2, where every loss was;"):
        run(Engine([3.0, 2.0, 1.0, 0.5], skips=(2,)), log=4)


def test_steps_are_left_out_within_a_budget(caplog: pytest.LogCaptureFixture) -> None:
    losses = [3.0, math.nan, 2.0, 1.0, math.inf, 0.5]
    engine = Engine(losses, skips=(2, 3, 5))
    assert run(engine, max_skipped=3)["skipped_steps"] == 3
    said = [record.message for record in caplog.records]
    assert [message.split(" not")[0] for message in said] == ["loss, pred_loss", "gradients", "loss, pred_loss"]
    assert said[0].endswith("rows 10, 11: left out, 1 of train.max_skipped_steps 3")
    with pytest.raises(TrainingError, match=r"at step 5 on rank 0, training rows 40, 41; train.max_skipped_steps is 2"):
        run(Engine(losses, skips=(2, 3, 5)), max_skipped=2)


def test_a_bad_step_that_was_applied_ends_the_run_whatever_the_budget() -> None:
    with pytest.raises(TrainingError, match=r"step 2 on rank 0.*; DeepSpeed has applied it, as it does without"):
        run(Engine([3.0, math.nan, 2.0], stage=0), max_skipped=5)


def test_a_request_ends_the_run_after_its_step_without_a_line_of_its_own() -> None:
    world, engine = Alone(), Engine([3.0, 2.0, 1.0, 0.5])
    advance = engine.advance

    def signalled() -> None:
        advance()
        if engine.step_number == 2:
            os.kill(os.getpid(), signal.SIGUSR1)

    engine.advance = signalled  # type: ignore[method-assign]
    with (
        listening(world.stop),
        pytest.raises(Stopped, match=r"^SIGUSR1 received: saved after step 2 of 4, the same comma"),
    ):
        run(engine, world, log=4, save=3)
    assert engine.events == ["train", ("save", 2)]


def test_the_clock_ends_a_run() -> None:
    world = Alone()
    world.stop = StopRequest(max_minutes=1e-9)
    engine = Engine([3.0, 2.0])
    with pytest.raises(Stopped, match=r"^train.max_minutes are over: saved after step 1 of 2"):
        run(engine, world)


@contextmanager
def listening(stop: StopRequest) -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    stop.listen()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_signal_to_a_program_that_is_leaving_changes_nothing() -> None:
    stop = StopRequest()
    with listening(stop):
        stop.leave()
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.code == 0


def test_a_signal_outside_of_the_steps_ends_the_program_where_it_is() -> None:
    with (
        listening(StopRequest()),
        pytest.raises(Stopped, match=r"^SIGTERM outside of the training steps: nothing is lost"),
    ):
        os.kill(os.getpid(), signal.SIGTERM)


class Timed(Engine):
    """Every part of a step moves the clock, and so do evaluation and saving."""

    now = 100.0

    def __call__(self, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.now += 0.020
        return super().__call__()

    def micro_batches(self, step: int) -> list[Batch]:
        self.now += 0.003
        return super().micro_batches(step)

    def backward(self, loss: torch.Tensor, scale_wrt_gas: bool) -> None:
        self.now += 0.040

    def step(self) -> None:
        self.now += 0.007
        super().step()

    def aside(self, step: int) -> dict[str, float]:
        self.now += 1000.0
        return {}


def test_a_line_says_where_the_time_of_its_steps_went(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two lines, of 2 steps and of 1; what evaluation and saving take is no step's."""
    engine = Timed([3.0, 2.0, 1.0])
    monkeypatch.setattr(time, "perf_counter", lambda: engine.now)
    meters = Meters(Alone(), BatchFlops(lambda length: 1.4e9 * length, torch.bfloat16))
    hooks = Hooks()
    hooks.evaluate = hooks.save = engine.aside  # type: ignore[method-assign]
    run_steps(engine, engine, Alone(), engine, Steps(0, 3, 2, 2, 2), hooks, names=NAMES, meters=meters)
    phases = {"data": 3, "student_forward": 20, "teacher_forward": 0, "loss": 0, "backward": 40, "step": 7}
    records = [event[1] for event in engine.events if event[0] == "log"]
    assert [record["step"] for record in records] == [2, 3]
    for record in records:
        assert record["phase_ms"] == pytest.approx(phases)
        assert record["step_ms"] == pytest.approx(70)
        assert record["tokens_per_second"] == pytest.approx(2 / 0.070)
        assert record["model_tflops"] == pytest.approx(2 * 1.4e9 / 0.070 / 1e12)
        assert record["mfu"] is None and record["peak_memory_gib"] > 0
        assert not [name for name in record if name.startswith(("gpu_", "peak_reserved", "joules"))]


def test_without_a_count_of_flops_there_is_no_mfu() -> None:
    last = run(Engine([3.0]))
    assert last["model_tflops"] is None and last["mfu"] is None


class Two(Alone):
    """The first of two ranks with a GPU each, and what the second has."""

    size, device = 2, torch.device("cuda")

    def __init__(self, reserved: float, counters: list[float]) -> None:
        super().__init__()
        self.reserved, self.counters = reserved, torch.tensor(counters)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        assert values.shape == (2, 4) and not values[1].any()
        return torch.stack([values[0], self.counters.double()])

    def min(self, values: torch.Tensor) -> torch.Tensor:
        return torch.minimum(values, torch.tensor([-1.0, -self.reserved]).double())


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = iter([[40.0, 0.0, 90.0, 5000.0], [41.0, 95.0, 650.0, 5700.0]])
    monkeypatch.setattr(GpuCounters, "__init__", lambda self, device: None)
    monkeypatch.setattr(GpuCounters, "sample", lambda self: next(samples))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 << 30)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 4 << 30)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    ("dtype", "share"),
    [pytest.param(torch.bfloat16, 0.5, id="bfloat16"), pytest.param(torch.float32, None, id="float32")],
)
def test_gpus_of_two_ranks(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, share: float | None) -> None:
    world = Two(reserved=5.0, counters=[60.0, 75.0, 600.0, 300.0])
    now = iter([10.0, 12.0])
    meters = Meters(world, BatchFlops(lambda length: 989.4e12, dtype))
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    with meters.running():
        meters.add_step([Batch(torch.zeros(1, 2), torch.zeros(1, 2))], tokens=4000)
        measured = meters.read()
    assert measured.pop("phase_ms").keys() == {"data", "student_forward", "teacher_forward", "loss", "backward", "step"}
    assert measured == {
        "step_ms": 2000.0,
        "tokens_per_second": 2000.0,
        "model_tflops": pytest.approx(989.4 / 2),
        "mfu": share,
        "peak_memory_gib": 3.0,
        "peak_reserved_gib": 5.0,
        "gpu_memory_gib": 60.0,
        "gpu_utilization_percent": 85.0,
        "gpu_power_w": 1250.0,
        "joules_per_million_tokens": (700 + 300) * 250,
    }
