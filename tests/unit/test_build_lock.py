"""Operators are built by one process at a time, and a killed one leaves nothing that others wait for."""

from __future__ import annotations

import multiprocessing as mp
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from torch.utils import cpp_extension

from ted_ds.job.build_lock import BuildLock, build_under_a_lock


def hold(path: str, held: Any) -> None:
    lock = BuildLock(path)
    lock.try_acquire()
    held.set()
    threading.Event().wait()


def test_a_lock_that_a_killed_process_held_is_free(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lock"
    path.touch()  # torch's own, of a start that was killed
    context = mp.get_context("fork")
    held = context.Event()
    holder = context.Process(target=hold, args=(str(path), held), daemon=True)
    holder.start()
    assert held.wait(20)
    lock, mine = BuildLock(str(path)), threading.Event()
    waiter = threading.Thread(target=lambda: lock.try_acquire() and mine.set(), daemon=True)
    waiter.start()
    assert not mine.wait(0.2)
    assert holder.pid is not None
    holder.kill()
    holder.join()
    assert holder.exitcode == -signal.SIGKILL and mine.wait(20)
    assert "another process builds" in capsys.readouterr().err


def test_torch_builds_under_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp_extension, "FileBaton", cpp_extension.FileBaton)
    build_under_a_lock()
    assert cpp_extension.FileBaton is BuildLock
