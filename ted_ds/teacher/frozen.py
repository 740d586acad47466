"""The frozen side of both stages: a model and its filters behind one streaming call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from ted_ds.batch import Batch
from ted_ds.models.readout import Readout
from ted_ds.models.structure import find_blocks
from ted_ds.ops import Head
from ted_ds.tasks.base import Task
from ted_ds.teacher.collector import BlockTap

UseOutput = Callable[[Any, Head | None], None]
"""Takes the output that a readout gives, of a recorded teacher maybe a `TopK`, and the LM head where there is one."""


class Teacher(Protocol):
    """What Stage II asks of a teacher: a frozen model, or what was recorded of one."""

    @property
    def sources(self) -> Sequence[nn.Module] | Mapping[int, nn.Module]:
        """By block, the module whose output is the teacher's side of a pair, before `target`."""
        ...

    @property
    def target_width(self) -> int:
        """F, the width of what `target` returns."""
        ...

    def target(self, pair: int, hidden: torch.Tensor) -> torch.Tensor:
        """What the filtered student is compared with, [B, S, F], from the output of the pair's source."""
        ...

    def stream(self, batch: Batch, use_output: UseOutput | None = None, *, until: nn.Module | None = None) -> None:
        """Runs the sources in the order of the blocks under no_grad, then `use_output(output, head)` with gradients.

        until: the source after which nothing is needed, where there is no `use_output`.
        """
        ...


class _EnoughSeen(Exception):
    """Ends a frozen model's forward from a hook."""


class FrozenModule(nn.Module):
    """A model of a task without gradients, and the filters on its blocks (none: `filters` empty).

    Its forward returns nothing. Whatever is wanted of it is taken while it runs: hidden states by taps on
    `sources`, logits by `use_output(output, head)`. So nothing of the teacher outlives its use, and with
    ZeRO-3 each weight is whole only when its turn comes.
    """

    def __init__(self, model: PreTrainedModel, task: Task, filters: Iterable[nn.Module] = ()) -> None:
        super().__init__()
        self.model: PreTrainedModel = model
        self.filters = nn.ModuleList(filters)
        self.structure = find_blocks(model)
        self.readout: Readout = task.readout(model)
        self.requires_grad_(False)

    def forward(self, *, batch: Batch, use_output: UseOutput | None = None, until: nn.Module | None = None) -> None:
        """Runs the model over the batch; `use_output` runs with the head's weight gathered.

        until: the forward ends once this module has run; no `use_output` then.
        """
        if until is not None:
            self._read_until(batch, until)
            return
        output = self.readout.read(batch)
        if use_output is not None:
            self.readout(output, use=use_output)

    def _read_until(self, batch: Batch, last: nn.Module) -> None:
        # caught here, not by the caller: ZeRO-3's hook on this module's forward must see it end
        def end(module: nn.Module, inputs: Any, output: Any) -> None:
            raise _EnoughSeen

        handle = last.register_forward_hook(end)  # hooks run in the order of registration: the taps' are older
        try:
            self.readout.read(batch)
        except _EnoughSeen:
            pass
        finally:
            handle.remove()

    @property
    def sources(self) -> list[nn.Module]:
        """Per block the module whose output is compared: filters read blocks, without filters the hidden states."""
        return list(self.structure.blocks) if len(self.filters) else self.structure.hidden_state_sources()

    @property
    def target_width(self) -> int:
        """F, the width of what `target` returns."""
        first: Any = next(iter(self.filters), None)
        return self.structure.width if first is None else first.output_dim

    def target(self, pair: int, hidden: torch.Tensor) -> torch.Tensor:
        """f_t[pair](hidden), [B, S, F]; the hidden state itself where the model has no filters (lwd)."""
        return self.filters[pair](hidden) if len(self.filters) else hidden


class FrozenModel:
    """A FrozenModule together with what calls it: the module itself (replicated) or a ZeRO-3 engine.

    Not a torch module on purpose: the student's engine refers to its teacher and must neither shard,
    train nor save it.
    """

    def __init__(self, module: FrozenModule, engine: Any = None) -> None:
        self.module = module
        self._engine: Any = engine or module
        module.eval()  # ZeRO-3's trace needs eval() under no_grad

    def close(self) -> None:
        """Ends the ZeRO-3 engine, if there is one; nothing can be streamed any more."""
        if self._engine is not self.module:
            self._engine.destroy()

    @property
    def target_width(self) -> int:
        """F, see `FrozenModule`."""
        return self.module.target_width

    def target(self, pair: int, hidden: torch.Tensor) -> torch.Tensor:
        """The teacher's side of a pair, see `FrozenModule`."""
        return self.module.target(pair, hidden)

    @property
    def sources(self) -> list[nn.Module]:
        """Per block the module whose output is compared, see `FrozenModule`."""
        return self.module.sources

    def stream(self, batch: Batch, use_output: UseOutput | None = None, *, until: nn.Module | None = None) -> None:
        """One forward without gradients; `use_output` runs with gradients enabled.

        until: a module of the model; the forward ends as soon as it has run, the blocks after it are not run and
        under ZeRO-3 not gathered. `no_grad`, not `inference_mode`: what the taps hand on takes part in the
        student's graph.
        """
        with torch.no_grad():
            self._engine(batch=batch, use_output=use_output and _with_grad(use_output), until=until)

    def stream_states(
        self, batch: Batch, sources: Sequence[nn.Module], on_output: Callable[[int, torch.Tensor], None]
    ) -> None:
        """One forward without gradients; `on_output(i, hidden)` as the module `sources[i]` ends, up to the last.

        sources: modules of the model, in the order in which they run.
        """
        stream_states(self, batch, sources, on_output)


def stream_states(
    teacher: Teacher,
    batch: Batch,
    sources: Sequence[nn.Module],
    on_output: Callable[[int, torch.Tensor], None],
    use_output: UseOutput | None = None,
) -> None:
    """One forward without gradients; `on_output(i, hidden)` as the module `sources[i]` ends, then `use_output`.

    sources: in the order in which they run. Without `use_output` the forward ends after the last of them.
    """
    tap = BlockTap(sources, on_output)
    try:
        with tap.armed():
            teacher.stream(batch, use_output, until=None if use_output else sources[-1])
    finally:
        tap.remove()


def _with_grad(use_output: UseOutput) -> UseOutput:
    def use(output: torch.Tensor, head: Head | None) -> None:
        with torch.enable_grad():
            use_output(output.detach(), head)

    return use


def filtered_square_sums(
    teacher: Teacher, blocks: Sequence[int], batch: Batch, *, mask_padding: bool = True
) -> torch.Tensor:
    """[K] float64: the sum over tokens (real ones, with `mask_padding`) and F of the squared filtered states."""
    sums: dict[int, torch.Tensor] = {}
    mask = batch.attention_mask if mask_padding else None

    def add(index: int, hidden: torch.Tensor) -> None:
        squares = teacher.target(index, hidden).double().square().sum(-1)
        sums[index] = (squares if mask is None else squares * mask).sum()

    sources = teacher.sources
    stream_states(teacher, batch, [sources[j] for j in blocks], add)
    return torch.stack([sums[k] for k in range(len(blocks))])
