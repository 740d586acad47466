"""Tiny random causal LMs of every supported family, loud enough that a forgotten part shows."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

FAMILIES = ("gpt2", "gpt_neox", "opt", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")

READS_BACK = ("opt",) if Version(transformers.__version__) < Version("5.23") else ()
"""Families whose own code reads from the device: before this version transformers made OPT a mask and looked at it."""


def tiny_config(
    family: str, *, blocks: int = 2, width: int = 16, heads: int = 2, vocab: int = 97, **extra: Any
) -> PreTrainedConfig:
    """A config of `family`; `extra` goes in under the family's own names."""
    sizes: dict[str, Any] = {"vocab_size": vocab, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if family == "gpt2":
        sizes |= {"n_layer": blocks, "n_embd": width, "n_head": heads, "n_positions": 64}
        sizes |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    else:
        sizes |= {"num_hidden_layers": blocks, "hidden_size": width, "num_attention_heads": heads}
        sizes |= {"max_position_embeddings": 64}
        sizes |= (
            {"ffn_dim": 3 * width, "word_embed_proj_dim": width, "dropout": 0.0}
            if family == "opt"
            else {"intermediate_size": 3 * width}
        )
        if family not in ("opt", "gpt_neox"):
            sizes |= {"num_key_value_heads": heads, "head_dim": width // heads}
        if family.startswith("gemma"):
            sizes |= {"sliding_window": 8, "query_pre_attn_scalar": width // heads}
    return AutoConfig.for_model(family, **(sizes | extra))


ROTATED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "granite", "smollm3", "seed_oss", "ernie4_5")
"""Families whose hidden states can be rotated."""


def tiny_model(family: str, *, seed: int = 0, **sizes: Any) -> PreTrainedModel:
    """A float32 model in eval mode, the same for the same seed."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **sizes), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 1.0 / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.tie_weights()
    return model.eval()
