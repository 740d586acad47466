"""How the two models meet: student states wait, the teacher streams past them.

    student_pass   the student's forward; H_s[0] .. H_s[K-1] are kept (autograd keeps these tensors anyway)
    teacher_pass   the teacher's forward; as block j_k ends, reduce(k, H_s[k], H_t[j_k]) gives a scalar, and
                   H_t[j_k] is dropped before the next block starts

So at most one teacher hidden state is alive, however many pairs there are.

Both models run on one CUDA stream. The pairs tie them together at every block, DeepSpeed gathers ahead on a stream of
its own, and kernels of a size worth distilling fill a device by themselves; a second stream would hold a second pool
of memory for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ted_ds.errors import ModelError
from ted_ds.models.layer_map import LayerMap
from ted_ds.models.structure import block_output

Reduce = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]


@contextmanager
def tapped(modules: Sequence[nn.Module], on_output: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """Within it, `on_output(i, hidden)` is called as the forward of `modules[i]` ends.

    The hooks are there for this one pass only. So they come after those of `deepspeed.initialize` and see the tensor
    that goes on to the next block, which ZeRO-3's own hooks replace; and when non-reentrant activation checkpointing
    recomputes a block in backward, they are gone.
    """

    def hook(index: int) -> Callable[..., None]:
        def call(module: nn.Module, inputs: Any, output: Any) -> None:
            on_output(index, block_output(output))

        return call

    handles = [module.register_forward_hook(hook(i)) for i, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class HiddenStateCollector:
    """Pairs the hidden states of two models without ever holding two of the teacher's.

    student_blocks, teacher_blocks: the models' blocks in order, or by number.
    layer_map: K pairs (student block, teacher block); an empty map watches nothing.
    last_teacher_block: the module after which the teacher's forward may end; None without pairs.

    Use: `with student_pass(): student(...)`, then `with teacher_pass(reduce) as reduced: teacher(...)`;
    `reduced[k]` is pair k's scalar after the teacher's forward.

    Raises ModelError if a block of the map did not run, or a student state carries no gradient.
    """

    def __init__(
        self,
        student_blocks: Sequence[nn.Module] | nn.ModuleList,
        teacher_blocks: Sequence[nn.Module] | nn.ModuleList | Mapping[int, nn.Module],
        layer_map: LayerMap,
    ) -> None:
        self.layer_map = layer_map
        self._student = [student_blocks[s] for s, _ in layer_map]
        self._teacher = [teacher_blocks[t] for _, t in layer_map]
        self.last_teacher_block = self._teacher[-1] if self._teacher else None
        self._waiting: dict[int, torch.Tensor] = {}

    @contextmanager
    def student_pass(self) -> Iterator[None]:
        """Keeps H_s[k] [B, S, D_s] of the student's forward inside the context."""
        self._waiting, training = {}, torch.is_grad_enabled()

        def keep(pair: int, hidden: torch.Tensor) -> None:
            if training and not hidden.requires_grad:
                raise ModelError(
                    f"the hidden state of student block {self.layer_map[pair][0]} carries no gradient: reentrant "
                    "activation checkpointing runs blocks under no_grad and would silently lose the layer loss; "
                    "checkpoint with use_reentrant=False"
                )
            self._waiting[pair] = hidden

        with tapped(self._student, keep):
            yield
        self._check(self._waiting, 0, "student")

    @contextmanager
    def teacher_pass(self, reduce: Reduce) -> Iterator[dict[int, torch.Tensor]]:
        """Reduces pair k as teacher block j_k ends; yields the dict that fills with the scalars.

        reduce: `reduce(k, H_s, H_t) -> scalar` for H_s [B, S, D_s] and H_t [B, S, D_t]; it must not keep H_t.
        It runs with gradients enabled inside the teacher's no_grad forward, in the teacher's block order.
        """
        reduced: dict[int, torch.Tensor] = {}

        def consume(pair: int, hidden: torch.Tensor) -> None:
            with torch.enable_grad():
                reduced[pair] = reduce(pair, self._waiting.pop(pair), hidden.detach())

        try:
            with tapped(self._teacher, consume):
                yield reduced
            self._check(reduced, 1, "teacher")
        finally:
            self._waiting = {}

    def _check(self, seen: dict[int, torch.Tensor], side: int, name: str) -> None:
        missing = [pair[side] for k, pair in enumerate(self.layer_map) if k not in seen]
        if missing:
            raise ModelError(f"{name} blocks {missing} of the layer map did not run in the {name}'s forward")
