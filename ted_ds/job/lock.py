"""A folder that one job at a time writes into: a lock that dies with its holder, however that went."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ted_ds.errors import TedError
from ted_ds.job.world import World, logger

POLL_S = 1.0


@contextmanager
def alone(path: Path, world: World, *, busy: TedError | str) -> Iterator[None]:
    """Holds the lock at `path`, among all jobs that see its folder; a collective.

    busy: if another job holds it, an error is raised on every rank; a text is logged, and the lock is waited for.
    """
    lock = FileLock(path)

    def acquire() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if isinstance(busy, TedError):
                raise busy from None
            logger.info("%s", busy)
            lock.acquire(poll_interval=POLL_S)

    try:
        world.on_main(acquire)
        yield
    finally:
        lock.release()
