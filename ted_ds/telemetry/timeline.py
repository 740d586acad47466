"""Where a step's time goes: phases that nest and partition it, without a synchronisation."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

PHASES = ("data", "student_forward", "teacher_forward", "loss", "backward", "step")
"""data: rows, counts and copies of micro-batches, always host time (on CUDA it may overlap what the device still does).
student_forward: the engine's forward but for what is nested in it. teacher_forward: the frozen model's, in Stage I too.
loss: CE, KL and layer losses, the gradients that they compute in the forward included. step: the optimizer."""


class Timeline:
    """Milliseconds of each phase since the last `read`.

    A phase inside another pauses it, so no time is counted twice. On CUDA, events on the current stream are what
    begins and ends a phase: a phase has the time in which its kernels were next, the host's delays included.
    """

    def __init__(self, device: torch.device) -> None:
        self._host = HostClock()
        self._device = CudaClock() if device.type == "cuda" else self._host

    def phase(self, name: str) -> AbstractContextManager[None]:
        """The context of a phase, one of `PHASES`."""
        return (self._host if name == "data" else self._device).phase(name)

    def read(self) -> dict[str, float]:
        """The milliseconds of every phase, by name, then anew; outside of phases. On CUDA it waits for the device."""
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
        """What passed since the last mark belongs to the innermost open phase."""
        now = time.perf_counter()
        if self._open:
            self._totals[self._open[-1]] += 1000 * (now - self._since)
        self._since = now


class CudaClock(HostClock):
    """Phases by CUDA events: a mark is an event, read once the device has passed it.

    Passed events are taken up again, so their number is bounded by how far the host runs ahead of the device. A mark
    costs some microseconds of the host.
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
        """Adds up the times between marks that the device has passed; asks, and never waits."""
        while len(self._marks) > 1 and self._marks[1][1].query():
            _, begin = self._marks.popleft()
            name, end = self._marks[0]
            if name is not None:
                self._totals[name] += begin.elapsed_time(end)
            self._free.append(begin)


_current: Timeline | None = None


@contextmanager
def recording(timeline: Timeline) -> Iterator[None]:
    """The time in which `phase`, wherever it is called, writes to `timeline`."""
    global _current
    before, _current = _current, timeline
    try:
        yield
    finally:
        _current = before


def phase(name: str) -> AbstractContextManager[None]:
    """A phase of the timeline that is recording; nothing where none is."""
    return nullcontext() if _current is None else _current.phase(name)
