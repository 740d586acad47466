"""Stage 0: the initial student, cut out of the teacher's files or made at random."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

from ted_ds.config.sections import InitConfig
from ted_ds.config.tasks import Kind
from ted_ds.errors import ModelError, in_a_line
from ted_ds.job.files import new_folder
from ted_ds.models.channels import Sizes, WeightScores, cut
from ted_ds.models.families import Part, fitting_axes, set_sizes, sizes_of
from ted_ds.models.layer_map import keep_blocks
from ted_ds.models.loading import meta_model
from ted_ds.models.random_start import write_random
from ted_ds.models.structure import find_blocks
from ted_ds.models.weight_files import WeightReader, copy_companions, write_weights

FIRST_BLOCKS = ("max_window_layers", "first_k_dense_replace", "num_dense_layers")
"""Fields of configs that count first blocks of another kind."""

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
    with new_folder(output_dir) as folder:
        if init.config is not None:
            write_random(init.config, defaults or {}, kind, folder, seed, trust_remote_code)
        elif teacher is not None:
            _write_cut(plan_cut(teacher, init, kind, trust_remote_code), teacher, folder)
        else:
            raise ModelError("student.init cuts the student out of a teacher: give teacher.model")


@dataclass(frozen=True)
class CutPlan:
    """Teacher and student without weights.

    student: on the meta device. blocks: of the teacher, in the student's order. total: how many the teacher has.
    stack: the parameters' path of its blocks. unused: patterns of names in the files that the model has no use for.
    """

    student: PreTrainedModel
    blocks: tuple[int, ...]
    total: int
    stack: str
    unused: tuple[str, ...]
    teacher_sizes: Sizes
    sizes: Sizes


def plan_cut(teacher: str, init: InitConfig, kind: Kind, trust_remote_code: bool) -> CutPlan:
    """What a student cut out of `teacher` will be, by configs alone; ModelError if it cannot be."""
    whole = meta_model(teacher, kind, trust_remote_code=trust_remote_code)
    config = whole.config
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"teacher {teacher} is quantized: Stage 0 cuts plain weights, give the original")
    structure = find_blocks(whole)
    blocks = keep_blocks(init.blocks, init.num_blocks, structure.num_blocks)
    teacher_sizes = sizes_of(config)
    sizes = _requested(init, config, teacher_sizes)
    student_config = _student_config(config, blocks, structure.num_blocks, sizes, teacher_sizes)
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
    return CutPlan(student, blocks, structure.num_blocks, structure.blocks_path, unused, teacher_sizes, sizes)


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


@dataclass(frozen=True)
class Source:
    """Where a tensor of the student comes from: the name in the teacher's file, and the block (None: no block)."""

    name: str
    block: int | None


def _write_cut(plan: CutPlan, teacher: str, folder: Path) -> None:
    reader = WeightReader(teacher)
    sources = _sources(plan, reader, teacher)
    shapes = _cut_shapes(plan, reader, sources, teacher)
    kept = _kept(plan, reader, sources)

    def make(name: str) -> torch.Tensor:
        source = sources[name]
        tensor = reader.read(source.name)
        axes = fitting_axes(source.name, tensor.shape, plan.teacher_sizes)
        return cut(tensor, axes, kept.get(source.block, {}), plan.teacher_sizes)

    itemsizes = {name: reader.read(source.name).element_size() for name, source in sources.items()}  # memory-mapped
    write_weights(folder, {name: size * shapes[name].numel() for name, size in itemsizes.items()}, make)
    plan.student.config.save_pretrained(folder)
    copy_companions(teacher, folder)


def _sources(plan: CutPlan, reader: WeightReader, teacher: str) -> dict[str, Source]:
    """A tensor's name in the student's file -> its source. Only the numbers of blocks differ.

    So the files may spell names, and split or join tensors, in any way that transformers understands.
    """
    stack = _stack_in_files(plan, reader, teacher)
    position = {block: i for i, block in enumerate(plan.blocks)}
    sources: dict[str, Source] = {}
    for name in reader:
        if found := re.match(rf"{re.escape(stack)}\.(\d+)\.(.*)", name):
            if (block := int(found[1])) in position:
                sources[f"{stack}.{position[block]}.{found[2]}"] = Source(name, block)
        elif not any(re.search(pattern, name) for pattern in plan.unused):
            sources[name] = Source(name, None)
    return sources


