"""The sizes of a run's models and filters, from the models' configs alone: no weights are read or made."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, PreTrainedConfig

from ted_ds.config.schema import RunConfig
from ted_ds.config.sections import TeacherConfig
from ted_ds.config.student_section import InitConfig
from ted_ds.config.tasks import KINDS, Kind
from ted_ds.data.tokenizers import load_tokenizer
from ted_ds.models.cut_plan import CutPlan, plan_cut
from ted_ds.models.loading import DTYPES, meta_model
from ted_ds.models.pooler import set_head_dropout
from ted_ds.models.structure import find_blocks, set_dropout
from ted_ds.models.task_head import AUTO_CLASSES, label_fields
from ted_ds.pipeline.budget import shapes_within
from ted_ds.pipeline.pair_plan import PairPlan, plan_pairs
from ted_ds.pipeline.stage0 import ModelPaths


@dataclass(frozen=True)
class ModelShape:
    """The sizes of one model.

    parameters: elements of all weights, tied ones once. largest: elements of the largest part that ZeRO-3 gathers at
    once, a block or an embedding. vocab: rows of the embedding.
    saved: bytes that autograd keeps of one row's forward. saved_outside: of these, the ones kept outside of the
    blocks. saved_in_block: of these, the ones of the block that keeps most.
    """

    parameters: int
    largest: int
    blocks: int
    width: int
    vocab: int
    saved: int
    saved_outside: int
    saved_in_block: int


@dataclass(frozen=True)
class FilterShape:
    """The pairs, the filters' output width, and the parameters of one filter of each side (0: it has no filters)."""

    pairs: int
    output_dim: int
    student: int
    teacher: int


NO_FILTERS = FilterShape(0, 0, 0, 0)


class Shapes(NamedTuple):
    """The sizes of all that a run holds. teacher: None if no loss compares with a teacher."""

    student: ModelShape
    teacher: ModelShape | None
    filters: FilterShape


def run_shapes(run: RunConfig) -> Shapes:
    """The shapes of a run. Raises TedError if a model is not found, or if the recipe does not fit it."""
    kind, length, own = run.spec.kind, run.data.sequence_length, run.student
    config = student_config(run)
    if own.dropout is not None:
        set_dropout(config, own.dropout)
    if own.head_dropout is not None:
        set_head_dropout(config, own.head_dropout)
    config._attn_implementation = run.attn_implementation
    student = model_shape(config, kind, own.dtype, length, trust_remote_code=own.trust_remote_code)
    theirs = run.teacher
    if theirs is None or not (run.loss.kl_alpha or run.loss.mse_alpha):
        return Shapes(student, None, NO_FILTERS)
    frozen = meta_model(theirs.model, kind, trust_remote_code=theirs.trust_remote_code).config
    teacher = model_shape(frozen, kind, theirs.dtype, length, trust_remote_code=theirs.trust_remote_code)
    return Shapes(student, teacher, _filters(run, theirs, config))


def _filters(run: RunConfig, teacher: TeacherConfig, student: PreTrainedConfig) -> FilterShape:
    """The plan of Stage I, for a student that may not exist yet: its config is enough."""
    with tempfile.TemporaryDirectory() as folder:
        student.save_pretrained(folder)
        plan = planned_pairs(run, folder)
    if plan is None:
        return NO_FILTERS
    with torch.device("meta"):
        filters = (None if side is None else side.build()[0] for side in (plan.student, plan.teacher))
        sides = [0 if f is None else sum(p.numel() for p in f.parameters()) for f in filters]
    return FilterShape(len(plan.layer_map), plan.student.output_dim, *sides)


def planned_pairs(run: RunConfig, student: str) -> PairPlan | None:
    """Stage I's plan for a student that has its shape, but was not cut yet: its filters start at random.

    student: a folder with its config.
    """
    teacher, init = run.teacher, run.student.init
    assert teacher is not None
    models = ModelPaths(student, teacher.model)
    if init is not None and init.config is None and init.model is None:
        cut = _cut(run, teacher, init)
        models = replace(models, kept=cut.blocks, rotation=None if cut.roles is None else Path(student))
    plan = plan_pairs(run, models)
    return None if plan is None else replace(plan, rotation=None)


