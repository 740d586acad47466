"""Stage II: the student and its filters against the teacher, to the exported student and summary.json."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ted_ds.config.deepspeed import trained_engine_config
from ted_ds.config.schema import ResolvedRun
from ted_ds.data.loader import Rows
from ted_ds.distill.balance import Balance, faded
from ted_ds.distill.distillation_model import TERMS, DistillationModel
from ted_ds.distill.engine import build_trained_engine
from ted_ds.errors import NotFiniteError, TrainingError
from ted_ds.job.files import write_atomically
from ted_ds.job.world import World, logger, seed_everything
from ted_ds.models.filter_files import load_filters
from ted_ds.models.fit import fit_to_run
from ted_ds.models.layer_map import LayerMap
from ted_ds.models.loading import checkpoint_activations, load_model
from ted_ds.pipeline.batch_flops import stage2_flops
from ted_ds.pipeline.best import BestStudent
from ted_ds.pipeline.export import export_student
from ted_ds.pipeline.loop import Hooks, Steps, run_steps
from ted_ds.pipeline.pair_plan import PairPlan
from ted_ds.pipeline.resume import Checkpoints
from ted_ds.pipeline.schedule import learning_rate_schedule
from ted_ds.pipeline.stage0 import ModelPaths
from ted_ds.pipeline.step import global_counts
from ted_ds.tasks.base import RunData
from ted_ds.teacher.contract import Teacher
from ted_ds.teacher.frozen import filtered_square_sums
from ted_ds.teacher.opening import TeacherPlan, open_teacher
from ted_ds.teacher.recorded import AnnouncedRows
from ted_ds.telemetry.flops import BatchFlops
from ted_ds.telemetry.meters import Meters
from ted_ds.telemetry.recorder import Recorder, read_metrics


@dataclass(frozen=True)
class Plan:
    """What Stage II is built of: the models, the layer loss's pairs (None without one), Stage I's folders by side."""

    models: ModelPaths
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

    Returns {"steps", "student"}. Raises CheckpointError if the checkpoint is torn or does not fit.
    """
    module, engine = _build_student(run, world, data, plan)
    steps = Checkpoints(engine, run.output_dir, run, data, world, run.train.global_batch_size).start
    folder = run.output_dir / "student"
    export_student(module.student, data.tokenizer, folder, world)
    engine.destroy()
    return {"steps": steps, "student": str(folder)}


def build_distillation_engine(run: ResolvedRun, world: World, data: RunData, plan: Plan) -> Any:
    """A DeepSpeed engine on a `DistillationModel` that is joined with its teacher, hosted or out of `teacher.cache`."""
    taught = bool(run.loss.kl_alpha) or plan.pairs is not None
    # before the student: if a cache has to be recorded, the teacher has the memory to itself
    teacher = _open_teacher(run, world, data, plan) if taught else None
    module, engine = _build_student(run, world, data, plan)
    if teacher is not None:
        layer_map = plan.pairs.layer_map if plan.pairs else ()
        by_energy = plan.pairs is not None and module.layer_loss.kind.by_energy
        squares = _mean_squares(run, world, data, teacher, layer_map) if by_energy else None
        balance = Balance.of(run.loss, len(layer_map), world.device)
        module.attach_teacher(teacher, layer_map, squares, balance)
    return engine


def _open_teacher(run: ResolvedRun, world: World, data: RunData, plan: Plan) -> Teacher:
    assert plan.models.teacher is not None
    pairs = plan.pairs
    teacher = TeacherPlan(
        plan.models.teacher,
        plan.filters.get("teacher"),
        blocks=tuple(t for _, t in pairs.layer_map) if pairs else (),
        # unfiltered states have the teacher's width, which the student's filters then have too
        width=(pairs.teacher or pairs.student).output_dim if pairs else 0,
    )
    return open_teacher(run, world, teacher, task=data.task, tokenizer=data.tokenizer, rows=data.train)


def _build_student(run: ResolvedRun, world: World, data: RunData, plan: Plan) -> tuple[DistillationModel, Any]:
    rate = run.optimizer
    config = trained_engine_config(run, world_size=world.size, cpu=world.device.type == "cpu")
    student = load_model(
        plan.models.student,
        run.spec.kind,
        dtype=run.student.dtype,
        deepspeed_config=config,
        dropout=run.student.dropout,
        head_dropout=run.student.head_dropout,
        attn_implementation=run.attn_implementation,
        trust_remote_code=run.student.trust_remote_code,
    )
    fit_to_run(student, run, data.tokenizer)
    if run.student.activation_checkpointing:
        checkpoint_activations(student)
    seed_everything(run.seed)
    if (learnt := plan.filters.get("student")) is not None:
        filters = load_filters(learnt, config, run.student.dtype, is_main=world.is_main)
    else:
        pairs = plan.pairs
        filters = pairs.new_filters("student", config, run.student.dtype) if pairs else nn.ModuleList()
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


