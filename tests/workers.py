"""Gloo process groups that live as long as the test session: starting one costs seconds, a call does not."""

from __future__ import annotations

import gc
import os
import queue
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch.distributed.elastic.utils.distributed import get_free_port

# CUDA does not survive a fork
CONTEXT: Any = mp.get_context("spawn" if torch.cuda.is_available() else "forkserver")
if not torch.cuda.is_available():
    # what a rank imports takes 5 s of a core: once, in the process that all ranks are forked from
    CONTEXT.set_forkserver_preload(["tests.jobs", "tests.cache_jobs", "deepspeed.runtime.zero.muon.muon_optimizer"])

TIMEOUT_S = 240
AFTER_FAILURE_S = 15
"""How long the other ranks may take once one has failed: they may wait for it in a collective."""


def _serve(rank: int, size: int, port: int, tasks: Any, results: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    from ted_ds.job.world import init_world

    world = init_world(timedelta(seconds=TIMEOUT_S))
    while True:
        # DeepSpeed and ted_ds collect garbage at every engine's start and end: 0.3 s each with all that is imported
        gc.collect()
        gc.freeze()
        call, args = tasks.get()
        try:
            results.put((rank, call(world, *args), None))
        except Exception:
            results.put((rank, None, traceback.format_exc()))


class Workers:
    """`size` ranks; `run(call, *args)` gives `[call(world, *args) of rank 0, 1, ...]`.

    `call` is a module-level function. A rank that raises fails the test with its own traceback; ranks that
    hang are killed, and `alive` is False from then on.
    """

    def __init__(self, size: int) -> None:
        self._port = port = get_free_port()
        self._tasks = [CONTEXT.Queue() for _ in range(size)]
        self._results = CONTEXT.Queue()
        self._processes = [
            CONTEXT.Process(target=_serve, args=(rank, size, port, self._tasks[rank], self._results), daemon=True)
            for rank in range(size)
        ]
        for process in self._processes:
            process.start()
        self.alive = True

    def run(self, call: Callable[..., Any], *args: Any) -> list[Any]:
        for tasks in self._tasks:
            tasks.put((call, args))
        answers: dict[int, Any] = {}
        failures: list[str] = []
        try:
            for _ in self._processes:
                rank, value, trace = self._results.get(timeout=AFTER_FAILURE_S if failures else TIMEOUT_S)
                if trace is not None:
                    failures.append(f"rank {rank}:\n{trace}")
                answers[rank] = value
        except queue.Empty:
            failures.append(f"only ranks {sorted(answers)} came back")
            self.close()
        assert not failures, "\n".join(failures)
        return [answers[rank] for rank in sorted(answers)]

    def close(self) -> None:
        """Kills the ranks, which have nothing left to write; to end by themselves would take them seconds."""
        self.alive = False
        for process in self._processes:
            process.kill()
        for buffer in Path("/dev/shm").glob(f"deepspeed_*_{self._port}_*"):  # 66 MiB a rank, which DeepSpeed leaves
            buffer.unlink(missing_ok=True)
