"""Stage I: the filters of the teacher and of the student, learnt once and kept in the run's folder."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from ted_ds.config.choices import METHODS
from ted_ds.config.deepspeed import trained_engine_config
from ted_ds.config.schema import ResolvedRun
from ted_ds.config.sections import FiltersConfig
from ted_ds.distill.engine import build_trained_engine
from ted_ds.distill.filter_learner import FilterLearner
from ted_ds.errors import CheckpointError
from ted_ds.job.files import write_atomically
from ted_ds.job.world import World, logger, seed_everything
from ted_ds.models.filter_files import copy_filters, read_plan
from ted_ds.models.loading import whole_tensors
from ted_ds.ops.layer_loss import KINDS
from ted_ds.pipeline.batch_flops import stage1_flops
from ted_ds.pipeline.loop import Hooks, Steps, run_steps
from ted_ds.pipeline.pair_plan import PairPlan
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
