from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read at import; without a network a name that is no folder costs 20 s of retries
os.environ["OMP_NUM_THREADS"] = "1"  # of every process: threads of several ranks on two cores wait by spinning

from collections.abc import Callable, Iterator

import pytest
import torch
from torch.utils.cpp_extension import get_default_build_root

from tests.workers import Workers

WITH_RANKS = ("cluster", "distributed", "faults", "integration")
"""Folders of tests that start ranks."""

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read where a kernel is defined: before anything imports one


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked requires_gpu are skipped, visibly, where there is none."""
    for item in items:
        if DEVICE == "cpu" and item.get_closest_marker("requires_gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Builds DeepSpeed's operator for CPU ranks on a fresh machine: that takes longer than some tests may."""
    built = f"py{sys.version_info[0]}{sys.version_info[1]}*/deepspeed_shm_comm/deepspeed_shm_comm.so"
    needed = any(item.path.parent.name in WITH_RANKS for item in session.items)
    if needed and not session.config.option.collectonly and not any(Path(get_default_build_root()).glob(built)):
        code = "from ted_ds.job.world import init_world, shut_down; shut_down(init_world())"
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.fixture(scope="session")
def workers() -> Iterator[Callable[[int], Workers]]:
    """workers(n): the session's group of n ranks, started at first use."""
    groups: dict[int, Workers] = {}

    def group(size: int) -> Workers:
        if size not in groups or not groups[size].alive:
            groups[size] = Workers(size)
        return groups[size]

    yield group
    for workers_ in groups.values():
        workers_.close()
