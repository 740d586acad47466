"""Models and filters, loaded directly to where they stay: one device, or ZeRO-3's shards."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig

from ted_ds.config.tasks import Kind
from ted_ds.errors import CheckpointError, ModelError, load_failure
from ted_ds.models.families import family_of
from ted_ds.models.pooler import set_head_dropout
from ted_ds.models.structure import find_structure, set_dropout
from ted_ds.models.task_head import AUTO_CLASSES
from ted_ds.ops import Head

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "int32")}
"""By the names that recipes (the first two) and teacher caches give them."""


def is_sharded(deepspeed_config: dict[str, Any] | None) -> bool:
    """Whether this DeepSpeed configuration shards parameters (ZeRO-3)."""
    return deepspeed_config is not None and deepspeed_config.get("zero_optimization", {}).get("stage") == 3


def load_model(
    name_or_path: str,
    kind: Kind,
    *,
    dtype: str,
    deepspeed_config: dict[str, Any] | None = None,
    dropout: float | None = None,
    head_dropout: float | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A Hugging Face model with the head of `kind`; under ZeRO-3 (by `deepspeed_config`) weights are cut as read.

    Only rank 0 reads the weights then (memory-mapped), and only its page cache ever sees a whole model.
    dropout: set on every dropout of the model; None keeps the checkpoint's. head_dropout: likewise, of the one
    before the task head. attn_implementation: None: transformers' choice.
    What its files lack, `check_weights` names before. Raises ModelError if it cannot be loaded, or not whole.
    """
    # transformers shards in from_pretrained while this object lives
    sharding = HfDeepSpeedConfig(deepspeed_config) if is_sharded(deepspeed_config) else None
    config = load_config(name_or_path, trust_remote_code)
    if dropout is not None:
        set_dropout(config, dropout)
    if head_dropout is not None:
        set_head_dropout(config, head_dropout)
    try:
        model: PreTrainedModel
        model, found = AUTO_CLASSES[kind].from_pretrained(
            name_or_path,
            config=config,
            dtype=DTYPES[dtype],
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (ImportError, OSError, ValueError) as error:
        how = "" if attn_implementation is None else f" with attn_implementation: {attn_implementation}"
        raise ModelError(f"model {name_or_path!r} could not be loaded{how}: {load_failure(error)}") from error
    finally:
        del sharding
    if missing := found["missing_keys"]:  # the final norm of a DeepSeek-V4, if it is loaded into shards
        raise ModelError(
            f"model {name_or_path!r}: transformers does not load {min(missing)} out of its files if it is sharded: set "
            "teacher.sharding: replicated, or for a student deepspeed: ds_configs/zero1.json"
        )
    if is_sharded(deepspeed_config):
        for module, weight in family_of(config).external_weights(model):
            deepspeed.zero.register_external_parameter(module, weight)
    return model


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Recomputes a Hugging Face model's blocks in backward, non-reentrantly.

    Reentrant checkpointing would run the blocks without gradients, and the layer loss would lose its own.
    """
    with warnings.catch_warnings():
        # the alias lives through all of transformers 5, its successor only since 5.2x
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def meta_model(name_or_path: str, kind: Kind, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model from its config alone, on the meta device; ModelError if its family has no such head."""
    config = load_config(name_or_path, trust_remote_code)
    try:
        return on_meta(config, kind, trust_remote_code=trust_remote_code)
    except ValueError as error:
        what = ", an encoder-decoder," if getattr(config, "is_encoder_decoder", False) else ","
        raise ModelError(
            f"model {name_or_path!r}, a {config.model_type}{what} has no head for {kind} in transformers: give a model "
            "that has"
        ) from error


def on_meta(config: PreTrainedConfig, kind: Kind, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a config, without weights; ValueError if its family has no such head."""
    with torch.device("meta"):
        model: PreTrainedModel = AUTO_CLASSES[kind].from_config(config, trust_remote_code=trust_remote_code)
    return model


def sharded_init(deepspeed_config: dict[str, Any] | None) -> AbstractContextManager[Any]:
    """A context in which new modules are sharded as they are made, if the configuration shards parameters."""
    if not is_sharded(deepspeed_config):
        return nullcontext()
    context: AbstractContextManager[Any] = deepspeed.zero.Init(config_dict_or_path=deepspeed_config)
    return context


def gathered(parameters: list[nn.Parameter], *, write: bool = False) -> AbstractContextManager[Any]:
    """The parameters whole inside the context, on every rank; with `write`, rank 0's changes are kept."""
    sharded = [p for p in parameters if hasattr(p, "ds_id")]
    rank = 0 if write else None
    context: AbstractContextManager[Any]
    context = deepspeed.zero.GatheredParameters(sharded, modifier_rank=rank, enabled=bool(sharded))
    return context


def whole_tensors(module: nn.Module, *, keep: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Each parameter of `module` by name, whole, on the CPU, gathered one at a time; a collective.

    keep: False on ranks that only take part in gathering; they get nothing.
    """
    for name, parameter in module.named_parameters():
        with gathered([parameter]):
            if keep:
                yield name, parameter.detach().to("cpu", copy=True)


def load_tensors(module: nn.Module, path: Path, *, is_main: bool) -> None:
    """Fills `module`'s parameters from safetensors, one at a time; a collective.

    Raises CheckpointError if names or shapes differ.
    """
    with safe_open(path, framework="pt") as stored:
        own = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in module.named_parameters()}
        there = {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
        if own != there:
            differing = sorted(n for n in own.keys() | there.keys() if own.get(n) != there.get(n))
            raise CheckpointError(
                f"{path} does not fit: {differing[0]} is {there.get(differing[0])}, "
                f"expected {own.get(differing[0])}; delete its folder to learn it anew"
            )
        for name, parameter in module.named_parameters():
            with gathered([parameter], write=True), torch.no_grad():
                if is_main or not hasattr(parameter, "ds_id"):
                    parameter.copy_(stored.get_tensor(name))


def resident_readout(model: PreTrainedModel, device: torch.device) -> tuple[nn.Module, Head]:
    """The final norm and the LM head of a frozen model, whole on this rank; a collective.

    The norm is a module of its own, without ZeRO-3's hooks, made from the model's config. Weights are
    copied only if they are sharded.
    """
    structure = find_structure(model)
    with torch.device("meta"):
        norm = find_structure(type(model)(model.config)).final_norm
    head = structure.lm_head
    owned = [p for p in (*structure.final_norm.parameters(), *head.parameters())]
    with gathered(owned):
        state = {name: _resident(p, device) for name, p in structure.final_norm.named_parameters()}
        weight, bias = (None if p is None else _resident(p, device) for p in (head.weight, head.bias))
    norm.load_state_dict(state, assign=True)
    assert weight is not None
    return norm.requires_grad_(False), Head(weight, bias, softcap=structure.logit_softcap, scale=structure.logit_scale)


def load_config(name_or_path: str, trust_remote_code: bool) -> PreTrainedConfig:
    """The config of a folder or hub model; ModelError if there is none, or it is no model of transformers."""
    _refuse_other_formats(name_or_path)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"model {name_or_path!r} could not be found: {load_failure(error)}") from error
    return config


def _refuse_other_formats(name_or_path: str) -> None:
    folder = Path(name_or_path)
    if name_or_path.endswith(".gguf") or (folder.is_dir() and any(folder.glob("*.gguf"))):
        raise ModelError(
            f"model {name_or_path!r} is a GGUF file, quantized for inference: give the Hugging Face model that it was "
            "made of"
        )
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ModelError(
            f"model {name_or_path!r} is an adapter (LoRA), not a model: merge it by PEFT's merge_and_unload(), save "
            "that by save_pretrained(FOLDER), and give FOLDER"
        )


def _resident(parameter: torch.Tensor, device: torch.device) -> torch.Tensor:
    whole = parameter.detach().to(device)
    return whole.clone() if hasattr(parameter, "ds_id") else whole
