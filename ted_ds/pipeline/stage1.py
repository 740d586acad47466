"""Stage I: the filters of the teacher and of the student, learnt once and kept in the run's folder."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from ted_ds.config.choices import LAYER_LOSSES, METHODS, LayerLossKind
from ted_ds.config.deepspeed import trained_engine_config
from ted_ds.config.schema import ResolvedRun, RunConfig
from ted_ds.config.sections import FiltersConfig, TeacherConfig
from ted_ds.config.student_section import StudentConfig
from ted_ds.distill.engine import build_trained_engine
from ted_ds.distill.filter_learner import FilterLearner
from ted_ds.errors import CheckpointError, ModelError
from ted_ds.job.files import write_atomically
from ted_ds.job.world import World, logger, seed_everything
from ted_ds.models.channels import Measurements
from ted_ds.models.families import activation_of
from ted_ds.models.filter_files import copy_filters, new_filters, read_plan
from ted_ds.models.filters import FilterPlan
from ted_ds.models.layer_map import LayerMap, resolve_layer_map
from ted_ds.models.loading import meta_model, whole_tensors
from ted_ds.models.structure import ModelStructure, find_blocks
from ted_ds.ops.layer_loss import KINDS
from ted_ds.pipeline.batch_flops import stage1_flops
from ted_ds.pipeline.loop import Hooks, Steps, run_steps
from ted_ds.pipeline.resume import Checkpoints
from ted_ds.pipeline.schedule import learning_rate_schedule
from ted_ds.pipeline.stage0 import ModelPaths
from ted_ds.tasks.base import RunData
from ted_ds.teacher.fingerprints import file_fingerprint, model_fingerprint
from ted_ds.teacher.frozen import FrozenModel
from ted_ds.teacher.hosting import load_frozen
from ted_ds.teacher.recording import alone_in_cache
from ted_ds.telemetry.meters import Meters
from ted_ds.telemetry.recorder import Recorder, read_metrics

ORIGIN = "origin.json"
"""In a cache's copy of the filters: the teacher that they were learnt on, and the recipe's section filters."""

NORMALIZED = "hidden states normalised token by token"

WARMUP_SHARE = 0.1
"""Stage I warms up over this share of its steps; its rate then falls linearly to 0."""


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


def learn_filters(run: ResolvedRun, world: World, data: RunData, plan: PairPlan, models: ModelPaths) -> dict[str, Path]:
    """Stage I of both sides, as far as it is not done; returns their folders (none, if none are learnt); a collective.

    Raises CheckpointError if a folder holds filters of another plan.
    """
    if plan.teacher is None:
        if METHODS[run.method].learns_filters:
            logger.info(
                "Stage I is left out: the student was cut out of the teacher, and learnt filters brought such students "
                "nothing; this run is lwd (filters.learn: always learns them)"
            )
        return {}
    assert run.teacher is not None and models.teacher is not None
    folders = {}
    for side, path, trusted in (
        ("teacher", models.teacher, run.teacher.trust_remote_code),
        ("student", models.student, run.student.trust_remote_code),
    ):
        folder = folders[side] = run.output_dir / f"{side}_filters"
        there = world.on_main((folder / "filters.json").exists)
        learn = partial(_load_and_learn, run, world, data, plan, folder, side, path, trusted)
        if side in models.published:
            if not there:
                logger.info("Stage I: %s filters came with the checkpoint -> %s", side, folder)
                world.on_main(partial(copy_filters, models.published[side], folder))
        elif side == "teacher" and run.teacher.cache is not None:
            _share(run, world, data, path, plan.rotation, folder, learn)
        elif not there:
            learn()
        found = world.on_main(partial(read_plan, folder))
        if found != plan.of(side):
            raise CheckpointError(
                f"{folder} holds filters of another layer map or shape ({found}, this run's {plan.of(side)}): "
                "delete that folder to learn them anew"
            )
    return folders


def _structure(run: RunConfig, path: str, section: TeacherConfig | StudentConfig) -> ModelStructure:
    return find_blocks(meta_model(path, run.spec.kind, trust_remote_code=section.trust_remote_code))


def _share(
    run: ResolvedRun,
    world: World,
    data: RunData,
    teacher: str,
    rotation: Path | None,
    folder: Path,
    learn: Callable[[], None],
) -> None:
    """The teacher's filters as `teacher.cache` has them, or learnt and put there; a collective.

    So all runs that share a cache have the same filters, whatever their seeds are, and only the first of them loads
    the teacher. Filters that `folder` has already are kept.
    Raises CheckpointError if the cache has filters of another teacher, or learnt otherwise.
    """
    assert run.teacher is not None and run.teacher.cache is not None
    cache, shared = run.teacher.cache, run.teacher.cache / "teacher_filters"

    def origin() -> dict[str, Any]:
        assert run.teacher is not None
        return {
            "the teacher's weights": model_fingerprint(teacher)[:12],
            "the training data": data.train.fingerprint()[:12],
            "teacher.dtype": run.teacher.dtype,
            "the student's rotation": None if rotation is None else file_fingerprint(rotation)[:12],
            NORMALIZED: KINDS[run.loss.layer_loss].by_token,
            **_learning(run.filters),
        }

    def take() -> bool:
        if (folder / "filters.json").exists():
            return True
        if not shared.exists():
            return False
        _refuse_other_origin(shared, origin())
        logger.info("Stage I: teacher filters out of teacher.cache -> %s", folder)
        copy_filters(shared, folder)
        return True

    def give() -> None:
        if not shared.exists():
            write_atomically(folder / ORIGIN, json.dumps(origin(), indent=2) + "\n")
            copy_filters(folder, shared)

    if world.on_main(lambda: shared.exists() and take()):
        return  # a finished cache is only read, by users who must not write to it too
    with alone_in_cache(cache, world):
        if not world.on_main(take):
            learn()
        world.on_main(give)


def _refuse_other_origin(shared: Path, wanted: dict[str, Any]) -> None:
    # a key that it lacks came later: what was learnt before has its default
    found = {NORMALIZED: False} | _learning(FiltersConfig()) | json.loads((shared / ORIGIN).read_text(encoding="utf-8"))
    for what, value in wanted.items():
        if found.get(what) != value:
            raise CheckpointError(
                f"{shared} was learnt with {what} {found.get(what)}, this run has {value}: give another teacher.cache, "
                "or delete its folder to record it anew"
            )


def _learning(settings: FiltersConfig) -> dict[str, Any]:
    return {f"filters.{name}": value for name, value in settings.model_dump(mode="json", exclude={"learn"}).items()}


class FilterHooks(Hooks):
    """Stage I in the loop: the step picks the positions that filters see."""

    def __init__(self, checkpoints: Checkpoints, recorder: Recorder) -> None:
        self._checkpoints, self._recorder = checkpoints, recorder

    def inputs(self, step: int) -> dict[str, Any]:
        """The step."""
        return {"step": step}

    def save(self, step: int) -> None:
        """A checkpoint of the filters."""
        self._checkpoints.save(step, self._recorder)


def _load_and_learn(
    run: ResolvedRun, world: World, data: RunData, plan: PairPlan, folder: Path, side: str, path: str, trusted: bool
) -> None:
    logger.info("Stage I: %s filters -> %s", side, folder)
    frozen = load_frozen(run, world, path, task=data.task, tokenizer=data.tokenizer, trust_remote_code=trusted)
    _learn(run, world, data, frozen, plan, folder, side)
    frozen.close()
    del frozen
    gc.collect()  # hooks and modules refer to each other: the next model must not find this one in memory


def _learn(
    run: ResolvedRun, world: World, data: RunData, frozen: FrozenModel, pairs: PairPlan, folder: Path, side: str
) -> None:
    settings, plan = run.filters, pairs.of(side)
    assert plan is not None
    rate: float = getattr(settings.learning_rate, side)
    batch_size: int | None = getattr(settings.global_batch_size, side, None)
    rows = batch_size or run.train.global_batch_size
    steps = settings.num_steps(data.num_rows, rows)
    config = trained_engine_config(
        run,
        world_size=world.size,
        learning_rate=rate,
        weight_decay=0.0,
        cpu=world.device.type == "cpu",
        global_batch_size=batch_size,
    )
    seed_everything(run.seed)
    head = data.task.disposable_head(frozen.module.model, run, world, side)
    path = str(frozen.module.model.name_or_path)
    meters = Meters(world, stage1_flops(run, side, path, data.task, data.tokenizer, plan, head))
    learner = FilterLearner(pairs.new_filters(side, config, run.student.dtype), frozen, plan.blocks, head)
    warmup = getattr(settings.warmup_steps, side, int(WARMUP_SHARE * steps))
    schedule = learning_rate_schedule("linear", warmup_steps=warmup, total_steps=steps, final_ratio=0.0)
    engine = build_trained_engine(learner, deepspeed_config=config, schedule=schedule)
    temporary = folder.with_name(folder.name + ".tmp")
    checkpoints = Checkpoints(engine, temporary, run, data, world, rows)
    recorder = Recorder(temporary, title=f"Stage I {folder.name}", steps=steps, tensorboard=False)
    loop = Steps(
        checkpoints.start,
        steps,
        run.logging.every,
        save_every=run.train.save_every,
        seed=run.seed,
        max_skipped=run.train.max_skipped_steps,
    )
    with recorder:
        checkpoints.open(recorder)
        hooks = FilterHooks(checkpoints, recorder)
        training = data.training_rows(run, world, batch_size)
        run_steps(engine, training, world, recorder, loop, hooks, names=("loss",), meters=meters)
    tensors = dict(whole_tensors(learner.filters(), keep=world.is_main))

    def write() -> None:
        save_file(tensors, temporary / "filters.safetensors")
        last = read_metrics(temporary)[-1]
        card = {"plan": asdict(plan), "steps": steps, "losses": last["layer_losses"]}
        write_atomically(temporary / "filters.json", json.dumps(card, indent=2, allow_nan=False) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        shutil.rmtree(folder / "checkpoints")

    world.on_main(write)
    engine.destroy()
