"""The frozen side of both stages: a causal LM and its filters behind one streaming call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ted_ds.batch import Batch
from ted_ds.distill.collector import BlockTap
from ted_ds.models.logit_head import LogitHead
from ted_ds.models.structure import ModelStructure, find_structure
from ted_ds.ops import Head

UseLogits = Callable[[torch.Tensor, Head], None]


def last_hidden_state(structure: ModelStructure, batch: Batch) -> torch.Tensor:
    """[B, S, D] hidden states after the final norm, without logits and without a key-value cache."""
    output = structure.backbone(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, return_dict=True
    )
    return output.last_hidden_state


class FrozenLM(nn.Module):
    """A causal LM without gradients, and the filters on its blocks (none: `filters` empty).

    Its forward returns nothing. Whatever is wanted of it is taken while it runs: hidden states by taps on
    `structure.blocks`, logits by `use_logits(last_hidden_state, head)`. So nothing of the teacher outlives
    its use, and with ZeRO-3 each weight is whole only when its turn comes.
    """

    def __init__(self, model: nn.Module, filters: Iterable[nn.Module] = ()) -> None:
        super().__init__()
        self.model = model
        self.filters = nn.ModuleList(filters)
        self.structure = find_structure(model)
        self.logit_head = LogitHead(self.structure)
        self.requires_grad_(False)

    def forward(self, *, batch: Batch, use_logits: UseLogits | None = None) -> None:
        """Runs the blocks over the batch; `use_logits` runs with the LM head's weight gathered."""
        hidden = last_hidden_state(self.structure, batch)
        if use_logits is not None:
            self.logit_head(hidden, use=use_logits)

    @property
    def target_width(self) -> int:
        """F, the width of what `target` returns."""
        first: Any = next(iter(self.filters), None)
        return self.structure.width if first is None else first.output_dim

    def target(self, pair: int, hidden: torch.Tensor) -> torch.Tensor:
        """f_t[pair](hidden), [B, S, F]; the hidden state itself where the model has no filters (lwd)."""
        return self.filters[pair](hidden) if len(self.filters) else hidden


class FrozenModel:
    """A FrozenLM together with what calls it: the module itself (replicated) or a ZeRO-3 engine.

    Not a torch module on purpose: the student's engine refers to its teacher and must neither shard,
    train nor save it.
    """

    def __init__(self, module: FrozenLM, engine: Any = None) -> None:
        self.module = module
        self._engine: Any = engine or module
        module.eval()  # ZeRO-3's trace needs eval() under no_grad

    def close(self) -> None:
        """Ends the ZeRO-3 engine, if there is one; nothing can be streamed any more."""
        if self._engine is not self.module:
            self._engine.destroy()

    def stream(self, batch: Batch, use_logits: UseLogits | None = None) -> None:
        """One forward without gradients; `use_logits` runs with gradients enabled.

        `no_grad`, not `inference_mode`: what the taps hand on takes part in the student's graph.
        """
        with torch.no_grad():
            self._engine(batch=batch, use_logits=use_logits and _with_grad(use_logits))

    def stream_blocks(
        self, batch: Batch, blocks: Sequence[int], on_output: Callable[[int, torch.Tensor], None]
    ) -> None:
        """One forward without gradients; `on_output(i, hidden)` as block `blocks[i]` ends."""
        tap = BlockTap([self.module.structure.blocks[j] for j in blocks], on_output)
        try:
            with tap.armed():
                self.stream(batch)
        finally:
            tap.remove()


def _with_grad(use_logits: UseLogits) -> UseLogits:
    def use(hidden: torch.Tensor, head: Head) -> None:
        with torch.enable_grad():
            use_logits(hidden.detach(), head)

    return use


def filtered_square_sums(frozen: FrozenModel, blocks: Sequence[int], batch: Batch) -> torch.Tensor:
    """[K] float64: the sum over real tokens and F of the squared filtered states at each of `blocks`."""
    sums: dict[int, torch.Tensor] = {}

    def add(index: int, hidden: torch.Tensor) -> None:
        squares = frozen.module.target(index, hidden).double().square().sum(-1)
        mask = batch.attention_mask
        sums[index] = (squares if mask is None else squares * mask).sum()

    frozen.stream_blocks(batch, blocks, add)
    return torch.stack([sums[k] for k in range(len(blocks))])
