"""A hosted teacher: a frozen model and its filters behind one streaming call; Stage I's models run through it too."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ted_ds.batch import Batch
from ted_ds.models.readout import Readout
from ted_ds.models.structure import find_blocks
from ted_ds.ops import Head
from ted_ds.tasks.base import Task
from ted_ds.teacher.contract import Teacher, UseOutput, stream_states


class _EnoughSeen(Exception):
    """Ends a frozen model's forward from a hook."""


class FrozenModule(nn.Module):
    """A model of a task without gradients, and the filters on its blocks (`filters` empty: none).

    Its forward returns nothing. Everything is taken while it runs: hidden states by hooks on blocks, the output by
    `use_output(output, head)`. So nothing of the teacher outlives its use, and with ZeRO-3 each weight is whole only
    when its turn comes.
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

        handle = last.register_forward_hook(end)  # hooks run in the order of registration: those of `tapped` are older
        try:
            self.readout.read(batch)
        except _EnoughSeen:
            pass
        finally:
            handle.remove()


class FrozenModel(Teacher):
    """A `FrozenModule` together with what calls it: the module itself (every rank has a copy), or a ZeRO-3 engine.

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
    def sources(self) -> list[nn.Module]:
        """By block: filters read what blocks give, an unfiltered state (lwd) is what the next block gets."""
        structure = self.module.structure
        return list(structure.blocks) if len(self.module.filters) else structure.hidden_state_sources()

    @property
    def target_width(self) -> int:
        """F; D without filters."""
        first: Any = next(iter(self.module.filters), None)
        return self.module.structure.width if first is None else first.output_dim

    def target(self, pair: int, hidden: torch.Tensor) -> torch.Tensor:
        """f_t[pair](hidden), [B, S, F]; the hidden state itself without filters (lwd)."""
        return self.module.filters[pair](hidden) if len(self.module.filters) else hidden

    def stream(self, batch: Batch, use_output: UseOutput | None = None, *, until: nn.Module | None = None) -> None:
        """One forward without gradients; `use_output` runs with gradients enabled.

        until: a module of the model; the blocks after it are not run and under ZeRO-3 not gathered.
        """

        def use(output: torch.Tensor, head: Head | None) -> None:
            assert use_output is not None
            with torch.enable_grad():
                use_output(output.detach(), head)

        with torch.no_grad():
            self._engine(batch=batch, use_output=use_output and use, until=until)


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
