"""A folder that one job at a time writes into: a lock that dies with its holder, however that went."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ted_ds.job.world import World


@contextmanager
def alone(path: Path, world: World, busy: Callable[[FileLock], None]) -> Iterator[None]:
    """Holds the lock at `path`, among all jobs that see its folder; a collective.

    busy: what rank 0 does where another job holds it: waits for the lock, or raises a TedError, on every rank.
    """
    lock = FileLock(path)

    def acquire() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            busy(lock)

    try:
        world.on_main(acquire)
        yield
    finally:
        lock.release()
