"""The tensors of a student that is cut out of its teacher's files, one at a time."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any

import torch
from transformers import PreTrainedModel

from ted_ds.errors import ModelError
from ted_ds.models.channels import Measurements, PartScores, cut
from ted_ds.models.cut_plan import CutPlan
from ted_ds.models.families import Part, fitting_axes, part_read
from ted_ds.models.least_squares import reading_basis
from ted_ds.models.rotation import Role, Roles, Rotation, in_basis, within
from ted_ds.models.weight_files import WeightReader


@dataclass(frozen=True)
class Source:
    """Where a tensor of the student comes from: the name in the teacher's file, and the block (None: no block).

    role: the name of its role, if that is not its own: an LM head that was tied comes from the embeddings.
    """

    name: str
    block: int | None
    role: str | None = None


class Cut:
    """The tensors of a student that is cut out of its teacher's files, one at a time.

    measured: see `init_student`. Raises ModelError, before a weight is read, if the files do not give the student.
    """

    def __init__(self, plan: CutPlan, teacher: str, measured: Measurements | None = None) -> None:
        self._plan, self._measured, self._reader = plan, measured, WeightReader(teacher)
        self._stack = _stack_in_files(plan, self._reader, teacher)
        self._sources = _sources(plan, self._reader, self._stack)
        self._shapes = _cut_shapes(plan, self._reader, self._sources, teacher)

    @cached_property
    def _scores(self) -> PartScores:
        sizes = self._plan.teacher_sizes
        scores = PartScores(sizes, self._needed())
        for source in self._sources.values():
            tensor = self._reader.read(source.name)
            if len(axes := fitting_axes(source.name, tensor.shape, sizes)) == 2:
                scores.add(source.block, within(source.name, self._stack), axes, tensor)
        return scores

    @cached_property
    def _kept(self) -> Mapping[int | None, Mapping[Part, torch.Tensor]]:
        """Teacher block (None: outside) -> the parts that stay; empty if the width is whole. Rotated channels stay."""
        sizes = self._plan.sizes
        if sizes == self._plan.teacher_sizes:
            return {}
        rotated = self._plan.roles is not None
        channels = {} if rotated else {Part.CHANNEL: self._scores.channels(sizes[Part.CHANNEL])}
        kept: dict[int | None, dict[Part, torch.Tensor]] = {None: channels}
        for block in self._plan.blocks:
            heads, kv_heads = self._scores.heads(block, sizes[Part.HEAD], sizes[Part.KV_HEAD])
            units = self._scores.units(block, sizes[Part.UNIT])
            kept[block] = channels | {Part.HEAD: heads, Part.KV_HEAD: kv_heads, Part.UNIT: units}
        return kept

    @cached_property
    def _rotation(self) -> Rotation | None:
        if self._plan.roles is None:
            return None
        basis = self._needed().basis
        assert basis is not None
        return Rotation(self._plan.roles, basis[:, : self._plan.sizes[Part.CHANNEL]])

    def _needed(self) -> Measurements:
        if self._measured is None:
            raise ModelError(
                "what the teacher does on data decides on a narrower student: make it with a recipe, by "
                "`ted-ds init-student --config RECIPE`"
            )
        return self._measured

    def units(self, keep: int) -> dict[int, torch.Tensor]:
        """Block of the teacher -> the FFN units that stay if it keeps so many."""
        return {block: self._scores.units(block, keep) for block in self._plan.blocks}

    def sizes(self) -> dict[str, int]:
        """Bytes of each tensor, by its name in the student's file."""
        itemsizes = {name: self._reader.read(source.name).element_size() for name, source in self._sources.items()}
        return {name: size * self._shapes[name].numel() for name, size in itemsizes.items()}

    def tensor(self, name: str, moments: torch.Tensor | None = None) -> torch.Tensor:
        """The student's tensor of this name, contiguous, in the teacher's dtype.

        moments: of what its matrix reads, as `Calibration.moments` gives them for its place in `readers`. With them
        what is left makes up for what is gone, by least squares.
        """
        source, sizes = self._sources[name], self._plan.teacher_sizes
        tensor, role = self._reader.read(source.name), self._role(source)
        axes, kept = fitting_axes(source.name, tensor.shape, sizes), self._kept.get(source.block, {})
        if moments is not None and (dim := self._cut_input(source)) is not None:
            inputs = cut(torch.arange(tensor.shape[dim])[None], (None, axes[dim]), kept, sizes)[0]
            reading = reading_basis(moments, inputs)
            tensor = in_basis(tensor, dim, reading)
            axes = tuple(None if i == dim else axis for i, axis in enumerate(axes))
        tensor = cut(tensor, axes, kept, sizes)
        if self._rotation is None or role is None:
            return tensor.contiguous()
        basis = self._rotation.basis
        if moments is not None and role.kind == "reader":
            basis = reading_basis(moments, basis)
        return self._rotation.turned(role, tensor, self._gain(source, role), basis)

    @cached_property
    def readers(self) -> dict[str, list[str]]:
        """Where the student reads less than its teacher -> the student's tensors that read there.

        Named as in `WidthPoints`: a norm of rotated hidden states, or the matrix itself that reads heads or units.
        """
        found: dict[str, list[str]] = {}
        for name, source in self._sources.items():
            if (role := self._role(source)) is not None and role.norm is not None:
                own = role.norm
            elif self._cut_input(source) is not None:
                own = within(source.name, self._stack)
            else:
                continue
            found.setdefault(own if source.block is None else f"{source.block}.{own}", []).append(name)
        return found

    def sites(self) -> dict[str, int]:
        """The places of `readers` -> how many inputs the teacher has there."""
        found = {}
        for site, (name, *_) in self.readers.items():
            source = self._sources[name]
            shape, dim = self._reader.read(source.name).shape, self._cut_input(source)
            found[site] = self._plan.teacher_sizes[Part.CHANNEL] if dim is None else shape[dim]
        return found

    def _cut_input(self, source: Source) -> int | None:
        """The dimension of the heads or units that a matrix reads, if the student has fewer."""
        part, sizes = part_read(source.name), self._plan.sizes
        if part is None or sizes[part] == self._plan.teacher_sizes[part]:
            return None
        axes = fitting_axes(source.name, self._reader.read(source.name).shape, self._plan.teacher_sizes)
        return next((dim for dim, axis in enumerate(axes) if axis is not None and axis.part is part), None)

    def _role(self, source: Source) -> Role | None:
        if self._plan.roles is None:
            return None
        return self._plan.roles.by_name.get(source.role or within(source.name, self._stack))

    def _gain(self, source: Source, role: Role) -> torch.Tensor | None:
        """[D], of the norm that a reader reads."""
        if role.norm is None or self._rotation is None:
            return None
        places = {within(name, self._stack): name for name in self._reader if not name.startswith(f"{self._stack}.")}
        norm = places[role.norm] if source.block is None else f"{self._stack}.{source.block}.{role.norm}"
        return self._rotation.gain(self._rotation.roles.by_name[role.norm], self._reader.read(norm))


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
