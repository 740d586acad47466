"""Stage 0: the initial student, cut out of the teacher's files or made at random."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from ted_ds.config.sections import InitConfig
from ted_ds.config.tasks import KINDS, Kind
from ted_ds.errors import ModelError
from ted_ds.models.channels import Sizes, WeightScores, cut
from ted_ds.models.families import IN_FILES, Part, axes_of, set_sizes, sizes_of
from ted_ds.models.layer_map import keep_blocks
from ted_ds.models.loading import load_config, on_meta
from ted_ds.models.structure import find_blocks, find_structure
from ted_ds.models.task_head import AUTO_CLASSES
from ted_ds.models.weight_files import WeightReader, copy_companions, write_weights

Kept = Mapping[int | None, Mapping[Part, torch.Tensor]]
"""Teacher block (None: outside the blocks) -> the parts that stay there."""


def init_student(
    teacher: str | None,
    init: InitConfig,
    output_dir: Path,
    *,
    kind: Kind = "causal-lm",
    seed: int = 0,
    defaults: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Writes the initial student, a model of `kind`, as a Hugging Face folder, renamed into place when it is whole.

    With `init.config`: a random start under `seed`; `defaults` are fields that the config may leave out, such as
    the tokenizer's vocab_size. Else blocks and parts of `teacher` (folder or hub id), everything else copied,
    dtype kept. The teacher is read one tensor at a time, twice if its width is cut (see `WeightScores` for what
    stays), and at most one output shard of 5 GB is held. The head width always stays the teacher's; so do
    Gemma's scales, whose embeddings thus enter a narrower student smaller by sqrt(D_s / D_t).

    Raises ModelError if the request does not fit the teacher or its weights cannot be cut.
    """
    if output_dir.exists():
        raise ModelError(f"the student's folder {output_dir} exists already: delete it, or choose another")
    temporary = output_dir.with_name(output_dir.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    if init.config is not None:
        _write_random({**(defaults or {}), **init.config}, kind, temporary, seed, trust_remote_code)
    elif teacher is not None:
        _write_cut(plan_cut(teacher, init, kind, trust_remote_code), teacher, temporary)
    else:
        raise ModelError("student.init cuts the student out of a teacher: give teacher.model")
    temporary.rename(output_dir)


def _write_random(config: dict[str, Any], kind: Kind, folder: Path, seed: int, trust_remote_code: bool) -> None:
    try:
        model_config = AutoConfig.for_model(**config)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AUTO_CLASSES[kind].from_config(model_config, trust_remote_code=trust_remote_code)
    except (ValueError, StrictDataclassError) as error:
        what = "a causal LM" if KINDS[kind].lm_head else f"a model for {kind}"
        raise ModelError(f"student.init.config is not {what} of transformers: {_in_a_line(error)}") from error
    (find_structure if KINDS[kind].lm_head else find_blocks)(model)
    model.save_pretrained(folder)


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


@dataclass(frozen=True)
class CutPlan:
    """Teacher and student without weights.

    names: the student's tensors (tied ones once) -> the teacher's block (None: no block) and tensor. prefix: of the
    backbone's tensors.
    """

    config: PreTrainedConfig
    shapes: Mapping[str, torch.Size]
    names: Mapping[str, tuple[int | None, str]]
    blocks: tuple[int, ...]
    prefix: str
    teacher_sizes: Sizes
    sizes: Sizes


def plan_cut(teacher: str, init: InitConfig, kind: Kind, trust_remote_code: bool) -> CutPlan:
    """What a student cut out of `teacher` will be, by configs alone; ModelError if it cannot be."""
    config = load_config(teacher, trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"teacher {teacher} is quantized: Stage 0 cuts plain weights, give the original")
    whole = on_meta(config, kind, trust_remote_code=trust_remote_code)
    structure = find_blocks(whole)
    blocks = keep_blocks(init.blocks, init.num_blocks, structure.num_blocks)
    teacher_sizes = sizes_of(config)
    sizes = _requested(init, config, teacher_sizes)
    student_config = _student_config(config, blocks, structure.num_blocks, sizes, teacher_sizes)
    try:
        if hasattr(student_config, "validate"):  # Llama and Gemma want hidden_size to be a multiple of num_heads
            student_config.validate()
    except StrictDataclassError as error:
        raise ModelError(
            f"a {config.model_type} of the sizes in student.init cannot be: {_in_a_line(error)}"
        ) from error
    student = on_meta(student_config, kind, trust_remote_code=trust_remote_code)
    student_config.architectures = [type(student).__name__]
    tensors = student.state_dict(keep_vars=True)
    first: dict[int, str] = {}  # a tied tensor has several names
    for name, tensor in tensors.items():
        first.setdefault(id(tensor), name)
    return CutPlan(
        config=student_config,
        shapes={name: tensor.shape for name, tensor in tensors.items()},
        names={name: _in_teacher(name, structure.blocks_path, blocks) for name in first.values()},
        blocks=blocks,
        prefix=whole.base_model_prefix,
        teacher_sizes=teacher_sizes,
        sizes=sizes,
    )


def _in_teacher(name: str, path: str, blocks: tuple[int, ...]) -> tuple[int | None, str]:
    """The teacher's block and name of a tensor of the student."""
    if not name.startswith(f"{path}."):
        return None, name
    number, _, rest = name.removeprefix(f"{path}.").partition(".")
    return blocks[int(number)], f"{path}.{blocks[int(number)]}.{rest}"


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
    for field, value in list(vars(config).items()):
        if "layer" in field and isinstance(value, list | tuple) and len(value) == total:
            setattr(config, field, [value[b] for b in blocks])
    if isinstance(window := getattr(config, "max_window_layers", None), int):
        config.max_window_layers = sum(b < window for b in blocks)
    if sizes != teacher:
        set_sizes(config, sizes)
    return config


def _write_cut(plan: CutPlan, teacher: str, folder: Path) -> None:
    reader = WeightReader(teacher)
    sources = _sources(plan, reader, teacher)
    kept = _kept(plan, reader, sources)

    def make(ours: str) -> torch.Tensor:
        name, theirs = sources[ours]
        tensor = cut(reader.read(theirs), axes_of(name), kept.get(plan.names[name][0], {}), plan.teacher_sizes)
        if tensor.shape != plan.shapes[name]:
            raise ModelError(
                f"parameter {theirs} of teacher {teacher} cannot be cut: it would be {tuple(tensor.shape)}, the "
                f"student's config wants {tuple(plan.shapes[name])}; cut blocks alone, or give student.init.config"
            )
        return tensor

    itemsizes = {ours: reader.read(theirs).element_size() for ours, (_, theirs) in sources.items()}  # memory-mapped
    write_weights(
        folder, {ours: size * plan.shapes[sources[ours][0]].numel() for ours, size in itemsizes.items()}, make
    )
    plan.config.save_pretrained(folder)
    copy_companions(teacher, folder)


def _sources(plan: CutPlan, reader: WeightReader, teacher: str) -> dict[str, tuple[str, str]]:
    """A tensor's name in the student's file -> (its name in the student, its source's name in the teacher's file).

    Files spell names with or without the backbone's prefix; the student's file follows the teacher's.
    """

    def spellings(name: str) -> tuple[str, ...]:
        return name, name.removeprefix(f"{plan.prefix}."), f"{plan.prefix}.{name}", IN_FILES.get(name, name)

    sources: dict[str, tuple[str, str]] = {}
    for name, (_, source) in plan.names.items():
        pairs = zip(spellings(name), spellings(source), strict=True)
        found = next(((ours, theirs) for ours, theirs in pairs if theirs in reader), None)
        if found is None:
            raise ModelError(
                f"the weights of teacher {teacher} lack {source}: save it anew by transformers' save_pretrained"
            )
        sources[found[0]] = name, found[1]
    return sources


def _kept(plan: CutPlan, reader: WeightReader, sources: Mapping[str, tuple[str, str]]) -> Kept:
    """The parts that stay, by block; empty if the width is not cut."""
    sizes, teacher = plan.sizes, plan.teacher_sizes
    if sizes == teacher:
        return {}
    scores = WeightScores(teacher)
    for name, theirs in sources.values():
        if len(axes := axes_of(name)) == 2:
            scores.add(plan.names[name][0], axes, reader.read(theirs))
    channels = {Part.CHANNEL: scores.channels(sizes[Part.CHANNEL])}
    kept: dict[int | None, dict[Part, torch.Tensor]] = {None: channels}
    for block in plan.blocks:
        heads, kv_heads = scores.heads(block, sizes[Part.HEAD], sizes[Part.KV_HEAD])
        units = scores.units(block, sizes[Part.UNIT])
        kept[block] = channels | {Part.HEAD: heads, Part.KV_HEAD: kv_heads, Part.UNIT: units}
    return kept
