"""Measures the time of a step's phases, which may nest and do not overlap, without synchronising with the device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

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
        self._host = HostClock()
        self._device = CudaClock() if device.type == "cuda" else self._host

    def phase(self, name: str) -> AbstractContextManager[None]:
        """The context of a phase, one of `PHASES`."""
        return (self._host if name == "data" else self._device).phase(name)

    def read(self) -> dict[str, float]:
        """The milliseconds of every phase by name, and resets them; outside of phases. On CUDA it waits for the device."""
        totals = self._device.read()
        return totals if self._host is self._device else totals | {"data": self._host.read()["data"]}


class HostClock:
    """Phases by the host's clock."""

    def __init__(self) -> None:
        self._open: list[str] = []
        self._totals = dict.fromkeys(PHASES, 0.0)
        self._since = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """See `Timeline`."""
        self._mark()
        self._open.append(name)
        try:
            yield
        finally:
            self._mark()
            self._open.pop()

    def read(self) -> dict[str, float]:
        """See `Timeline`."""
        totals, self._totals = self._totals, dict.fromkeys(PHASES, 0.0)
        return totals

    def _mark(self) -> None:
        """Gives the time since the last mark to the innermost open phase."""
        now = time.perf_counter()
        if self._open:
            self._totals[self._open[-1]] += 1000 * (now - self._since)
        self._since = now


class CudaClock(HostClock):
    """Phases by CUDA events: a mark is an event, which is read after the device has passed it.

    Passed events are used again, so there are only as many as the host runs ahead of the device. A mark costs the host
    some microseconds.
    """

    def __init__(self) -> None:
        super().__init__()
        self._marks: deque[tuple[str | None, torch.cuda.Event]] = deque()  # the phase that each of them ends
        self._free: list[torch.cuda.Event] = []

    def read(self) -> dict[str, float]:
        """See `Timeline`."""
        if self._marks:
            self._marks[-1][1].synchronize()
        self._settle()
        return super().read()

    def _mark(self) -> None:
        if not self._open:
            self._settle()
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
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
