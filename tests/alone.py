"""A world of one rank without a process group, for tests of what asks no more of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from ted_ds.job.stop import StopRequest

T = TypeVar("T")


class Alone:
    """Rank 0 of 1, on the CPU."""

    rank, size, device, is_main, control = 0, 1, torch.device("cpu"), True, None

    def __init__(self) -> None:
        self.stop = StopRequest()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values

    min = gather = sum

    def on_main(self, work: Callable[[], T]) -> T:
        return work()

    def gather_objects(self, value: T) -> list[T]:
        return [value]
