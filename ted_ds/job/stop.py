"""Ends a run early, by a signal or the clock: all ranks agree on the step after which they save and end."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import psutil
import torch

from ted_ds.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""SIGUSR1 is SLURM's usual warning before the time limit, SIGINT a terminal's Ctrl-C."""

CLOCK = 1
"""The code of a request because `train.max_minutes` are over; it is no number of SIGNALS (1 is SIGHUP)."""

SAME_S = 1.0
"""Signals within these seconds after the first are the same request: a launcher and SLURM may both pass it on."""

FOLLOW_S = 0.5


class StopRequest:
    """The request to end the run that this rank has got.

    While a loop of steps runs (`postponed`), it waits until the ranks agree. At other times there is nothing to save:
    a signal raises Stopped at once. A second signal ends the process.
    """

    def __init__(self, max_minutes: float | None = None) -> None:
        self._deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._signal = 0
        self._since = 0.0
        self._postponed = self._listens = False

    def listen(self) -> None:
        """From now on signals are requests, and so is the end of the launcher. To be called in the main thread."""
        self._listens = True
        for number in SIGNALS:
            signal.signal(number, self._receive)
        if launchers := _launchers():
            threading.Thread(target=self._follow, args=(launchers,), name="launcher's watch", daemon=True).start()

    @contextmanager
    def postponed(self) -> Iterator[None]:
        """A context in which a signal waits for `Agreement.reached`."""
        self._postponed = True
        try:
            yield
        finally:
            self._postponed = False

    def leave(self) -> None:
        """Ignores signals from now on: the process is ending, and has an exit code that says why.

        A launcher signals the other ranks when one ends. Python removes its handlers before the interpreter ends, so a
        signal of SLURM at that time would kill it.
        """
        if self._listens:
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)

    @property
    def code(self) -> int:
        """0, the number of the signal, or CLOCK."""
        if self._signal:
            return self._signal
        return CLOCK if self._deadline is not None and time.monotonic() > self._deadline else 0

    def _follow(self, launchers: list[psutil.Process]) -> None:
        """Asks this process to end as soon as a launcher is gone, unless it was asked before."""
        while all(map(_lives, launchers)):
            time.sleep(FOLLOW_S)
        if not self._signal:
            os.kill(os.getpid(), signal.SIGTERM)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if not self._signal:
            self._signal, self._since = number, now
            if not self._postponed:
                raise Stopped(f"{name} outside of the training steps: nothing is lost, the same command goes on")
            # not by print: the signal may have interrupted a print of this thread
            os.write(2, f"ted_ds: {name}: the run saves and ends after this step\n".encode())
        elif now - self._since > SAME_S:
            os.write(2, f"ted_ds: {name} again: the run ends at once; the last checkpoint is whole\n".encode())
            os._exit(128 + number)


def _launchers() -> list[psutil.Process]:
    """The processes of deepspeed's or torch's launcher that started this rank, which does not end when they die.

    deepspeed has two. The outer one, which a user sees, dies by SIGTERM and tells nobody (0.19.8, runner.py).
    """
    above: list[psutil.Process] = psutil.Process().parents()[:2]
    try:
        command = " ".join(above[0].cmdline()) if above else ""
    except psutil.Error:  # a process of another user is no launcher
        return []
    if "deepspeed.launcher.launch" in command:
        return above
    return above[:1] if "torchrun" in command or "torch.distributed.run" in command else []


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class Agreement:
    """Makes all ranks end after the same step: the requests of each step are exchanged while the next step runs.

    group: a gloo group, so that no rank waits for its GPU; None for a single rank. If a rank is gone, the exchange is
    what fails on the others.
    """

    def __init__(self, request: StopRequest, group: torch.distributed.ProcessGroup | None) -> None:
        self._request, self._group = request, group
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._work: torch.distributed.Work | None = None

    def reached(self) -> str | None:
        """Why all ranks end now, the same on each; None: they go on. To be called once a step; a collective."""
        if self._group is None:
            return _reason(self._request.code)
        code = self._exchanged()
        if code == 0:
            self._flag = torch.tensor([self._request.code], dtype=torch.int32)
            op = torch.distributed.ReduceOp.MAX
            self._work = torch.distributed.all_reduce(self._flag, op=op, group=self._group, async_op=True)
        return _reason(code)

    def now(self) -> str | None:
        """The same, but with the requests of this moment: after an evaluation, which takes minutes. A collective."""
        return self.reached() or (_reason(self._exchanged()) if self._group is not None else None)

    def close(self) -> None:
        """Waits for the last exchange; a collective."""
        self._exchanged()

    def _exchanged(self) -> int:
        if self._work is not None:
            self._work.wait()
        return int(self._flag)


def _reason(code: int) -> str | None:
    if code == 0:
        return None
    return "train.max_minutes are over" if code == CLOCK else f"{signal.Signals(code).name} received"
