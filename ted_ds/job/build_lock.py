"""Lets one process at a time build an operator of DeepSpeed, under a lock that the end of its holder releases."""

from __future__ import annotations

import sys
from typing import Any

from filelock import FileLock, Timeout


class BuildLock:
    """Replaces torch's `FileBaton`: a killed process leaves its file behind, and every later start waits forever.

    A process that waited builds too. It finds everything built, unless the process before it was killed.
    """

    def __init__(self, lock_file_path: str, **_: Any) -> None:
        self._path = lock_file_path
        self._lock = FileLock(f"{lock_file_path}.held")

    def try_acquire(self) -> bool:
        """Waits until no other process builds, and says so."""
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            said = f"[ted_ds] another process builds an operator of DeepSpeed ({self._path})"
            print(said, file=sys.stderr, flush=True)
            self._lock.acquire()
        return True

    def release(self) -> None:
        """Lets the next process build."""
        self._lock.release()


def build_under_a_lock() -> None:
    """Makes torch build C++ extensions in this process under a `BuildLock`."""
    from torch.utils import cpp_extension

    cpp_extension.FileBaton = BuildLock  # type: ignore[misc, assignment]