def begin_step(module: DistillationModel, fade: float, world: World) -> dict[str, Any]:
    """What the module's forward gets in a step whose layer loss has faded to `fade`; a collective."""
    if not fade and module.teacher is not None:
        module.teacher.end_states()
    if module.balance is not None:
        module.balance.settle(world)
        module.balance.begin(fade)
    return {"fade": fade}


class DistillationHooks(Hooks):
    """Stage II in the loop: held-out scores, the best weights so far, checkpoints.

    best: None for a task without a metric that chooses.
    """

    def __init__(
        self,
        run: ResolvedRun,
        world: World,
        data: RunData,
        engine: Any,
        best: BestStudent | None,
        checkpoints: Checkpoints,
        recorder: Recorder,
    ) -> None:
        self._run, self._world, self._data, self._engine = run, world, data, engine
        self._best, self._checkpoints, self._recorder = best, checkpoints, recorder
        self._balance: Balance | None = engine.module.balance
        self._fade = 1.0
        self._scored_at, self._score = 0, 0.0  # the last evaluation's step, and its score, the higher the better

    def inputs(self, step: int) -> dict[str, Any]:
        """How far the layer loss has faded; its weight follows from what earlier steps measured."""
        self._fade = faded(step, self._run.train.steps, self._run.loss.layer_fade)
        return begin_step(self._engine.module, self._fade, self._world)

    def measured(self) -> dict[str, Any]:
        """The layer loss's weight, and each pair's share of the gradient and agreement with the logits."""
        if self._balance is None or not self._fade:
            return {}
        self._balance.settle(self._world)
        return self._balance.measured()

    def evaluate(self, step: int) -> dict[str, float]:
        """Scores of the held-out data; the student is kept if it is the best so far."""
        with scorable(step, self._world):
            scores = self._data.evaluate(self._engine, self._run, self._world)
            chooses = self._run.spec.best
            metric = f"validation_{chooses}" if chooses else "validation_loss"
            if metric in scores:
                self._scored_at, self._score = step, scores[metric] if chooses else -scores[metric]
            if self._best is not None and step and self._best.beaten_by(step, scores):
                scores |= self._data.evaluate_extra(self._engine, self._run, self._world)
                self._best.keep(self._engine.module.student, step, scores)
        return scores

    def save(self, step: int) -> None:
        """A checkpoint of the student and its filters."""
        card = None if self._best is None else self._best.card
        score = self._score if self._scored_at == step else None
        state = None
        if self._balance is not None:
            self._balance.settle(self._world)
            state = self._balance.state.tolist()
        self._checkpoints.save(step, self._recorder, card, score, state)


def _train(run: ResolvedRun, world: World, data: RunData, plan: Plan, engine: Any, best: BestStudent | None) -> None:
    train = run.train
    checkpoints = Checkpoints(engine, run.output_dir, run, data, world, train.global_batch_size)
    if checkpoints.card is not None and checkpoints.card.balance is not None:
        engine.module.balance.load(checkpoints.card.balance)
    if best is not None:
        best.go_back(checkpoints.card.best if checkpoints.card else None, train.steps)
    rows: Rows = data.training_rows(run, world)
    if (teacher := engine.module.teacher) is not None:
        rows = AnnouncedRows(rows, teacher)
    logger.info("Stage II: %s, steps %d to %d", run.method, checkpoints.start, train.steps)
    title = f"Stage II {run.method}"
    recorder = Recorder(run.output_dir, title=title, steps=train.steps, tensorboard=run.logging.tensorboard)
    hooks = DistillationHooks(run, world, data, engine, best, checkpoints, recorder)
    steps = Steps(
        checkpoints.start,
        train.steps,
        run.logging.every,
        train.evaluate_every,
        train.save_every,
        run.seed,
        train.max_skipped_steps,
    )
    with recorder:
        checkpoints.open(recorder)
        if steps.start == 0:
            first = {"step": 0, "tokens": 0, **hooks.evaluate(0)}
            world.on_main(lambda: recorder.log(first))
        meters = Meters(world, _flops(run, data, plan))
        run_steps(engine, rows, world, recorder, steps, hooks, names=TERMS, meters=meters)


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
    spans = zip(lines, pairwise(steps), strict=True)
    milliseconds: float = sum(line.get("step_ms", 0.0) * (b - a) for line, (a, b) in spans)
    return milliseconds / 1000
