from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read at import; without a network a name that is no folder costs 20 s of retries

from collections.abc import Callable, Iterator

import pytest
import torch

from tests.workers import Workers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read where a kernel is defined: before anything imports one


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked requires_gpu are skipped, visibly, where there is none."""
    for item in items:
        if DEVICE == "cpu" and item.get_closest_marker("requires_gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Two cores are shared with the ranks of the distributed tests."""
    torch.set_num_threads(1)


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
