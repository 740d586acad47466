"""What the layer loss of a run compares: pairs of blocks, and the filters of both sides."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ted_ds.config.choices import LAYER_LOSSES, METHODS, LayerLossKind
from ted_ds.config.schema import RunConfig
from ted_ds.config.sections import TeacherConfig
from ted_ds.config.student_section import StudentConfig
from ted_ds.errors import ModelError
from ted_ds.models.channels import Measurements
from ted_ds.models.families import activation_of
from ted_ds.models.filter_files import new_filters, read_plan
from ted_ds.models.filters import FilterPlan
from ted_ds.models.layer_map import LayerMap, resolve_layer_map
from ted_ds.models.loading import meta_model
from ted_ds.models.structure import ModelStructure, find_blocks
from ted_ds.ops.layer_loss import KINDS
from ted_ds.pipeline.stage0 import ModelPaths


@dataclass(frozen=True)
class PairPlan:
    """What the layer loss compares: the pairs, and each side's filters (teacher None: unfiltered, lwd).

    rotation: see `ModelPaths`.
    """

    layer_map: LayerMap
    teacher: FilterPlan | None
    student: FilterPlan
    rotation: Path | None = None

    def of(self, side: str) -> FilterPlan | None:
        """The filters of a side ("teacher", "student")."""
        return self.teacher if side == "teacher" else self.student

    def new_filters(self, side: str, deepspeed_config: dict[str, Any], dtype: str) -> nn.ModuleList:
        """Fresh filters of a side that has some: from one width to the other, they start at the student's rotation."""
        plan = self.of(side)
        assert plan is not None
        basis = None if self.rotation is None else Measurements.load(self.rotation).basis
        if basis is not None:
            basis = basis[:, : self.student.width]
        return new_filters(plan, deepspeed_config, dtype, basis)


def plan_pairs(run: RunConfig, models: ModelPaths) -> PairPlan | None:
    """The plan of a run's layer loss from both models' configs alone; None if mse_alpha is 0.

    Filters that came with a checkpoint are kept as they are. Raises ModelError if the layer map does not fit
    the models, or such filters do not fit it or each other.
    """
    if not run.loss.mse_alpha:
        return None
    assert run.teacher is not None and models.teacher is not None
    teacher, student = _structure(run, models.teacher, run.teacher), _structure(run, models.student, run.student)
    policy = run.filters.layer_map or ("uniform" if models.kept is None else "matched")
    skipped = _skipped(run, min(student.num_blocks, teacher.num_blocks))
    layer_map = resolve_layer_map(policy, student.num_blocks, teacher.num_blocks, models.kept, skip_last=skipped)
    blocks_s, blocks_t = (tuple(pair[side] for pair in layer_map) for side in (0, 1))
    if not METHODS[run.method].learns_filters or _in_one_basis(run, teacher.width, student.width, models):
        return PairPlan(layer_map, None, _fresh(run, student, blocks_s, teacher.width), models.rotation)
    ready = {side: read_plan(folder) for side, folder in models.published.items()}
    widths = [plan.output_dim for plan in ready.values()]
    shared = teacher.width if models.rotation is None else student.width
    output_dim = run.filters.output_dim or next(iter(widths), shared)
    plan = PairPlan(
        layer_map,
        ready.get("teacher") or _fresh(run, teacher, blocks_t, output_dim),
        ready.get("student") or _fresh(run, student, blocks_s, output_dim),
        models.rotation,
    )
    _check_ready(plan, ready, {"teacher": blocks_t, "student": blocks_s}, output_dim, run.loss.layer_loss)
    return plan


def _in_one_basis(run: RunConfig, teacher_width: int, student_width: int, models: ModelPaths) -> bool:
    """Whether Stage I is left out (`filters.learn: auto`): filters that are not learnt know already how the student's
    hidden states lie in the teacher's. Filters that a recipe shapes, or that came with a checkpoint, are wanted.
    """
    settings = run.filters
    if settings.learn == "always" or settings.nonlinear or settings.output_dim is not None or models.published:
        return False
    return models.kept is not None and (models.rotation is not None or teacher_width == student_width)


def _skipped(run: RunConfig, pairs: int) -> int:
    """Pairs at the end that are left out: matching a student's last blocks costs more than it brings."""
    if run.filters.skip_last is not None:
        return run.filters.skip_last
    share = LAYER_LOSSES[run.loss.layer_loss].skip_last
    return min(pairs - 1, max(1, round(share * pairs))) if share else 0


def _fresh(run: RunConfig, model: ModelStructure, blocks: tuple[int, ...], output_dim: int) -> FilterPlan:
    """Filters to be learnt; nonlinear ones have the model's own activation."""
    activation = activation_of(model.model.config) if run.filters.nonlinear else "gelu"
    by_token = KINDS[run.loss.layer_loss].by_token
    return FilterPlan(blocks, model.width, output_dim, run.filters.nonlinear, activation, by_token)


def _check_ready(
    plan: PairPlan,
    ready: dict[str, FilterPlan],
    blocks: dict[str, tuple[int, ...]],
    output_dim: int,
    layer_loss: LayerLossKind,
) -> None:
    """Raises ModelError if filters that came with a checkpoint do not fit the run's layer map, F and layer loss."""
    assert plan.teacher is not None
    counts = (len(plan.teacher.blocks), len(plan.student.blocks))
    if counts[0] != counts[1]:
        raise ModelError(
            f"the teacher has {counts[0]} filters, the student {counts[1]}: K must be the same on both sides; choose "
            "checkpoints of one filter_interval, or plain ones, whose filters are learnt here"
        )
    for side, own in ready.items():
        if own.output_dim != output_dim:
            raise ModelError(
                f"the {side}'s filters have width {own.output_dim}, F of this run is {output_dim}: set "
                f"filters.output_dim to {own.output_dim}, and use models with filters of one F"
            )
        if KINDS[layer_loss].by_token:
            raise ModelError(
                f"the {side}'s filters were learnt on hidden states as they are, loss.layer_loss {layer_loss} "
                "normalises them token by token: set loss.layer_loss to mse or normalized_mse"
            )
        if own.blocks != blocks[side]:
            raise ModelError(
                f"the {side}'s filters are on its blocks {list(own.blocks)}, filters.layer_map pairs blocks "
                f"{list(blocks[side])}: set filters.layer_map to "
                f"{[list(p) for p in zip(plan.student.blocks, plan.teacher.blocks, strict=True)]}"
            )


def _structure(run: RunConfig, path: str, section: TeacherConfig | StudentConfig) -> ModelStructure:
    return find_blocks(meta_model(path, run.spec.kind, trust_remote_code=section.trust_remote_code))
