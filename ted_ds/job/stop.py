"""Ending a run early, by a signal or by the clock: all ranks agree on the step after which they save and leave."""

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
"""In a request's place for a signal: `train.max_minutes` are over (signal 1, SIGHUP, is none of SIGNALS)."""

SAME_S = 1.0
"""Signals within this many seconds of the first are the same request: a launcher and SLURM may each send it on."""

FOLLOW_S = 0.5


class StopRequest:
    """A request to end the run, as this rank has it.

    While a loop of steps runs (`postponed`) it is kept until the ranks agree; at any other time, when there is
    nothing to save, a signal raises Stopped where the program is. A second one ends the process at once.
    """

    def __init__(self, max_minutes: float | None = None) -> None:
        self._deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._signal = 0
        self._since = 0.0
        self._postponed = self._listens = False

    def listen(self) -> None:
        """From here on signals are requests, and so is the launcher's end; in the main thread."""
        self._listens = True
        for number in SIGNALS:
            signal.signal(number, self._receive)
        if launchers := _launchers():
            threading.Thread(target=self._follow, args=(launchers,), name="launcher's watch", daemon=True).start()

    @contextmanager
    def postponed(self) -> Iterator[None]:
        """A signal is a request that waits for `Agreement.reached`."""
        self._postponed = True
        try:
            yield
        finally:
            self._postponed = False

    def leave(self) -> None:
        """The process is ending, and says why: a launcher that ends its other ranks does not change that.

        Nor does SLURM's warning: a handler of Python's would be gone before the interpreter is, and kill it.
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
        """Asks this process to end once a launcher is gone, unless it was asked before."""
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
            # not by print: the signal may have come while this thread was printing
            os.write(2, f"ted_ds: {name}: the run saves and ends after this step\n".encode())
        elif now - self._since > SAME_S:
            os.write(2, f"ted_ds: {name} again: the run ends at once; the last checkpoint is whole\n".encode())
            os._exit(128 + number)


def _launchers() -> list[psutil.Process]:
    """The processes of deepspeed's or torch's launcher that this rank hangs from: one that dies leaves it running.

    deepspeed is two, of which the outer one, that a user knows, dies by SIGTERM and tells nobody (0.19.8, runner.py).
    """
    above = psutil.Process().parents()[:2]
    try:
        command = " ".join(above[0].cmdline()) if above else ""
    except psutil.Error:  # another user's: no launcher
        return []
    if "deepspeed.launcher.launch" in command:
        return above
    return above[:1] if "torchrun" in command or "torch.distributed.run" in command else []


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Agreement:
    """All ranks leave after the same step: each step's requests are exchanged while the next one runs.

    On the host, over `group`: no rank's GPU is waited for, and where a rank is gone this is where the others notice.
    group: None where there is one rank alone.
    """

    def __init__(self, request: StopRequest, group: torch.distributed.ProcessGroup | None) -> None:
        self._request, self._group = request, group
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._work: torch.distributed.Work | None = None

    def reached(self) -> str | None:
        """Why all ranks end here, the same on each; None: they go on. Once a step; a collective."""
        if self._group is None:
            return _reason(self._request.code)
        code = self._exchanged()
        if code == 0:
            self._flag = torch.tensor([self._request.code], dtype=torch.int32)
            op = torch.distributed.ReduceOp.MAX
            self._work = torch.distributed.all_reduce(self._flag, op=op, group=self._group, async_op=True)
        return _reason(code)

    def now(self) -> str | None:
        """The same without waiting for a step: after an evaluation, which takes minutes. A collective."""
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
