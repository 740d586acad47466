"""One job at a time writes into a teacher cache."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from filelock import FileLock

from ted_ds.job.lock import alone
from ted_ds.job.world import World, logger

LOCK, POLL_S = "recording.lock", 1.0


def alone_in(folder: Path, world: World) -> AbstractContextManager[None]:
    """Alone in writing into `folder`, once the job that does is done; a collective."""

    def wait(lock: FileLock) -> None:
        logger.info("teacher cache %s is being written by another job: waiting for it", folder)
        lock.acquire(poll_interval=POLL_S)

    return alone(folder / LOCK, world, wait)
