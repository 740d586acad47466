"""What a process asks of its process groups: bytes of every collective, by kind, by whose weights, by caller.

Counted where torch's Python calls enter a process group (the methods of `torch.distributed.ProcessGroup`): every
collective passes there, whoever starts it. DeepSpeed's own comms_logger sees DeepSpeed's calls alone, so it misses
what ted_ds reduces itself (counts, loss terms), and it cannot tell the teacher's gathers from the student's.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.distributed import ProcessGroup

_METHODS = {
    "allgather": ("all_gather", 0),
    "_allgather_base": ("all_gather", 0),
    "all_gather_single": ("all_gather", 0),
    "allgather_into_tensor_coalesced": ("all_gather", 0),
    "all_gather_single_coalesced": ("all_gather", 0),
    "reduce_scatter": ("reduce_scatter", 1),
    "_reduce_scatter_base": ("reduce_scatter", 1),
    "reduce_scatter_single": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", 1),
    "reduce_scatter_single_coalesced": ("reduce_scatter", 1),
    "allreduce": ("all_reduce", 0),
    "allreduce_coalesced": ("all_reduce", 0),
    "broadcast": ("broadcast", 0),
    "reduce": ("reduce", 0),
    "alltoall": ("all_to_all", 1),
    "alltoall_base": ("all_to_all", 1),
    "all_to_all_single": ("all_to_all", 1),
}
"""ProcessGroup method -> the collective, and which argument holds the whole tensor: what is gathered, or reduced.

torch 2.11 to 2.13 name them differently; a name that a version lacks is passed over.
"""

_PASSED_OVER = (
    "torch.",
    "typing_extensions",
    "deepspeed.comm",
    "deepspeed.utils",
    "contextlib",
    "benchmarks.",
    "unittest.",
)
"""Modules that start no collective of their own accord, but for others."""


@dataclass(frozen=True)
class Call:
    """One collective: bytes of the whole tensor; whose parameters it gathers ("" unless watched); who started it."""

    kind: str
    size: int
    owner: str
    caller: str


class CollectiveLog:
    """Collectives and gathered parameters while `recording`."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.gathers: Counter[tuple[str, str]] = Counter()
        """(owner, parameter's name) -> how often it was gathered."""
        self._owner = ""
        self._on = False

    def watch(self, owner: str, module: nn.Module) -> None:
        """Names the owner of the ZeRO-3 parameters of `module`, so that their gathers can be told apart."""
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        for parameter in module.parameters():
            sharded: Any = parameter  # ZeRO-3 gave it this method, and calls it on the first of a group of parameters
            sharded.all_gather_coalesced = self._owned(owner, names, sharded.all_gather_coalesced)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Counts what is started inside the context; outside of it nothing is slowed."""
        with ExitStack() as stack:
            for name, (kind, whole) in _METHODS.items():
                if hasattr(ProcessGroup, name):
                    counted = self._counted(getattr(ProcessGroup, name), kind, whole)
                    stack.enter_context(patch.object(ProcessGroup, name, counted))
            self._on = True
            try:
                yield
            finally:
                self._on = False

    def table(self) -> list[dict[str, Any]]:
        """Calls summed by kind, owner and caller, the largest first."""
        total: Counter[tuple[str, str, str]] = Counter()
        number: Counter[tuple[str, str, str]] = Counter()
        for call in self.calls:
            key = (call.kind, call.owner, call.caller)
            total[key] += call.size
            number[key] += 1
        fields = ("kind", "owner", "caller")
        return [dict(zip(fields, k, strict=True)) | {"calls": number[k], "bytes": n} for k, n in total.most_common()]

    def size(self, kind: str, owner: str) -> int:
        """Bytes of one kind of one owner."""
        return sum(call.size for call in self.calls if (call.kind, call.owner) == (kind, owner))

    def _counted(self, method: Callable[..., Any], kind: str, whole: int) -> Callable[..., Any]:
        def counted(group: ProcessGroup, *args: Any, **options: Any) -> Any:
            self.calls.append(Call(kind, _bytes(args[whole]), self._owner, _caller(sys._getframe(1))))
            return method(group, *args, **options)

        return counted

    def _owned(self, owner: str, names: Mapping[int, str], gather: Callable[..., Any]) -> Callable[..., Any]:
        def owned(parameters: Any, *args: Any, **options: Any) -> Any:
            if not self._on:
                return gather(parameters, *args, **options)
            parameters = list(parameters)
            self.gathers.update((owner, names[id(parameter)]) for parameter in parameters)
            self._owner = owner
            try:
                return gather(parameters, *args, **options)
            finally:
                self._owner = ""

        return owned


def theory(student: nn.Module, teacher: nn.Module) -> dict[tuple[str, str], int]:
    """Bytes a micro-batch of each (kind, owner) where ZeRO-3 keeps nothing resident: (2 + 1) N_s and N_t.

    The student is gathered in forward and in backward, its gradients are reduced and scattered in the parameters'
    dtype; the teacher is gathered once. A shared (tied) parameter counts once. Filters belong to their side.
    """
    own, frozen = (parameter_bytes(module) for module in (student, teacher))
    return {("all_gather", "student"): 2 * own, ("reduce_scatter", ""): own, ("all_gather", "teacher"): frozen}


def parameter_bytes(module: nn.Module) -> int:
    """Bytes of all parameters whole, each once, sharded or not."""
    return sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in module.parameters())


def _bytes(tensors: Any) -> int:
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(_bytes, tensors))


def _caller(frame: FrameType | None) -> str:
    """module.function of the first frame whose module is not passed over."""
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if not f"{module}.".startswith(_PASSED_OVER):
            return f"{module}.{frame.f_code.co_name}"
        frame = frame.f_back
    return ""
