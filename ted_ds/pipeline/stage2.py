"""Stage II: the student and its filters against the teacher, to the exported student and summary.json."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ted_ds.config.schema import ResolvedRun
from ted_ds.data.loader import Rows
from ted_ds.distill.distillation_model import TERMS, DistillationModel
from ted_ds.distill.engine import build_trained_engine
from ted_ds.errors import NotFiniteError, TrainingError
from ted_ds.job.files import replace_folder, write_atomically
from ted_ds.job.world import World, logger, seed_everything
from ted_ds.models.layer_map import LayerMap
from ted_ds.models.loading import checkpoint_activations, load_model, whole_tensors
from ted_ds.models.published import published_model, published_options, write_published
from ted_ds.pipeline.best import BestStudent
from ted_ds.pipeline.data import RunData
from ted_ds.pipeline.export import export_student
from ted_ds.pipeline.flops import stage2_flops
from ted_ds.pipeline.loop import run_steps
from ted_ds.pipeline.models import Models, fit_to_run, load_filters, load_frozen, new_filters, trained_config
from ted_ds.pipeline.recorded_teacher import LiveTeacher, open_cached_teacher
from ted_ds.pipeline.resume import Checkpoints
from ted_ds.pipeline.schedule import learning_rate_schedule
from ted_ds.pipeline.stage1 import PairPlan
from ted_ds.pipeline.step import global_counts
from ted_ds.teacher.frozen import FrozenModel, Teacher, filtered_square_sums
from ted_ds.teacher.recorded import AnnouncedRows, CachedTeacher
from ted_ds.telemetry.flops import BatchFlops
from ted_ds.telemetry.meters import Meters
from ted_ds.telemetry.recorder import Recorder, read_metrics


@dataclass(frozen=True)
class Plan:
    """What Stage II is built of: the models, the layer loss's pairs (None without one), Stage I's folders by side."""

    models: Models
    pairs: PairPlan | None
    filters: dict[str, Path]


def distill(run: ResolvedRun, world: World, data: RunData, plan: Plan) -> dict[str, Any]:
    """Runs Stage II from its last checkpoint, exports the student, returns the summary; a collective.

    Leaves student/, checkpoints/, metrics.jsonl and summary.json in the run's folder; of a task with a metric
    that chooses, the best weights are kept in best/ while it trains, and become student/.
    """
    engine = build_distillation_engine(run, world, data, plan)
    best = BestStudent(run.output_dir / "best", run.spec.best, data.tokenizer, world) if run.spec.best else None
    _train(run, world, data, plan, engine, best)
    folder = run.output_dir / "student"
    if best is not None and best.card is not None:
        world.on_main(lambda: best.copy_to(folder))
    else:
        export_student(engine.module.student, data.tokenizer, folder, world)
    summary = world.on_main(lambda: _summarise(run, best.card if best else None))
    engine.destroy()
    return summary


def export_checkpoint(run: ResolvedRun, world: World, data: RunData, plan: Plan) -> dict[str, Any]:
    """Exports the student of the last checkpoint of a run that is not over; a collective. The teacher is not loaded.

    Returns {"steps", "student"}. Raises CheckpointError where the checkpoint is torn or does not fit.
    """
    module, engine = _build_student(run, world, data, plan)
    steps = Checkpoints(engine, run.output_dir, run, data, world, run.train.global_batch_size).start
    folder = run.output_dir / "student"
    export_student(module.student, data.tokenizer, folder, world)
    engine.destroy()
    return {"steps": steps, "student": str(folder)}


def export_published(run: ResolvedRun, world: World, data: RunData, plan: Plan) -> dict[str, Any]:
    """Writes the last checkpoint's student *with its filters* in the layout of the paper's authors; a collective.

    Returns {"steps", "published"}. Raises ModelError for models and layer maps that the layout cannot express.
    """
    module, engine = _build_student(run, world, data, plan)
    filters = plan.pairs.student if plan.pairs else None
    options = published_options(module.student.config, filters)
    steps = Checkpoints(engine, run.output_dir, run, data, world, run.train.global_batch_size).start
    folder = run.output_dir / "student_published"
    weights, bank = (dict(whole_tensors(part, keep=world.is_main)) for part in (module.student, module.filters))

    def write() -> None:
        model = published_model(module.student, options, weights, filters, bank)
        new = folder.with_name(folder.name + ".new")
        shutil.rmtree(new, ignore_errors=True)
        write_published(model, new)
        data.tokenizer.save(new)
        replace_folder(folder, new)

    world.on_main(write)
    engine.destroy()
    return {"steps": steps, "published": str(folder)}


def build_distillation_engine(run: ResolvedRun, world: World, data: RunData, plan: Plan) -> Any:
    """A DeepSpeed engine on a `DistillationModel` that is joined with its teacher, hosted or out of `teacher.cache`."""
    taught = bool(run.loss.kl_alpha) or plan.pairs is not None
    # before the student: where a cache has to be recorded, the teacher has the memory to itself
    cached = _cached_teacher(run, world, data, plan) if taught else None
    module, engine = _build_student(run, world, data, plan)
    if taught:
        teacher: Teacher = cached or _live_teacher(run, world, data, plan)
        layer_map = plan.pairs.layer_map if plan.pairs else ()
        normalized = plan.pairs is not None and module.layer_loss.kind.normalized
        squares = _mean_squares(run, world, data, teacher, layer_map) if normalized else None
        module.attach_teacher(teacher, layer_map, squares)
    return engine


def _live_teacher(run: ResolvedRun, world: World, data: RunData, plan: Plan) -> FrozenModel:
    assert run.teacher is not None and plan.models.teacher is not None
    return load_frozen(
        run,
        world,
        plan.models.teacher,
        task=data.task,
        tokenizer=data.tokenizer,
        trust_remote_code=run.teacher.trust_remote_code,
        filters=plan.filters.get("teacher"),
    )


def _cached_teacher(run: ResolvedRun, world: World, data: RunData, plan: Plan) -> CachedTeacher | None:
    assert run.teacher is not None and plan.models.teacher is not None
    if run.teacher.cache is None:
        return None
    load = partial(_live_teacher, run, world, data, plan)
    live = LiveTeacher(plan.models.teacher, plan.pairs, plan.filters.get("teacher"), load)
    return open_cached_teacher(run, world, data, live)


def _build_student(run: ResolvedRun, world: World, data: RunData, plan: Plan) -> tuple[DistillationModel, Any]:
    rate = run.optimizer
    config = trained_config(run, world, learning_rate=rate.learning_rate, weight_decay=rate.weight_decay)
    student = load_model(
        plan.models.student,
        run.spec.kind,
        dtype=run.student.dtype,
        deepspeed_config=config,
        dropout=run.student.dropout,
        head_dropout=run.student.head_dropout,
        trust_remote_code=run.student.trust_remote_code,
    )
    fit_to_run(student, run, data.tokenizer)
    if run.student.activation_checkpointing:
        checkpoint_activations(student)
    seed_everything(run.seed)
    if (learnt := plan.filters.get("student")) is not None:
        filters = load_filters(learnt, config, run.student.dtype, world)
    else:
        filters = new_filters(plan.pairs.student, config, run.student.dtype) if plan.pairs else nn.ModuleList()
    module = DistillationModel(student, filters, run.loss, task=data.task)
    schedule = learning_rate_schedule(
        rate.schedule,
        warmup_steps=rate.warmup_steps,
        total_steps=run.train.steps,
        final_ratio=rate.final_ratio,
    )
    return module, build_trained_engine(module, deepspeed_config=config, schedule=schedule)


def _mean_squares(run: ResolvedRun, world: World, data: RunData, teacher: Teacher, layer_map: LayerMap) -> torch.Tensor:
    """[K] float32 mean squares of the teacher's filtered states over the first global batch; a collective."""
    batches = data.training_rows(run, world).micro_batches(0)
    blocks = [t for _, t in layer_map]
    masked = run.loss.mask_padding
    sums = sum(filtered_square_sums(teacher, blocks, b.to(world.device), mask_padding=masked) for b in batches)
    counts = global_counts(batches, world)
    tokens = counts.tokens if masked else counts.positions
    assert isinstance(sums, torch.Tensor)
    return (world.sum(sums) / (tokens * teacher.target_width)).float()


