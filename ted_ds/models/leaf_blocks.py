"""Whole blocks as the unit that ZeRO-3 gathers and reduces."""

from __future__ import annotations

from typing import Any

from deepspeed.utils import set_z3_leaf_module
from transformers.modeling_layers import GradientCheckpointingLayer

from ted_ds.models.structure import ModelStructure


def handle_whole_blocks(structure: ModelStructure, *, trained: bool) -> None:
    """Makes every block one of DeepSpeed's leaf modules; call it before `deepspeed.initialize`.

    ZeRO-3 then gathers a block's weights at once, by one pair of hooks in place of one for each submodule. Those were
    about half of the host's time: of 28 + 10 Llama blocks, 130 ms a micro-batch became 71.

    trained: then only if no gradient is lost, see `_gradients_are_whole`; other models keep all hooks.
    """
    if trained and not _gradients_are_whole(structure):
        return
    for block in structure.blocks:
        set_z3_leaf_module(block, True)


def _gradients_are_whole(structure: ModelStructure) -> bool:
    """Whether all gradients of a block's weights are there once its input has one: DeepSpeed reduces them then.

    Autograd goes through the forward in reverse, so everything that a block did comes before its input. That fails
    for a weight that is used outside its block, a block that runs twice in a forward, and a hidden state that is
    passed by keyword, which torch's hooks do not see (a `GradientCheckpointingLayer` must not be called so).
    """
    inside = [{id(p) for p in block.parameters()} for block in structure.blocks]
    names = structure.model.named_parameters(remove_duplicate=False)
    outside = {id(p) for name, p in names if not name.startswith(f"{structure.blocks_path}.")}
    config: Any = structure.model.config
    return (
        all(isinstance(block, GradientCheckpointingLayer) for block in structure.blocks)
        and structure.num_blocks == config.num_hidden_layers
        and sum(map(len, inside)) == len(set().union(*inside) - outside)
    )
