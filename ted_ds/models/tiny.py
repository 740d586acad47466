"""The tiny relative of a model: its family's code at small sizes, with random weights, from its config alone."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ted_ds.errors import ModelError, in_a_line

SPAN = 4
"""Tokens that local attention sees."""

VOCABULARY, UNITS, EXPERTS, STATES, BLOCKS, WIDTH = 96, 64, 16, 16, 4, 256
"""The most ids, FFN units, experts, states of a scan and blocks, and about the largest width, of a tiny model."""

LARGEST = 400_000_000
"""Parameters beyond which a model is no tiny one, if its width cannot be made smaller."""

_LISTED = ("layer", "block", "mlp", "pattern")
"""What the name of a list has in it that says something of each block."""


def tiny_model(model: PreTrainedModel) -> PreTrainedModel:
    """A model of `model`'s class on the CPU, float32, in eval mode; the same each time. Only the config is read.

    Fewer ids, blocks, FFN units and experts; a smaller width as far as the class can be built so. Fields that are no
    sizes (scales, caps, norms, activations, the kinds of the first blocks) stay. It has run once on a few tokens.
    Raises ModelError, with transformers' reason, if the class cannot be built and run at any of these sizes.
    """
    fault: Exception | str = "it is too large with the width that it needs"
    for width, units in ((True, True), (False, True), (False, False)):
        try:
            tiny = _build(type(model), _smaller(model.config, width=width, units=units))
            if tiny is not None:
                with torch.no_grad():
                    tiny(input_ids=tiny_ids(tiny.config))
                return tiny
        except Exception as error:  # a class may object to sizes in any way; the next ones are nearer to its own
            fault = error
    raise ModelError(
        f"a {model.config.model_type} of this config does not run, tried at small sizes: {in_a_line(fault)}"
    )


def tiny_ids(config: PreTrainedConfig) -> torch.Tensor:
    """[2, 7] ids that a tiny model has rows for."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, config.get_text_config().vocab_size, (2, 7), generator=generator)


def _smaller(config: PreTrainedConfig, *, width: bool, units: bool) -> PreTrainedConfig:
    small = copy.deepcopy(config)
    if hasattr(small, "quantization_config"):
        del small.quantization_config
    for part in {id(small): small, id(text := small.get_text_config()): text}.values():
        if hasattr(part, "num_hidden_layers"):
            _shrink(part, width=width, units=units)
        part.use_cache = False
        part.pad_token_id = getattr(part, "pad_token_id", None) or 0  # sequence classifiers want one
    return small


def _shrink(config: Any, *, width: bool, units: bool) -> None:
    _fewer_blocks(config)
    if width:
        _narrower(config)
    for name, value in list(vars(config).items()):
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        if "vocab" in name and "size" in name:
            setattr(config, name, min(value, VOCABULARY))
        elif name.endswith("token_id") and value >= VOCABULARY:
            setattr(config, name, 0)
        elif units and name.endswith(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")):
            setattr(config, name, min(value, UNITS))
        elif name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"):
            setattr(config, name, min(value, EXPERTS))
        elif "window" in name or name == "attention_chunk_size":  # shorter than the tokens, so that it matters
            setattr(config, name, min(value, SPAN))
        elif name.endswith(("chunk_size", "d_state", "state_size")):  # of a scan, whose plain torch code is slow
            setattr(config, name, min(value, STATES))


def _fewer_blocks(config: Any) -> None:
    """Enough of the first blocks for every kind that the config names."""
    total = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or ()
    few = max([BLOCKS, *(kinds.index(kind) + 2 for kind in set(kinds))])
    if few >= total:
        return
    for name, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == total and any(part in name for part in _LISTED):
            setattr(config, name, value[:few])
    config.num_hidden_layers = few


def _narrower(config: Any) -> None:
    """Few heads of the family's own width; what equals the width, or is a small multiple of it, follows it."""
    heads_name = "num_attention_heads" if hasattr(config, "num_attention_heads") else "num_heads"
    heads, hidden = getattr(config, heads_name, None), config.hidden_size
    if not isinstance(heads, int) or hidden <= WIDTH:
        return
    own_kv = getattr(config, "num_key_value_heads", None)
    kv = min(own_kv, 2) if own_kv else min(heads, 4)
    fewer = kv * min(heads // (own_kv or heads), 2)
    if hidden % heads == 0:
        narrow = hidden // heads * fewer
    else:  # the width of its heads is a field of its own
        narrow = hidden // math.gcd(hidden, 1 << (hidden // WIDTH).bit_length() - 1)
    if narrow >= hidden:
        return
    for name, value in list(vars(config).items()):
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        if value >= hidden and value % hidden == 0:
            setattr(config, name, value // hidden * narrow)
        elif name in ("mamba_n_heads", "mamba_num_heads", "mamba_d_ssm") or name.startswith("linear_num_"):
            setattr(config, name, max(1, value * narrow // hidden))
        elif name in ("n_groups", "mamba_n_groups"):
            setattr(config, name, 1)
    setattr(config, heads_name, fewer)
    if own_kv:
        config.num_key_value_heads = kv


def _build(kind: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel | None:
    with torch.device("meta"):
        if sum(p.numel() for p in kind(config).parameters()) > LARGEST:
            return None
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model: PreTrainedModel = kind(config).float().eval()
        for parameter in model.parameters():  # nothing is 0 or 1 that need not be: a part that is left out shows
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model