def _train(run: ResolvedRun, world: World, data: RunData, plan: Plan, engine: Any, best: BestStudent | None) -> None:
    checkpoints = Checkpoints(engine, run.output_dir, run, data, world, run.train.global_batch_size)
    start, score = checkpoints.start, (0, 0.0)  # the last evaluation's step, and how well it went
    if best is not None:
        best.go_back(checkpoints.card.best if checkpoints.card else None, run.train.steps)

    def evaluate(step: int) -> dict[str, float]:
        nonlocal score
        with scorable(step, world):
            scores = data.evaluate(engine, run, world)
            metric = f"validation_{run.spec.best}" if run.spec.best else "validation_loss"
            if metric in scores:
                score = step, scores[metric] if run.spec.best else -scores[metric]
            if best is not None and step and best.beaten_by(step, scores):
                scores |= data.evaluate_extra(engine, run, world)
                best.keep(engine.module.student, step, scores)
        return scores

    def save(step: int) -> None:
        card = None if best is None else best.card
        checkpoints.save(step, recorder, card, score[1] if score[0] == step else None)

    rows: Rows = data.training_rows(run, world)
    if isinstance(teacher := engine.module.teacher, CachedTeacher):
        rows = AnnouncedRows(rows, teacher)
    logger.info("Stage II: %s, steps %d to %d", run.method, start, run.train.steps)
    recorder = Recorder(
        run.output_dir,
        title=f"Stage II {run.method}",
        steps=run.train.steps,
        tensorboard=run.logging.tensorboard,
    )
    with recorder:
        checkpoints.open(recorder)
        if start == 0:
            first = {"step": 0, "tokens": 0, **evaluate(0)}
            world.on_main(lambda: recorder.log(first))
        run_steps(
            engine,
            rows,
            world,
            recorder,
            names=TERMS,
            start=start,
            steps=run.train.steps,
            log_every=run.logging.every,
            seed=run.seed,
            max_skipped=run.train.max_skipped_steps,
            evaluate=(run.train.evaluate_every, evaluate),
            save=(run.train.save_every, save),
            meters=Meters(world, _flops(run, data, plan)),
        )


