"""Padding as the paper's code has it, for comparisons that count padding positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention


def zero_padding_context(model: nn.Module) -> None:
    """Gives padding positions of a DeBERTa-v2 a context of zeros, as transformers had it up to 4.x.

    Today a padding query attends to every position alike (a softmax over constants). States of real tokens do
    not depend on it, states of padding do; if the layer loss counts those (`loss.mask_padding: false`), both
    sides must have them as the paper's code did. Other families' padding attends to real tokens, then and now.
    """
    for module in model.modules():
        if isinstance(module, DisentangledSelfAttention):
            module.register_forward_hook(_zero_padding_queries)


def _zero_padding_queries(module: nn.Module, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> tuple[Any, ...]:
    context: torch.Tensor = output[0]
    mask: torch.Tensor = inputs[1]  # [B, 1, S, S], 1 if query and key are real
    return (context * mask[:, 0].amax(-1)[..., None].to(context.dtype), *output[1:])
