"""What model families do in their own way, in one table; everything else is found by structure, see `structure`.

A quirk that a field of the config tells is read from that field, so that relatives which the table does not name
(Cohere2, Gemma-3) have it too. How a family's sequence classifier pools stands in `pooler`, what DeBERTa's padding
once was in `padding`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.deberta_v2.modeling_deberta_v2 import DebertaV2Encoder


class Part(StrEnum):
    """What the width of a model is made of. Heads are query heads; units are the FFN's."""

    CHANNEL = "hidden_size"
    HEAD = "num_heads"
    KV_HEAD = "num_key_value_heads"
    UNIT = "intermediate_size"


@dataclass(frozen=True)
class Axis:
    """One dimension of a tensor, seen as [outer, number of parts, inner, rest]; rest is 1 or the head width.

    outer 3: q, k and v one after another (GPT-2). inner 3: q, k and v within every head (GPT-NeoX).
    """

    part: Part
    outer: int = 1
    inner: int = 1

    def fits(self, length: int, sizes: Mapping[Part, int]) -> bool:
        """Whether a dimension of this length can be made of the parts of a model of `sizes`."""
        parts = self.outer * self.inner * sizes.get(self.part, 0)
        return length == parts if self.part is Part.CHANNEL else bool(parts) and length % parts == 0


Axes = tuple[Axis | None, ...]
"""An axis for each dimension of a tensor; None: not cut."""

_D, _FFN = Axis(Part.CHANNEL), Axis(Part.UNIT)
_HEADS, _KV = Axis(Part.HEAD), Axis(Part.KV_HEAD)
_QKV_OUTER, _QKV_INNER = Axis(Part.HEAD, outer=3), Axis(Part.HEAD, inner=3)


@dataclass(frozen=True)
class Family:
    """One family's own ways; the defaults are what most families do.

    For Stage 0's cut of the width: embeddings, norms, linears (axes of outputs and of inputs): its modules by the end
    of their names. transposed: whether its linears store [in, out]. ffn_size: the config's field of the FFN's width.

    positions: (config, rows of its table of positions) -> tokens that a row may have; None: any number.
    after_first_block: a module beside the blocks through which the first block's output goes before the second block.
    external_weights: of a model, the weights that a module reads from a submodule which it does not call.
    """

    embeddings: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    linears: Mapping[str, tuple[Axis | None, Axis]] = field(default_factory=dict)
    transposed: bool = False
    ffn_size: str = "intermediate_size"
    positions: Callable[[Any, int], int | None] = lambda config, rows: rows
    after_first_block: str | None = None
    external_weights: Callable[[nn.Module], Iterator[tuple[nn.Module, torch.Tensor]]] = lambda model: iter(())


def _relative_embeddings(model: nn.Module) -> Iterator[tuple[nn.Module, torch.Tensor]]:
    for module in model.modules():
        if isinstance(module, DebertaV2Encoder) and module.relative_attention:
            yield module, module.rel_embeddings.weight


_ROBERTA = Family(positions=lambda config, rows: rows - config.pad_token_id - 1)  # they begin after the padding id
_SEPARATE_QKV = {"self_attn.q_proj": (_HEADS, _D), "self_attn.k_proj": (_KV, _D), "self_attn.v_proj": (_KV, _D)}

FAMILIES: dict[str, Family] = {
    "llama": Family(  # and Mistral, Qwen2/3, Gemma-2/3
        embeddings=("embed_tokens", "lm_head"),
        norms=(
            *("norm", "input_layernorm", "post_attention_layernorm"),
            *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
        ),
        linears={
            **_SEPARATE_QKV,
            "self_attn.o_proj": (_D, _HEADS),
            "mlp.gate_proj": (_FFN, _D),
            "mlp.up_proj": (_FFN, _D),
            "mlp.down_proj": (_D, _FFN),
        },
    ),
    "gpt2": Family(
        embeddings=("wte", "wpe", "lm_head"),
        norms=("ln_1", "ln_2", "ln_f"),
        linears={
            "attn.c_attn": (_QKV_OUTER, _D),
            "attn.c_proj": (_D, _HEADS),
            "mlp.c_fc": (_FFN, _D),
            "mlp.c_proj": (_D, _FFN),
        },
        transposed=True,
        ffn_size="n_inner",
    ),
    "gpt_neox": Family(
        embeddings=("embed_in", "embed_out"),
        norms=("input_layernorm", "post_attention_layernorm", "final_layer_norm"),
        linears={
            "attention.query_key_value": (_QKV_INNER, _D),
            "attention.dense": (_D, _HEADS),
            "mlp.dense_h_to_4h": (_FFN, _D),
            "mlp.dense_4h_to_h": (_D, _FFN),
        },
    ),
    "opt": Family(
        embeddings=("embed_tokens", "embed_positions", "lm_head"),
        norms=("self_attn_layer_norm", "final_layer_norm"),
        linears={**_SEPARATE_QKV, "self_attn.out_proj": (_D, _HEADS), "fc1": (_FFN, _D), "fc2": (_D, _FFN)},
        ffn_size="ffn_dim",
    ),
    "bert": Family(  # and RoBERTa, which has a classifier of its own
        embeddings=("word_embeddings", "position_embeddings", "token_type_embeddings", "classifier", "qa_outputs"),
        norms=("LayerNorm",),
        linears={
            **{"self.query": (_HEADS, _D), "self.key": (_KV, _D), "self.value": (_KV, _D)},
            "attention.output.dense": (_D, _HEADS),
            "intermediate.dense": (_FFN, _D),
            "output.dense": (_D, _FFN),
            **{"pooler.dense": (_D, _D), "classifier.dense": (_D, _D), "classifier.out_proj": (None, _D)},
        },
    ),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "deberta-v2": Family(
        positions=lambda config, rows: None if config.relative_attention and not config.position_biased_input else rows,
        after_first_block="conv",
        external_weights=_relative_embeddings,
    ),
}
"""model_type -> the family."""

