"""Phases partition a step's time, by a fake clock and by fake CUDA events."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from ted_ds.telemetry.timeline import PHASES, Timeline, phase, recording

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Clock:
    """The host's time, in seconds; it moves when told, and by `tick` at every look."""

    def __init__(self, tick: float = 0.0) -> None:
        self.now, self.tick = 100.0, tick

    def __call__(self) -> float:
        self.now += self.tick
        return self.now

    def work(self, milliseconds: float) -> None:
        self.now += milliseconds / 1000


class Device:
    """A GPU whose events pass `lag` marks after they were recorded, or once the host waits."""

    def __init__(self, lag: int = 0) -> None:
        self.now, self.lag, self.made, self.recorded, self.waits = 0.0, lag, 0, 0, 0

    def work(self, milliseconds: float) -> None:
        self.now += milliseconds

    def event(self, *, enable_timing: bool) -> Event:
        assert enable_timing
        self.made += 1
        return Event(self)


class Event:
    def __init__(self, device: Device) -> None:
        self.device, self.at, self.number = device, -1.0, -1

    def record(self) -> None:
        self.device.recorded += 1
        self.at, self.number = self.device.now, self.device.recorded

    def query(self) -> bool:
        return self.number + self.device.lag <= self.device.recorded

    def synchronize(self) -> None:
        self.device.waits += 1
        self.device.lag = 0

    def elapsed_time(self, end: Event) -> float:
        assert self.query() and end.query(), "read before the device has passed it"
        return end.at - self.at


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(time, "perf_counter", made)
    return made


def fake_cuda(monkeypatch: pytest.MonkeyPatch, lag: int = 0) -> Device:
    device = Device(lag)
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    return device


def a_step(work: Any, host: Any) -> None:
    """What Stage II does: 2 pairs are reduced in the teacher's forward, the task's losses after it."""
    with phase("data"):
        host.work(3)
    with phase("student_forward"):
        work.work(20)
        with phase("teacher_forward"):
            for _ in range(2):
                work.work(10)
                with phase("loss"):
                    work.work(1)
            work.work(5)
            with phase("loss"):
                work.work(7)
        with phase("loss"):
            work.work(0.5)
    work.work(1000)  # nobody's
    with phase("backward"):
        work.work(40)
    with phase("step"):
        work.work(4)


EXPECTED = {"data": 3, "student_forward": 20, "teacher_forward": 25, "loss": 9.5, "backward": 40, "step": 4}


def test_nested_phases_are_told_apart(clock: Clock) -> None:
    timeline = Timeline(CPU)
    with recording(timeline):
        a_step(clock, clock)
    assert timeline.read() == pytest.approx(EXPECTED)
    assert timeline.read() == dict.fromkeys(PHASES, 0.0)


def test_phases_have_all_of_the_time_between_first_and_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock costs time here, and none of it may be lost between phases that nest."""
    clock = Clock(tick=0.01)
    monkeypatch.setattr(time, "perf_counter", clock)
    timeline = Timeline(CPU)
    with recording(timeline), phase("student_forward"):
        begin = clock.now
        for _ in range(3):
            with phase("teacher_forward"), phase("loss"):
                clock.work(1)
        end = clock()
        clock.now = end - clock.tick
    assert sum(timeline.read().values()) == pytest.approx(1000 * (end - begin))


def test_a_phase_that_an_error_ends_is_over(clock: Clock) -> None:
    timeline = Timeline(CPU)
    with recording(timeline), phase("student_forward"):
        with pytest.raises(KeyError), phase("teacher_forward"):
            clock.work(1)
            raise KeyError
        clock.work(2)
    expected = dict.fromkeys(PHASES, 0.0) | {"teacher_forward": 1, "student_forward": 2}
    assert timeline.read() == pytest.approx(expected)


def test_without_a_timeline_phases_are_nothing(clock: Clock) -> None:
    timeline = Timeline(CPU)
    with recording(timeline):
        pass
    a_step(clock, clock)
    assert not any(timeline.read().values())


@pytest.mark.parametrize("lag", [0, 3, 10**9])
def test_on_cuda_the_device_says_how_long(clock: Clock, monkeypatch: pytest.MonkeyPatch, lag: int) -> None:
    device = fake_cuda(monkeypatch, lag)
    timeline = Timeline(CUDA)
    with recording(timeline):
        for _ in range(4):
            a_step(device, clock)
            assert device.waits == 0
    assert timeline.read() == pytest.approx({name: 4 * value for name, value in EXPECTED.items()})
    assert device.waits == 1
    with recording(timeline):
        a_step(device, clock)
    assert timeline.read() == pytest.approx(EXPECTED)


def test_on_cuda_events_are_used_again(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    device = fake_cuda(monkeypatch, lag=5)
    timeline = Timeline(CUDA)
    made = []
    with recording(timeline):
        for _ in range(50):
            a_step(device, clock)
            made.append(device.made)
    assert made[2] == made[-1] < 40 < device.recorded
    assert timeline.read() == pytest.approx({name: 50 * value for name, value in EXPECTED.items()})


def test_on_cuda_no_phase_open_means_nothing_to_read(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    device = fake_cuda(monkeypatch)
    assert not any(Timeline(CUDA).read().values()) and not device.made
