"""The hidden-state collector: student states wait, the teacher streams past them.

Whatever the number of pairs, at most one teacher hidden state is alive: as teacher block j_k ends, pair k is
reduced to a scalar against the waiting H_s[k], and H_t[j_k] is dropped before the next block starts. The
student's states cost nothing extra, autograd keeps them anyway.

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


class BlockTap:
    """Calls `on_output(i, hidden)` as the i-th watched block's forward ends, while armed.

    Register it after `deepspeed.initialize`: ZeRO-3's own hooks replace a block's output, and the tensor to
    watch is the one that goes on to the next block. Disarmed it does nothing, so the recomputation of
    non-reentrant activation checkpointing passes unnoticed.
    """

    def __init__(self, blocks: Sequence[nn.Module], on_output: Callable[[int, torch.Tensor], None]) -> None:
        self._armed = False
        self._on_output = on_output
        self._handles = [block.register_forward_hook(self._hook(i)) for i, block in enumerate(blocks)]

    @contextmanager
    def armed(self) -> Iterator[None]:
        """The pass during which the tap is open."""
        self._armed = True
        try:
            yield
        finally:
            self._armed = False

    def remove(self) -> None:
        """Takes the hooks off the blocks."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if self._armed:
                self._on_output(index, block_output(output))

        return hook


class HiddenStateCollector:
    """Pairs the hidden states of two models without ever holding two of the teacher's.

    student_blocks, teacher_blocks: the models' blocks in order.
    layer_map: K pairs (student block, teacher block); an empty map watches nothing.
    last_teacher_block: the attribute that holds the module after which the teacher's forward may end, None without
        pairs.

    Use: `with student_pass(): student(...)`, then `with teacher_pass(reduce) as reduced: teacher(...)`;
    `reduced[k]` is pair k's scalar after the teacher's forward.

    Raises ModelError where a watched block did not run, or where a student state carries no gradient.
    """

    def __init__(
        self,
        student_blocks: Sequence[nn.Module] | nn.ModuleList,
        teacher_blocks: Sequence[nn.Module] | nn.ModuleList | Mapping[int, nn.Module],
        layer_map: LayerMap,
    ) -> None:
        self.layer_map = layer_map
        self.last_teacher_block = teacher_blocks[layer_map[-1][1]] if layer_map else None
        self._reduce: Reduce | None = None
        self._training = False
        self._waiting: dict[int, torch.Tensor] = {}
        self._reduced: dict[int, torch.Tensor] = {}
        self._student_tap = BlockTap([student_blocks[s] for s, _ in layer_map], self._record)
        self._teacher_tap = BlockTap([teacher_blocks[t] for _, t in layer_map], self._consume)

    @contextmanager
    def student_pass(self) -> Iterator[None]:
        """Records H_s[k] of the student's forward inside the context."""
        self._waiting, self._training = {}, torch.is_grad_enabled()
        with self._student_tap.armed():
            yield
        self._check(self._waiting, 0, "student")

    @contextmanager
    def teacher_pass(self, reduce: Reduce) -> Iterator[dict[int, torch.Tensor]]:
        """Reduces pair k as teacher block j_k ends; yields the dict that fills with the scalars.

        reduce: `reduce(k, H_s, H_t) -> scalar` for H_s [B, S, D_s] and H_t [B, S, D_t]; it must not keep H_t.
        It runs with gradients enabled inside the teacher's no_grad forward, in the teacher's block order.
        """
        self._reduce, self._reduced = reduce, {}
        reduced = self._reduced
        try:
            with self._teacher_tap.armed():
                yield reduced
            self._check(reduced, 1, "teacher")
        finally:
            self._reduce, self._waiting, self._reduced = None, {}, {}

    def remove(self) -> None:
        """Takes all hooks off both models."""
        self._student_tap.remove()
        self._teacher_tap.remove()

    def _record(self, pair: int, hidden: torch.Tensor) -> None:
        if self._training and not hidden.requires_grad:
            raise self._no_gradient(pair)
        self._waiting[pair] = hidden

    def _consume(self, pair: int, hidden: torch.Tensor) -> None:
        assert self._reduce is not None
        with torch.enable_grad():
            self._reduced[pair] = self._reduce(pair, self._waiting.pop(pair), hidden.detach())

    def _check(self, seen: dict[int, torch.Tensor], side: int, name: str) -> None:
        missing = [pair[side] for k, pair in enumerate(self.layer_map) if k not in seen]
        if missing:
            raise ModelError(f"{name} blocks {missing} of the layer map did not run in the {name}'s forward")

    def _no_gradient(self, pair: int) -> ModelError:
        return ModelError(
            f"the hidden state of student block {self.layer_map[pair][0]} carries no gradient: reentrant activation "
            "checkpointing runs blocks under no_grad and would silently lose the layer loss; checkpoint with "
            "use_reentrant=False"
        )