FFN_SIZES = tuple(dict.fromkeys(family.ffn_size for family in FAMILIES.values()))


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a model's config; the defaults for one that the table does not name."""
    return FAMILIES.get(config.model_type, Family())


def _axes(family: Family) -> dict[str, Axes]:
    linears = {
        name: (inner, out) if family.transposed else (out, inner) for name, (out, inner) in family.linears.items()
    }
    return {
        **{f"{name}.weight": (None, _D) for name in family.embeddings},
        **{f"{name}.{kind}": (_D,) for name in family.norms for kind in ("weight", "bias")},
        **{f"{name}.weight": axes for name, axes in linears.items()},
        **{f"{name}.bias": (out,) for name, (out, _) in family.linears.items()},
    }


_AXES = {name: axes for family in FAMILIES.values() for name, axes in _axes(family).items()}


def axes_of(name: str) -> Axes:
    """The axes of a parameter of any family; () if no family has a parameter of this name."""
    return _AXES.get(_known_end(name), ())


def _known_end(name: str) -> str:
    """The longest end of a name that a family has: BERT's attention and its FFN both have an output.dense."""
    pieces = name.split(".")
    return next((end for count in (4, 3, 2) if (end := ".".join(pieces[-count:])) in _AXES), "")


_READ = {
    f"{name}.weight": into.part
    for family in FAMILIES.values()
    for name, (out, into) in family.linears.items()
    if out is not None and out.part is Part.CHANNEL and into.part is not Part.CHANNEL
}


def part_read(name: str) -> Part | None:
    """Of a matrix of any family that writes hidden states, what it reads: heads or units; None of any other tensor."""
    return _READ.get(_known_end(name))


def fitting_axes(name: str, shape: Sequence[int], sizes: Mapping[Part, int]) -> Axes:
    """The axes of a tensor by its name, as far as its shape bears them out; () if no family has a tensor of this name.

    Another part of a model may have the same name: a norm within its heads, say.
    """
    axes = axes_of(name)
    if len(axes) != len(shape):
        return ()
    pairs = zip(axes, shape, strict=True)
    return tuple(axis if axis is not None and axis.fits(length, sizes) else None for axis, length in pairs)


def row_limit(config: PreTrainedConfig) -> int | None:
    """Tokens that a row may have; None if positions are relative, without a limit."""
    rows = getattr(config, "max_position_embeddings", None)
    return family_of(config).positions(config, rows) if isinstance(rows, int) and rows > 0 else None


def activation_of(config: Any) -> str:
    """The name of the FFN's activation; gelu if the config calls the field otherwise, as GPT-2's does."""
    return getattr(config, "hidden_act", "gelu")


def logit_softcap(config: PreTrainedConfig) -> float | None:
    """Of Gemma-2's logits (RecurrentGemma has another name), softcap * tanh(logits / softcap); None without one."""
    return getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)


def logit_scale(config: PreTrainedConfig) -> float:
    """What logits are multiplied by: Cohere and Falcon-H1 have a factor, Granite a divisor, HyperCLOVAX its inverse."""
    factors = (getattr(config, name, None) or 1.0 for name in ("logit_scale", "lm_head_multiplier"))
    scaling = float(getattr(config, "logits_scaling", None) or 1.0)
    return math.prod(factors) * (scaling if config.model_type == "hyperclovax" else 1.0 / scaling)


def sizes_of(config: PreTrainedConfig) -> dict[Part, int]:
    """The sizes that the config names, by part; families differ in what they have."""
    heads = getattr(config, "num_attention_heads", None)
    units = next((getattr(config, name) for name in FFN_SIZES if hasattr(config, name)), None)
    if units is None and hasattr(config, "n_inner"):
        units = 4 * config.hidden_size  # GPT-2's default
    sizes = {
        Part.CHANNEL: getattr(config, "hidden_size", None),
        Part.HEAD: heads,
        Part.KV_HEAD: getattr(config, "num_key_value_heads", None) or heads,
        Part.UNIT: units,
    }
    return {part: size for part, size in sizes.items() if isinstance(size, int)}


def set_sizes(config: PreTrainedConfig, sizes: Mapping[Part, int]) -> None:
    """Gives a config other sizes; the head width stays."""
    if hasattr(config, "num_key_value_heads"):  # Llama-like: heads * head width need not be the width
        own = getattr(config, "head_dim", None)
        config.head_dim = own or config.hidden_size // config.num_attention_heads
        config.num_key_value_heads = sizes[Part.KV_HEAD]
    if hasattr(config, "word_embed_proj_dim"):  # OPT: of its embeddings
        config.word_embed_proj_dim = sizes[Part.CHANNEL]
    config.hidden_size = sizes[Part.CHANNEL]
    config.num_attention_heads = sizes[Part.HEAD]
    setattr(config, next(name for name in FFN_SIZES if hasattr(config, name)), sizes[Part.UNIT])
