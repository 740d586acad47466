"""Measures the time of a step's phases, which may nest and do not overlap, without synchronising with the device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch

PHASES = ("data", "student_forward", "teacher_forward", "loss", "backward", "step")
"""data: rows, counts and copies of micro-batches, always host time (on CUDA the device may still work meanwhile).
student_forward: the engine's forward without the phases inside it. teacher_forward: of the frozen model, also in
Stage I. loss: CE, KL and layer losses, with the gradients that their forward computes. step: the optimizer."""


class Timeline:
    """Milliseconds of each phase since the last `read`.

    A phase inside another one pauses it, so no time counts twice. On CUDA a phase begins and ends by events on the
    current stream: its time is that in which its kernels were next, with the delays of the host.
    """

    def __init__(self, device: torch.device) -> None:
        self._host = _Clock(_HostEvent)
        on_cuda = device.type == "cuda"
        self._device = _Clock(partial(torch.cuda.Event, enable_timing=True)) if on_cuda else self._host

    def phase(self, name: str) -> AbstractContextManager[None]:
        """The context of a phase, one of `PHASES`."""
        return (self._host if name == "data" else self._device).phase(name)

    def read(self) -> dict[str, float]:
        """The milliseconds of every phase by name; resets them. Outside of phases. On CUDA it waits for the device."""
        totals = self._device.read()
        return totals if self._host is self._device else totals | {"data": self._host.read()["data"]}


class _HostEvent:
    """`torch.cuda.Event`, by the host's clock."""

    def record(self) -> None:
        self._seconds = time.perf_counter()

    def elapsed_time(self, end: _HostEvent) -> float:
        return 1000 * (end._seconds - self._seconds)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class _Clock:
    """Phases between events, each of which is read after the device has passed it.

    Passed events are used again, so there are only as many as the host runs ahead of the device. An event costs the
    host some microseconds.
    """

    def __init__(self, make_event: Callable[[], Any]) -> None:
        self._make_event = make_event
        self._open: list[str] = []
        self._totals = dict.fromkeys(PHASES, 0.0)
        self._marks: deque[tuple[str | None, Any]] = deque()  # events, each with the phase that ends there
        self._free: list[Any] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """See `Timeline`."""
        if not self._open:
            self._settle()
        self._mark()
        self._open.append(name)
        try:
            yield
        finally:
            self._mark()
            self._open.pop()

    def read(self) -> dict[str, float]:
        """See `Timeline`."""
        if self._marks:
            self._marks[-1][1].synchronize()
        self._settle()
        totals, self._totals = self._totals, dict.fromkeys(PHASES, 0.0)
        return totals

    def _mark(self) -> None:
        """The time since the last mark belongs to the innermost open phase."""
        event = self._free.pop() if self._free else self._make_event()
        event.record()
        self._marks.append((self._open[-1] if self._open else None, event))

    def _settle(self) -> None:
        """Adds up the times between marks that the device has passed; never waits."""
        while len(self._marks) > 1 and self._marks[1][1].query():
            _, begin = self._marks.popleft()
            name, end = self._marks[0]
            if name is not None:
                self._totals[name] += begin.elapsed_time(end)
            self._free.append(begin)


_current: Timeline | None = None


@contextmanager
def recording(timeline: Timeline) -> Iterator[None]:
    """The context in which all calls of `phase` write to `timeline`."""
    global _current
    before, _current = _current, timeline
    try:
        yield
    finally:
        _current = before


def phase(name: str) -> AbstractContextManager[None]:
    """The context of a phase of the timeline that is recording; without one, it does nothing."""
    return nullcontext() if _current is None else _current.phase(name)