def student_config(run: RunConfig) -> PreTrainedConfig:
    """The config of the student: a checkpoint's, or the one that Stage 0 will write."""
    student, kind = run.student, run.spec.kind
    if student.init_from_pretrained or student.init is None:
        name = student.pretrained if student.init_from_pretrained else student.model
        assert name is not None
        return meta_model(name, kind, trust_remote_code=student.trust_remote_code).config
    if student.init.config is not None:
        fields = {"vocab_size": _vocabulary(run)} | label_fields(run.spec)
        return AutoConfig.for_model(**{**fields, **student.init.config})
    assert run.teacher is not None
    return _cut(run, run.teacher, student.init).student.config


def _cut(run: RunConfig, teacher: TeacherConfig, init: InitConfig) -> CutPlan:
    trusted = run.student.trust_remote_code if init.model else teacher.trust_remote_code
    source, kind = init.model or teacher.model, run.spec.kind
    # a budget's largest shape stands for the one that the data will choose
    init = init.unmeasured() if init.parameters is None else shapes_within(source, init, kind, trusted)[0].cut(init)
    return plan_cut(source, init, kind, trusted)


def _vocabulary(run: RunConfig) -> int:
    """The number of ids of the tokenizer, or of the one that the run will train."""
    data = run.data
    if data.train_tokenizer is not None and not Path(data.tokenizer).exists():
        return data.train_tokenizer
    return load_tokenizer(data.tokenizer, trust_remote_code=data.trust_remote_code).vocab_size


def model_shape(
    config: PreTrainedConfig, kind: Kind, dtype: str, length: int, *, trust_remote_code: bool = False
) -> ModelShape:
    """The shape of the model of `config`, with the tensors that its forward keeps of one row of `length` tokens.

    Raises any error of the model's own code, if that code needs the tensors' values.
    """
    with FakeTensorMode():
        auto: Any = AUTO_CLASSES[kind]
        model = auto.from_config(config, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code).train()
        structure = find_blocks(model)
        ids = torch.zeros(1, length, dtype=torch.int64)
        with saved_bytes(model, structure.blocks) as saved:
            if KINDS[kind].lm_head:
                structure.backbone(input_ids=ids, use_cache=False)
            else:
                model(input_ids=ids)  # without a mask: the model would look at its values, and it adds almost nothing
    blocks = [sum(p.numel() for p in block.parameters()) for block in structure.blocks]
    embeddings = model.get_input_embeddings().weight
    return ModelShape(
        parameters=sum(p.numel() for p in model.parameters()),
        largest=max(*blocks, embeddings.numel()),
        blocks=len(blocks),
        width=structure.width,
        vocab=len(embeddings),
        saved=sum(saved.values()),
        saved_outside=saved.get(-1, 0),
        saved_in_block=max(saved.get(i, 0) for i in range(len(blocks))),
    )


@contextmanager
def saved_bytes(model: torch.nn.Module, blocks: torch.nn.ModuleList) -> Iterator[dict[int, int]]:
    """Yields a dict that the context fills: block (-1: outside of blocks) -> bytes that autograd keeps.

    Each storage counts once; parameters and buffers do not count.
    """
    known = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
    alive: list[torch.Tensor] = []  # the address of a freed storage could be used again
    sizes: dict[int, int] = {}
    place = -1

    def enter(index: int) -> Callable[..., None]:
        def hook(*_: object) -> None:
            nonlocal place
            place = index

        return hook

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            known.add(storage._cdata)
            alive.append(tensor)
            sizes[place] = sizes.get(place, 0) + storage.nbytes()
        return tensor

    with ExitStack() as hooks:
        for index, block in enumerate(blocks):
            hooks.enter_context(block.register_forward_pre_hook(enter(index)))
            hooks.enter_context(block.register_forward_hook(enter(-1)))
        hooks.enter_context(saved_tensors_hooks(keep, lambda tensor: tensor))
        yield sizes