def _stack_in_files(plan: CutPlan, reader: WeightReader, teacher: str) -> str:
    """How the files spell the path of the blocks: what stands before a number, for all numbers of the teacher's blocks.

    Of several (a vision tower has blocks too) the one that ends most like the path in the model.
    """
    numbers: dict[str, set[int]] = {}
    for name in reader:
        if any(re.search(pattern, name) for pattern in plan.unused):
            continue
        if found := re.match(r"(.*?)\.(\d+)\.", name):
            numbers.setdefault(found[1], set()).add(int(found[2]))
    stacks = [stack for stack, there in numbers.items() if there >= set(range(plan.total))]
    if not stacks:
        raise ModelError(
            f"the files of teacher {teacher} number no {plan.total} blocks: Stage 0 cannot tell them apart"
        )
    wanted = plan.stack.split(".")[::-1]

    def alike(stack: str) -> int:
        pairs = zip(wanted, stack.split(".")[::-1], strict=False)
        return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))

    best = max(map(alike, stacks))
    likely = [stack for stack in stacks if alike(stack) == best]
    if len(likely) > 1:
        raise ModelError(f"the files of teacher {teacher} have more than one stack of blocks: {', '.join(likely)}")
    return likely[0]


def _cut_shapes(plan: CutPlan, reader: WeightReader, sources: dict[str, Source], teacher: str) -> dict[str, torch.Size]:
    """The shapes of the student's tensors, by their names in its file.

    Raises ModelError, before a weight is read, if nothing follows a size, or transformers does not find in these names
    and shapes exactly the student.
    """
    asked = {part for part, size in plan.sizes.items() if size != plan.teacher_sizes[part]}
    follow: set[Part] = set()
    shapes = {}
    for name, source in sources.items():
        shape = list(reader.read(source.name).shape)
        for dim, axis in enumerate(fitting_axes(source.name, shape, plan.teacher_sizes)):
            if axis is not None:
                shape[dim] = shape[dim] // plan.teacher_sizes[axis.part] * plan.sizes[axis.part]
                follow.add(axis.part)
        shapes[name] = torch.Size(shape)
    for part in sorted(asked - follow - {Part.KV_HEAD}):  # GPT-2 has none of their own
        raise _uncut(teacher, f"no weight that ted_ds knows follows {part}")
    empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    family: Any = type(plan.student)
    _, found = family.from_pretrained(
        None,
        config=copy.deepcopy(plan.student.config),
        state_dict=empty,
        device_map="meta",
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    for name, there, wanted in sorted(found["mismatched_keys"]):
        raise _uncut(teacher, f"{name} would be {tuple(there)}, the student's config wants {tuple(wanted)}")
    for name in sorted(found["missing_keys"]):
        raise _uncut(teacher, f"the student would lack {name}")
    for name in found["unexpected_keys"] & shapes.keys():
        if sources[name].block is not None:
            raise _uncut(teacher, f"the student has no place for {name}")
        del shapes[name], sources[name]
    return shapes


def _uncut(teacher: str, reason: str) -> ModelError:
    return ModelError(f"teacher {teacher} cannot be cut so: {reason}; ask for another cut, or give student.init.config")


def _kept(plan: CutPlan, reader: WeightReader, sources: Mapping[str, Source]) -> Kept:
    """The parts that stay, by block; empty if the width is not cut."""
    sizes, teacher = plan.sizes, plan.teacher_sizes
    if sizes == teacher:
        return {}
    scores = WeightScores(teacher)
    for source in sources.values():
        tensor = reader.read(source.name)
        if len(axes := fitting_axes(source.name, tensor.shape, teacher)) == 2:
            scores.add(source.block, axes, tensor)
    channels = {Part.CHANNEL: scores.channels(sizes[Part.CHANNEL])}
    kept: dict[int | None, dict[Part, torch.Tensor]] = {None: channels}
    for block in plan.blocks:
        heads, kv_heads = scores.heads(block, sizes[Part.HEAD], sizes[Part.KV_HEAD])
        units = scores.units(block, sizes[Part.UNIT])
        kept[block] = channels | {Part.HEAD: heads, Part.KV_HEAD: kv_heads, Part.UNIT: units}
    return kept
