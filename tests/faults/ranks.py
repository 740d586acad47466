"""Runs of several ranks that tests kill, stop, signal and start again: real processes, started in a second.

A server process has imported everything and forks each rank: what takes ten seconds is done once.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing as mp
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.utils.distributed import get_free_port
from tqdm import tqdm

from ted_ds.telemetry.recorder import read_metrics

TIMINGS = re.compile(r"_ms$|_per_second$|^peak_|^model_tflops$|^mfu$|^gpu_|^joules_")
"""Fields of a line that no two runs have alike."""

TORTURE = int(os.environ.get("TED_DS_TORTURE", "1"))
"""How much of what repeats is done: `make torture` sets it."""

PRELOADED = ["deepspeed", "transformers", "datasets", "ted_ds.pipeline.run", "ted_ds.cli.pretrain", "tests.jobs"]


def _serve(rank: int, size: int, port: int, argv: list[str], log: str, patch: Callable[[int], None] | None) -> None:
    with open(log, "ab", buffering=0) as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    from ted_ds.cli.common import guarded
    from ted_ds.cli.pretrain import run_command

    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which a killed process leaves behind
    if patch is not None:
        patch(rank)
    sys.exit(guarded(lambda arguments: run_command(arguments, "ted-ds", "distilled"), argv))


class Ranks:
    """One start of a recipe on `size` ranks, which say what they say into files in `logs`.

    patch: called in each rank's process, given the rank, before it starts: what makes it slow, or fail.
    """

    def __init__(
        self, size: int, logs: Path, recipe: Path, *overrides: str, patch: Callable[[int], None] | None = None
    ) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        port = get_free_port()
        logs.mkdir(parents=True, exist_ok=True)
        self._logs = [logs / f"rank-{rank}.log" for rank in range(size)]
        argv = ["--config", str(recipe), *overrides]
        self.processes = [
            context.Process(target=_serve, args=(rank, size, port, argv, str(log), patch))
            for rank, log in enumerate(self._logs)
        ]
        for log in self._logs:
            log.write_bytes(b"")
        for process in self.processes:
            process.start()

    def wait(self, seconds: float = 120.0) -> list[int]:
        """The exit codes, by rank; what does not end in time is killed, and the test fails."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        self.send(signal.SIGKILL)
        for process in self.processes:
            process.join()
        assert not late, f"ranks {late} had not ended after {seconds} s: {self.said()}"
        return [code for process in self.processes if (code := process.exitcode) is not None]

    def send(self, number: int, *ranks: int) -> None:
        """Sends a signal to these ranks, or to all that are alive."""
        for process in [self.processes[rank] for rank in ranks] or self.processes:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, number)

    def wait_for(self, event: Callable[[], bool] | str, seconds: float = 60.0) -> None:
        """Waits until an event, or until rank 0 has said something."""
        deadline = time.monotonic() + seconds
        happened = (lambda: event in self.said(0)) if isinstance(event, str) else event
        while not happened():
            assert time.monotonic() < deadline, f"waited {seconds} s in vain for {event}: {self.said()}"
            assert any(process.is_alive() for process in self.processes), f"ended before {event}: {self.said()}"
            time.sleep(0.005)

    def said(self, *ranks: int) -> str:
        """What these ranks, or all, wrote."""
        return "".join(self._logs[rank].read_text(errors="replace") for rank in ranks or range(len(self._logs)))


def run(size: int, recipe: Path, *overrides: str, logs: Path, codes: tuple[int, ...] = (0,)) -> str:
    """Runs a recipe to its end, which has one of the exit codes on every rank; what it said."""
    ranks = Ranks(size, logs, recipe, *overrides)
    ended = ranks.wait()
    assert set(ended) <= set(codes), (ended, ranks.said())
    return ranks.said()


def recorded(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The metrics.jsonl of all stages, line by line, without what a clock or a counter of memory measured."""
    places = {"Stage I, teacher": "teacher_filters", "Stage I, student": "student_filters", "Stage II": "."}
    return {
        stage: [{k: v for k, v in line.items() if not TIMINGS.search(k)} for line in read_metrics(folder / place)]
        for stage, place in places.items()
    }


def assert_near(
    found: dict[str, list[dict[str, Any]]], expected: dict[str, list[dict[str, Any]]], *, tolerance: float = 1e-5
) -> None:
    """The same lines and fields, every number within the relative tolerance."""
    for stage, lines in expected.items():
        assert len(found[stage]) == len(lines), stage
        for line, other in zip(lines, found[stage], strict=True):
            assert other.keys() == line.keys()
            for name, value in line.items():
                near = value if value is None else pytest.approx(value, rel=tolerance)
                assert other[name] == near, (stage, line["step"], name)


def latest_is_whole(folder: Path) -> bool:
    """Whether the checkpoint that `latest` names has all its files as they were written; True where there is none."""
    latest = folder / "checkpoints/latest"
    if not latest.exists():
        return True
    place = latest.parent / latest.read_text()
    card = json.loads((place / "ted_ds.json").read_text())
    return all(
        hashlib.sha256((place / name).read_bytes()).hexdigest() == digest for name, (_, digest) in card["files"].items()
    )
