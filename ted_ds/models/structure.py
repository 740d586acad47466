"""Finds a model's blocks and, of a causal LM, its final norm and LM head, by structure and not by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from ted_ds.errors import ModelError
from ted_ds.models.families import family_of, logit_scale, logit_softcap


@dataclass(frozen=True)
class ModelStructure:
    """The parts that distillation touches in any Hugging Face model with a task head.

    width: D. blocks_path: dotted name of `blocks`. The output of a block is raw: no final norm has passed over it.
    """

    model: nn.Module
    backbone: nn.Module
    blocks: nn.ModuleList
    blocks_path: str
    width: int

    @property
    def stack(self) -> nn.Module:
        """The module that holds the blocks."""
        return self.model.get_submodule(self.blocks_path.rpartition(".")[0])

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def hidden_state_sources(self) -> list[nn.Module]:
        """By block, the module whose output goes on to the next block: the block itself, but for one exception.

        DeBERTa-v2 may have a convolution over the first block's output (`conv_kernel_size`): a filter reads the
        block, and `hidden_states[1]` is what the convolution made of it.
        """
        config: Any = self.model.config
        name = family_of(config).after_first_block
        after = getattr(self.stack, name, None) if name else None
        return [*self.blocks] if after is None else [after, *self.blocks[1:]]


@dataclass(frozen=True)
class LMStructure(ModelStructure):
    """The parts of a causal LM.

    logits = softcap(logit_scale * lm_head(backbone(ids).last_hidden_state)); the last hidden state has
    passed the final norm. vocab_rows: V, the LM head's rows, padding included.
    """

    final_norm: nn.Module
    lm_head: nn.Linear
    vocab_rows: int
    logit_softcap: float | None
    logit_scale: float


def find_blocks(model: Any) -> ModelStructure:
    """The structure of a Hugging Face model with a task head, on any device, sharded or not.

    Sizes are read from modules and config, never from tensors: ZeRO-3 leaves those empty.
    Raises ModelError naming the part that was not found and what there is instead.
    """
    name = type(model).__name__
    backbone = getattr(model, "base_model", None)
    if backbone is model:  # Llama-4's text model calls it otherwise than its class says
        backbone = getattr(model, "model", None)
    if backbone is None:
        raise ModelError(f"{name} has no backbone (`base_model`) apart from its head: give a model of transformers")
    if (text := model.config.get_text_config()) is not model.config:
        raise ModelError(
            f"{name} is more than a text model: give its {text.model_type} alone, as AutoModelForImageTextToText."
            "from_pretrained(IT).get_decoder().save_pretrained(FOLDER) writes it if its LM head is tied"
        )
    path, blocks = _blocks(model, name)
    return ModelStructure(model, backbone, blocks, path, model.config.hidden_size)


def find_structure(model: Any) -> LMStructure:
    """The structure of a Hugging Face causal LM; else as `find_blocks`."""
    name = type(model).__name__
    parts = find_blocks(model)
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ModelError(f"{name} has no linear LM head (its output embeddings are {type(head).__name__})")
    norm = _final_norm(parts.stack, name)
    if getattr(parts.stack, "project_out", None) is not None:
        raise ModelError(f"{name} projects its last hidden state before the LM head (project_out): not supported")
    return LMStructure(
        **{**vars(parts), "width": head.in_features},
        final_norm=norm,
        lm_head=head,
        vocab_rows=head.out_features,
        logit_softcap=logit_softcap(model.config),
        logit_scale=logit_scale(model.config),
    )


def block_output(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The hidden state [B, S, D] in what a block's forward returned: a tensor, or a tuple that starts with it."""
    return output[0] if isinstance(output, tuple) else output


def block_input(inputs: tuple[Any, ...], named: Mapping[str, Any]) -> torch.Tensor:
    """The hidden state [B, S, D] in what a block's forward was given, by position and by name."""
    given = (*inputs, named.get("hidden_states"), *named.values())
    return next(value for value in given if isinstance(value, torch.Tensor))


def set_dropout(config: PreTrainedConfig, probability: float) -> None:
    """Sets every dropout of a config; families give them different names (`attn_pdrop`, `hidden_dropout`, ...)."""
    for key, value in vars(config).items():
        named = key.endswith(("_pdrop", "dropout", "dropout_prob")) or key == "layerdrop"
        if named and isinstance(value, float | int):
            setattr(config, key, probability)


def _blocks(model: nn.Module, name: str) -> tuple[str, nn.ModuleList]:
    """The longest list of like modules: the blocks; nested lists (experts, say) lie deeper and are passed over."""
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and len({type(m) for m in module}) == 1
    ]
    outer = [(p, m) for p, m in lists if not any(p.startswith(f"{q}.") for q, _ in lists)]
    if len(outer) != 1:
        found = ", ".join(p for p, _ in outer) or "none"
        raise ModelError(f"{name}: its blocks were not found; expected one list of like modules, there is {found}")
    return outer[0]


def _final_norm(stack: nn.Module, name: str) -> nn.Module:
    norms = [module for module in stack.children() if "norm" in type(module).__name__.lower()]
    if not norms:
        raise ModelError(f"{name}: its final norm was not found; expected one beside the blocks, there is none")
    return norms[-1]  # Bloom has one of its embeddings too; `probe` measures whether the last one is the final one
