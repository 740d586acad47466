"""One process at a time builds an operator of DeepSpeed, under a lock that dies with its holder."""

from __future__ import annotations

import sys
from typing import Any

from filelock import FileLock, Timeout


class BuildLock:
    """Stands for torch's `FileBaton`, whose file a killed process leaves behind: every later start would wait for ever.

    A process that waited then builds too: it finds all of it built, unless the one before it was killed.
    """

    def __init__(self, lock_file_path: str, **_: Any) -> None:
        self._path = lock_file_path
        self._lock = FileLock(f"{lock_file_path}.held")

    def try_acquire(self) -> bool:
        """Waits until nobody else builds; says so if it has to."""
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            print(
                f"[ted_ds] another process builds an operator of DeepSpeed ({self._path})", file=sys.stderr, flush=True
            )
            self._lock.acquire()
        return True

    def release(self) -> None:
        """Lets the next one build."""
        self._lock.release()


def build_under_a_lock() -> None:
    """From now on torch builds C++ extensions in this process under a `BuildLock`."""
    from torch.utils import cpp_extension

    cpp_extension.FileBaton = BuildLock  # type: ignore[misc, assignment]
