"""What a student cut out of a teacher will be: its sizes, its config, its blocks; by configs alone."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

from ted_ds.config.student_section import InitConfig
from ted_ds.config.tasks import Kind
from ted_ds.errors import ModelError, in_a_line
from ted_ds.models.channels import Sizes
from ted_ds.models.families import Part, set_sizes, sizes_of
from ted_ds.models.layer_map import keep_blocks
from ted_ds.models.loading import meta_model
from ted_ds.models.rotation import Roles, rotation_roles
from ted_ds.models.structure import find_blocks
from ted_ds.models.tiny import tiny_model

FIRST_BLOCKS = ("max_window_layers", "first_k_dense_replace", "num_dense_layers")
"""Fields of configs that count first blocks of another kind."""


@dataclass(frozen=True)
class CutPlan:
    """Teacher and student without weights.

    teacher, student: on the meta device. blocks: of the teacher, in the student's order. total: how many the teacher
    has. stack: the parameters' path of its blocks. unused: patterns of names in the files that the model has no use
    for. roles: of the tensors, if hidden states are rotated.
    """

    teacher: PreTrainedModel
    student: PreTrainedModel
    blocks: tuple[int, ...]
    total: int
    stack: str
    unused: tuple[str, ...]
    teacher_sizes: Sizes
    sizes: Sizes
    roles: Roles | None


def plan_cut(teacher: str, init: InitConfig, kind: Kind, trust_remote_code: bool) -> CutPlan:
    """What a student cut out of `teacher` will be, by configs alone; ModelError if it cannot be."""
    if init.parameters is not None:
        raise ModelError(
            "student.init.parameters needs a run's data, as `ted-ds init-student` has it: give sizes in its place"
        )
    whole = meta_model(teacher, kind, trust_remote_code=trust_remote_code)
    config = whole.config
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"teacher {teacher} is quantized: Stage 0 cuts plain weights, give the original")
    structure = find_blocks(whole)
    blocks = keep_blocks(init.blocks, init.num_blocks, structure.num_blocks)
    teacher_sizes = sizes_of(config)
    sizes = _requested(init, config, teacher_sizes)
    student_config = _student_config(config, blocks, structure.num_blocks, sizes, teacher_sizes)
    narrower = sizes.get(Part.CHANNEL) != teacher_sizes.get(Part.CHANNEL)
    roles = find_roles(whole) if narrower else None
    if roles is not None:
        student_config.tie_word_embeddings = False
        student_config.rms_norm_eps *= teacher_sizes[Part.CHANNEL] / sizes[Part.CHANNEL]
    try:
        if hasattr(student_config, "validate"):  # Llama and Gemma want hidden_size to be a multiple of num_heads
            student_config.validate()
        with torch.device("meta"):
            student = type(whole)(student_config)
    except (StrictDataclassError, ValueError, AssertionError, RuntimeError, TypeError) as error:
        raise ModelError(f"a {config.model_type} of the sizes in student.init cannot be: {in_a_line(error)}") from error
    if (found := find_blocks(student).num_blocks) != len(blocks):
        raise ModelError(f"a {config.model_type} of {len(blocks)} blocks has {found}: give student.init.config")
    student.config.architectures = [type(student).__name__]
    unused = tuple(getattr(whole, "_keys_to_ignore_on_load_unexpected", None) or ())
    stack = structure.blocks_path
    return CutPlan(whole, student, blocks, structure.num_blocks, stack, unused, teacher_sizes, sizes, roles)


def find_roles(model: PreTrainedModel) -> Roles | None:
    """See `rotation_roles`; None if hidden states of this family cannot be rotated."""
    try:
        return rotation_roles(tiny_model(model))
    except ModelError:
        return None


def _requested(init: InitConfig, config: PreTrainedConfig, teacher: Sizes) -> Sizes:
    asked = {
        Part.CHANNEL: init.hidden_size,
        Part.HEAD: init.num_heads,
        Part.UNIT: init.intermediate_size,
    }
    given = {part: size for part, size in asked.items() if size is not None}
    if not given:
        return teacher
    for part, size in given.items():
        if part not in teacher:
            raise ModelError(f"student.init.{part}: the teacher's config ({config.model_type}) names no such size")
        if size > teacher[part]:
            raise ModelError(f"student.init.{part} is {size}, the teacher has {teacher[part]}: it can only shrink")
    if missing := [part for part in Part if part not in teacher]:
        raise ModelError(f"the width of a {config.model_type} cannot be cut: its config names no {missing[0]}")
    if not hasattr(config, "num_key_value_heads"):
        given = _with_fitting_heads(given, teacher)
    sizes = {**teacher, **given}
    return {**sizes, Part.KV_HEAD: _kv_heads(sizes[Part.HEAD], teacher)}


def _with_fitting_heads(given: dict[Part, int], teacher: Sizes) -> dict[Part, int]:
    """GPT-2, GPT-NeoX and OPT have hidden_size = heads * head width: derives the heads, or checks them."""
    head_dim = teacher[Part.CHANNEL] // teacher[Part.HEAD]
    width = given.get(Part.CHANNEL, teacher[Part.CHANNEL])
    heads = given.get(Part.HEAD, width // head_dim)
    if width != heads * head_dim:
        raise ModelError(
            f"student.init.hidden_size ({width}) must be num_heads ({heads}) * the teacher's head width "
            f"({head_dim}) = {heads * head_dim} in this family"
        )
    return {**given, Part.HEAD: heads}


def _kv_heads(heads: int, teacher: Sizes) -> int:
    kv = teacher[Part.KV_HEAD]
    group = teacher[Part.HEAD] // kv
    if heads % kv == 0:
        return kv
    if heads % group == 0:
        return heads // group
    raise ModelError(
        f"student.init.num_heads is {heads}; the teacher's {teacher[Part.HEAD]} heads share {kv} key-value heads: "
        f"choose a multiple of {kv} (fewer heads a group) or of {group} (fewer groups)"
    )


def _student_config(
    config: PreTrainedConfig, blocks: tuple[int, ...], total: int, sizes: Sizes, teacher: Sizes
) -> PreTrainedConfig:
    """A copy with the student's sizes; what a config says block by block is cut like the blocks."""
    if getattr(config, "scale_attn_by_inverse_layer_idx", False) and blocks != tuple(range(len(blocks))):
        raise ModelError(
            f"the teacher scales attention by block number (scale_attn_by_inverse_layer_idx): blocks {list(blocks)} "
            "would change their scale; use student.init.blocks: first"
        )
    config = copy.deepcopy(config)
    config.num_hidden_layers = len(blocks)
    if isinstance(scale := getattr(config, "scale_depth", None), float | int):  # MiniCPM: over the root of the depth
        config.scale_depth = scale * (len(blocks) / total) ** 0.5
    for field, value in list(vars(config).items()):
        if "layer" in field and isinstance(value, list | tuple) and len(value) == total:
            setattr(config, field, [value[b] for b in blocks])
    for field in FIRST_BLOCKS:
        if isinstance(first := getattr(config, field, None), int):
            setattr(config, field, sum(b < first for b in blocks))
    if sizes != teacher:
        set_sizes(config, sizes)
    return config
