"""One job at a time writes into a teacher cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ted_ds.distributed import World, logger

LOCK, POLL_S = "recording.lock", 1.0


@contextmanager
def alone_in(folder: Path, world: World) -> Iterator[None]:
    """Alone in writing into `folder`, among all jobs that see it; a collective. The lock dies with its holder."""
    lock = FileLock(folder / LOCK)

    def acquire() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("teacher cache %s is being written by another job: waiting for it", folder)
            lock.acquire(poll_interval=POLL_S)

    try:
        world.on_main(acquire)
        yield
    finally:
        lock.release()
