"""Stage 0: the initial student, cut out of the teacher's files or made at random."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ted_ds.config.student_section import InitConfig
from ted_ds.config.tasks import Kind
from ted_ds.errors import ModelError
from ted_ds.job.files import new_folder
from ted_ds.models.channels import ActivationScores, Measurements, PartScores, WeightScores, cut
from ted_ds.models.cut_plan import CutPlan, plan_cut
from ted_ds.models.families import Part, fitting_axes
from ted_ds.models.random_start import write_random
from ted_ds.models.rotation import Roles, Rotation, within
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
    measured: Measurements | None = None,
) -> None:
    """Writes the initial student, a model of `kind`, as a Hugging Face folder, renamed into place when it is whole.

    With `init.config`: a random start under `seed`; `defaults` are fields that the config may leave out, such as
    the tokenizer's vocab_size. Else blocks and parts of `teacher` (folder or hub id), everything else copied,
    dtype kept. The teacher is read one tensor at a time, twice if its width is cut, and at most one output shard of
    5 GB is held. The head width always stays the teacher's. `teacher` stands for `init.model`.

    measured: what decides on the width, see `rotation` and `ActivationScores`; an LM head that is tied to the
    embeddings is untied by a rotation. None: weight norms decide, see `WeightScores`.

    Raises ModelError if the request does not fit the teacher or its weights cannot be cut.
    """
    if output_dir.exists():
        raise ModelError(f"the student's folder {output_dir} exists already: delete it, or choose another")
    with new_folder(output_dir) as folder:
        if init.config is not None:
            write_random(init.config, defaults or {}, kind, folder, seed, trust_remote_code)
        elif teacher is not None:
            plan = plan_cut(teacher, init, kind, trust_remote_code, rotates=measured is not None)
            _write_cut(plan, teacher, folder, measured)
        else:
            raise ModelError("student.init cuts the student out of a teacher: give teacher.model")


@dataclass(frozen=True)
class Source:
    """Where a tensor of the student comes from: the name in the teacher's file, and the block (None: no block).

    role: the name of its role, if that is not its own: an LM head that was tied comes from the embeddings.
    """

    name: str
    block: int | None
    role: str | None = None


def check_cut(teacher: str, init: InitConfig, kind: Kind, trust_remote_code: bool) -> CutPlan:
    """The plan of a cut, once names and shapes in the teacher's files are known to give the student; nothing is read.

    Raises ModelError if they do not.
    """
    plan, reader = plan_cut(teacher, init, kind, trust_remote_code), WeightReader(teacher)
    _cut_shapes(plan, reader, _sources(plan, reader, _stack_in_files(plan, reader, teacher)), teacher)
    return plan


def _write_cut(plan: CutPlan, teacher: str, folder: Path, measured: Measurements | None) -> None:
    reader = WeightReader(teacher)
    stack = _stack_in_files(plan, reader, teacher)
    sources = _sources(plan, reader, stack)
    shapes = _cut_shapes(plan, reader, sources, teacher)
    kept = _kept(plan, reader, sources, stack, measured)
    turn = None
    if plan.roles is not None:
        assert measured is not None and measured.basis is not None
        turn = _turning(Rotation(plan.roles, measured.basis[:, : plan.sizes[Part.CHANNEL]]), reader, stack)

    def make(name: str) -> torch.Tensor:
        source = sources[name]
        tensor = reader.read(source.name)
        axes = fitting_axes(source.name, tensor.shape, plan.teacher_sizes)
        tensor = cut(tensor, axes, kept.get(source.block, {}), plan.teacher_sizes)
        return tensor if turn is None else turn(source, tensor)

    itemsizes = {name: reader.read(source.name).element_size() for name, source in sources.items()}  # memory-mapped
    write_weights(folder, {name: size * shapes[name].numel() for name, size in itemsizes.items()}, make)
    plan.student.config.save_pretrained(folder)
    copy_companions(teacher, folder)


def _turning(rotation: Rotation, reader: WeightReader, stack: str) -> Callable[[Source, torch.Tensor], torch.Tensor]:
    """(source, tensor) -> the tensor in the basis of the student."""
    roles = rotation.roles
    outside = {within(name, stack): name for name in reader if not name.startswith(f"{stack}.")}

    def turn(source: Source, tensor: torch.Tensor) -> torch.Tensor:
        role = roles.by_name.get(source.role or within(source.name, stack))
        if role is None:
            return tensor
        gain = None
        if role.norm is not None:
            norm = outside[role.norm] if source.block is None else f"{stack}.{source.block}.{role.norm}"
            gain = rotation.gain(roles.by_name[role.norm], reader.read(norm))
        return rotation.turned(role, tensor, gain)

    return turn


def _sources(plan: CutPlan, reader: WeightReader, stack: str) -> dict[str, Source]:
    """A tensor's name in the student's file -> its source. Only the numbers of blocks differ.

    So the files may spell names, and split or join tensors, in any way that transformers understands.
    """
    position = {block: i for i, block in enumerate(plan.blocks)}
    sources: dict[str, Source] = {}
    for name in reader:
        if found := re.match(rf"{re.escape(stack)}\.(\d+)\.(.*)", name):
            if (block := int(found[1])) in position:
                sources[f"{stack}.{position[block]}.{found[2]}"] = Source(name, block)
        elif not any(re.search(pattern, name) for pattern in plan.unused):
            sources[name] = Source(name, None)
    if plan.roles is not None:
        _untie(plan, plan.roles, sources, stack)
    return sources


def _untie(plan: CutPlan, roles: Roles, sources: dict[str, Source], stack: str) -> None:
    """Adds the LM head or the embeddings, if the files have one tensor for both."""
    names = {within(name, stack): name for name in sources}
    embedding = next(name for name, role in roles.by_name.items() if role.kind == "embedding")
    for lacking, other in ((roles.head, embedding), (embedding, roles.head)):
        if lacking not in names and other in names:
            own = next(n for n, _ in plan.student.named_parameters() if within(n, plan.stack) == lacking)
            sources[own] = Source(sources[names[other]].name, None, role=lacking)


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
    found = _as_loaded(plan.student, shapes)
    for name, there, wanted in sorted(found["mismatched_keys"]):
        raise _uncut(teacher, f"{name} would be {tuple(there)}, the student's config wants {tuple(wanted)}")
    for name in sorted(found["missing_keys"]):
        raise _uncut(teacher, f"the student would lack {name}")
    if unused := found["unexpected_keys"] & shapes.keys():
        outside = {s.name: reader.read(s.name).shape for s in sources.values() if s.block is None}
        unused_by_teacher = _as_loaded(plan.teacher, outside)["unexpected_keys"]
        for name in unused:
            if sources[name].name not in unused_by_teacher:
                raise _uncut(teacher, f"the student has no place for {name}")
            del shapes[name], sources[name]
    return shapes


def _as_loaded(model: PreTrainedModel, shapes: Mapping[str, torch.Size]) -> dict[str, set[Any]]:
    """What transformers says of files with tensors of these names and shapes, as weights of `model`."""
    family: Any = type(model)
    _, found = family.from_pretrained(
        None,
        config=copy.deepcopy(model.config),
        state_dict={name: torch.empty(shape, device="meta") for name, shape in shapes.items()},
        device_map="meta",
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    report: dict[str, set[Any]] = found
    return report


def _uncut(teacher: str, reason: str) -> ModelError:
    return ModelError(f"teacher {teacher} cannot be cut so: {reason}; ask for another cut, or give student.init.config")


def units_that_stay(
    teacher: str, cuts: Sequence[InitConfig], kind: Kind, measured: Measurements, *, trust_remote_code: bool
) -> list[dict[int, torch.Tensor]]:
    """For each of these cuts, which keep the same blocks: block -> the FFN units that stay; on one rank."""
    plan, reader = plan_cut(teacher, cuts[0], kind, trust_remote_code), WeightReader(teacher)
    stack = _stack_in_files(plan, reader, teacher)
    scores = _scores(plan, reader, _sources(plan, reader, stack), stack, measured)
    return [
        {block: scores.units(block, units) for block in plan.blocks} if (units := cut.intermediate_size) else {}
        for cut in cuts
    ]


def _scores(
    plan: CutPlan, reader: WeightReader, sources: Mapping[str, Source], stack: str, measured: Measurements | None
) -> PartScores:
    teacher = plan.teacher_sizes
    scores = WeightScores(teacher) if measured is None else ActivationScores(teacher, measured)
    for source in sources.values():
        tensor = reader.read(source.name)
        if len(axes := fitting_axes(source.name, tensor.shape, teacher)) == 2:
            scores.add(source.block, within(source.name, stack), axes, tensor)
    return scores


def _kept(
    plan: CutPlan, reader: WeightReader, sources: Mapping[str, Source], stack: str, measured: Measurements | None
) -> Kept:
    """The parts that stay, by block; empty if the width is not cut. Channels stay that are rotated."""
    sizes = plan.sizes
    if sizes == plan.teacher_sizes:
        return {}
    scores = _scores(plan, reader, sources, stack, measured)
    channels = {} if plan.roles is not None else {Part.CHANNEL: scores.channels(sizes[Part.CHANNEL])}
    kept: dict[int | None, dict[Part, torch.Tensor]] = {None: channels}
    for block in plan.blocks:
        heads, kv_heads = scores.heads(block, sizes[Part.HEAD], sizes[Part.KV_HEAD])
        units = scores.units(block, sizes[Part.UNIT])
        kept[block] = channels | {Part.HEAD: heads, Part.KV_HEAD: kv_heads, Part.UNIT: units}
    return kept
