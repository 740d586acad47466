"""The real launchers: what becomes of the ranks when the launcher is told to end, or is killed."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.faults.ranks import latest_is_whole
from tests.marks import slow

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


@pytest.mark.parametrize(
    ("launcher", "number"),
    [("deepspeed --num_gpus", signal.SIGTERM), slow("torchrun --nproc_per_node", signal.SIGKILL)],
)
def test_no_rank_outlives_its_launcher(
    fault_project: Path, disturbed: Callable[..., tuple[Path, Path]], launcher: str, number: int
) -> None:
    name = launcher.split()[0]
    recipe, _ = disturbed(f"under-{name}", train__steps=100_000)
    folder = fault_project / f"under-{name}"
    environment: dict[str, Any] = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [*launcher.split(), "2", "launchers/pretrain.sh", "--config", str(recipe)]
    with (fault_project / f"{name}.log").open("w") as log:
        options: dict[str, Any] = {"cwd": ROOT, "env": environment, "stdout": log, "stderr": log}
        process = psutil.Popen([str(BIN / command[0]), *command[1:]], start_new_session=True, **options)
    deadline = time.monotonic() + 120
    while not (folder / "checkpoints/latest").exists():
        assert time.monotonic() < deadline and process.poll() is None, (fault_project / f"{name}.log").read_text()
        time.sleep(0.05)
    ranks = process.children(recursive=True)
    assert len(ranks) >= 2
    process.send_signal(number)
    process.wait(60)
    _, alive = psutil.wait_procs(ranks, timeout=60)
    assert not alive
    assert "SIGTERM received: saved after step " in (fault_project / f"{name}.log").read_text()
    assert latest_is_whole(folder)
