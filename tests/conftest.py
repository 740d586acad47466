from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from tests.workers import Workers


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
