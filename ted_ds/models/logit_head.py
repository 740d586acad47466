"""The LM head as a module of its own, so that ZeRO-3 gathers its weight around any use of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from ted_ds.models.structure import ModelStructure
from ted_ds.ops import Head

T = TypeVar("T")


class LogitHead(nn.Module):
    """Shares the LM head's parameters and hands them out, gathered, during its forward.

    The fused losses need the weight itself, not the module's output. Under ZeRO-3 a weight is whole only
    inside the forward of a module that owns it; hence this owner of shared (tied) parameters.
    """

    def __init__(self, structure: ModelStructure) -> None:
        super().__init__()
        self.weight = structure.lm_head.weight
        self.bias = structure.lm_head.bias
        self._softcap, self._scale = structure.logit_softcap, structure.logit_scale

    def forward(self, hidden: torch.Tensor, *, use: Callable[[torch.Tensor, Head], T]) -> T:
        """`use(hidden, head)` with `head.weight` [V, D] whole; hidden: the last hidden states [.., D]."""
        return use(hidden, Head(self.weight, self.bias, softcap=self._softcap, scale=self._scale))