@contextmanager
def scorable(step: int, world: World) -> Iterator[None]:
    """Within it, a student whose outputs are not finite ends the run: a TrainingError that rank 0 says."""
    try:
        yield
    except NotFiniteError as error:
        remedy = "lower optimizer.learning_rate" if step else "see to the weights that it begins with"
        diverged = TrainingError(f"step {step}: the student has no score: {error}: {remedy}")
        diverged.said_by_main = not world.is_main
        raise diverged from error


def _flops(run: ResolvedRun, data: RunData, plan: Plan) -> BatchFlops | None:
    pairs = () if plan.pairs is None else (plan.pairs.layer_map, plan.pairs.student, plan.pairs.teacher)
    return stage2_flops(run, plan.models, data.task, data.tokenizer, *pairs)


def _summarise(run: ResolvedRun, best: dict[str, Any] | None) -> dict[str, Any]:
    """summary.json, from metrics.jsonl, so that a resumed run sums up all of its sessions.

    best: the step and the scores of the best weights, which the exported student has; None: it has the last.
    """
    lines = read_metrics(run.output_dir)
    first, last = lines[0], lines[-1]
    stage1 = sum(_training_seconds(read_metrics(run.output_dir / f"{side}_filters")) for side in ("teacher", "student"))
    summary = {
        "task": run.task,
        "method": run.method,
        "steps": last["step"],
        "tokens": last["tokens"],
        "wall_seconds": stage1 + _training_seconds(lines),
        "stage1_seconds": stage1,
        "peak_memory_gib": max(line.get("peak_memory_gib", 0.0) for line in lines),
        **{f"final_{name}": last[name] for name in TERMS},
        **{f"initial_{name}": value for name, value in first.items() if name.startswith("validation_")},
        **(best or {name: value for name, value in last.items() if name.startswith("validation_")}),
    }
    write_atomically(run.output_dir / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
    return summary


def _training_seconds(lines: list[dict[str, Any]]) -> float:
    """Seconds spent in steps: without evaluation, saving and starting up."""
    steps = [0, *(line["step"] for line in lines)]
    return sum(line.get("step_ms", 0.0) * (b - a) for line, (a, b) in zip(lines, pairwise(steps), strict=True)) / 1000
