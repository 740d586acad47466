"""Stage II: the student and its filters against the teacher, to the exported student and summary.json."""

from __future__ import annotations

import hashlib
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ted_ds.checkpoint.export import export_student
from ted_ds.checkpoint.store import Card, load_checkpoint, save_checkpoint, write_atomically
from ted_ds.config.schema import RunConfig
from ted_ds.distill.frozen import FrozenModel, filtered_square_sums
from ted_ds.distill.objective import TERMS, DistillationModel, LossWeights
from ted_ds.distributed import World, logger, seed_everything
from ted_ds.engine.loading import checkpoint_activations, load_causal_lm
from ted_ds.engine.trained import build_trained_engine
from ted_ds.evaluation.perplexity import held_out_perplexity
from ted_ds.models.layer_map import LayerMap
from ted_ds.pretrain.data import RunData
from ted_ds.pretrain.filters import PairPlan
from ted_ds.pretrain.models import load_filters, load_frozen, new_filters, trained_config
from ted_ds.telemetry.recorder import Recorder, read_metrics
from ted_ds.train.loop import run_steps
from ted_ds.train.schedule import learning_rate_schedule
from ted_ds.train.step import global_counts


def distill(
    run: RunConfig,
    world: World,
    data: RunData,
    plan: PairPlan | None,
    filters: dict[str, Path],
    student_path: str,
) -> dict[str, Any]:
    """Runs Stage II from its last checkpoint, exports the student, returns the summary; a collective.

    plan: the layer loss's pairs, None without one. filters: Stage I's folders, empty where there are none.
    Leaves student/, checkpoints/, metrics.jsonl and summary.json in the run's folder.
    """
    engine = build_distillation_engine(run, world, data, plan, filters, student_path)
    _train(run, world, data, engine, _fingerprint(engine.module))
    export_student(engine.module.student, data.tokenizer, run.output_dir / "student", world)
    summary = world.on_main(lambda: _summarise(run))
    engine.destroy()
    return summary


def export_checkpoint(
    run: RunConfig, world: World, data: RunData, plan: PairPlan | None, filters: dict[str, Path], student_path: str
) -> dict[str, Any]:
    """Exports the student of the last checkpoint of a run that is not over; a collective. The teacher is not loaded.

    Returns {"steps", "student"}. Raises CheckpointError where the checkpoint is torn or does not fit.
    """
    module, engine = _build_student(run, world, data, student_path, plan, filters.get("student"))
    steps = load_checkpoint(engine, run.output_dir / "checkpoints", model=_fingerprint(module), world=world)
    folder = run.output_dir / "student"
    export_student(module.student, data.tokenizer, folder, world)
    engine.destroy()
    return {"steps": steps, "student": str(folder)}


def build_distillation_engine(
    run: RunConfig,
    world: World,
    data: RunData,
    plan: PairPlan | None,
    filters: dict[str, Path],
    student_path: str,
) -> Any:
    """A DeepSpeed engine on a `DistillationModel` that is joined with its hosted teacher; arguments as `distill`'s."""
    module, engine = _build_student(run, world, data, student_path, plan, filters.get("student"))
    if run.loss.kl_alpha or plan is not None:
        assert run.teacher is not None
        teacher = load_frozen(
            run,
            world,
            run.teacher.model,
            trust_remote_code=run.teacher.trust_remote_code,
            filters=filters.get("teacher"),
        )
        layer_map = plan.layer_map if plan else ()
        normalized = plan is not None and run.loss.layer_loss == "normalized_mse"
        squares = _mean_squares(run, world, data, teacher, layer_map) if normalized else None
        module.attach_teacher(teacher, layer_map, squares)
    return engine


def _build_student(
    run: RunConfig, world: World, data: RunData, path: str, plan: PairPlan | None, learnt: Path | None
) -> tuple[DistillationModel, Any]:
    rate = run.optimizer
    config = trained_config(run, world, learning_rate=rate.learning_rate, weight_decay=rate.weight_decay)
    student = load_causal_lm(
        path,
        dtype=run.student.dtype,
        deepspeed_config=config,
        dropout=run.student.dropout,
        trust_remote_code=run.student.trust_remote_code,
    )
    if run.student.activation_checkpointing:
        checkpoint_activations(student)
    seed_everything(run.seed)
    if learnt is not None:
        filters = load_filters(learnt, config, run.student.dtype, world)
    else:
        filters = new_filters(plan.student, config, run.student.dtype) if plan else nn.ModuleList()
    weights = LossWeights(run.loss.kl_alpha, run.loss.mse_alpha, run.loss.temperature)
    module = DistillationModel(student, filters, weights, vocab_size=data.tokenizer.vocab_size)
    schedule = learning_rate_schedule(
        rate.schedule,
        warmup_steps=rate.warmup_steps,
        total_steps=run.train.steps,
        final_ratio=rate.final_ratio,
    )
    return module, build_trained_engine(module, deepspeed_config=config, schedule=schedule)


def _mean_squares(
    run: RunConfig, world: World, data: RunData, teacher: FrozenModel, layer_map: LayerMap
) -> torch.Tensor:
    """[K] float32 mean squares of the teacher's filtered states over the first global batch; a collective."""
    batches = data.training_rows(run, world).micro_batches(0)
    blocks = [t for _, t in layer_map]
    sums = sum(filtered_square_sums(teacher, blocks, batch.to(world.device)) for batch in batches)
    tokens = global_counts(batches, world)[1]
    assert isinstance(sums, torch.Tensor)
    return (world.sum(sums) / (tokens * teacher.module.target_width)).float()


def _train(run: RunConfig, world: World, data: RunData, engine: Any, fingerprint: str) -> None:
    checkpoints = run.output_dir / "checkpoints"
    start = load_checkpoint(engine, checkpoints, model=fingerprint, world=world)
    held_out = data.evaluation_rows(run, world)

    def evaluate(step: int) -> dict[str, float]:
        return {} if held_out is None else held_out_perplexity(engine, held_out, world)

    def save(step: int) -> None:
        card = Card(step, world.size, fingerprint)
        save_checkpoint(engine, checkpoints, card, world, keep=run.train.keep_checkpoints)

    logger.info("Stage II: %s, steps %d to %d", run.method, start, run.train.steps)
    recorder = Recorder(
        run.output_dir,
        title=f"Stage II {run.method}",
        steps=run.train.steps,
        start_step=start,
        tensorboard=run.logging.tensorboard,
        enabled=world.is_main,
    )
    with recorder:
        if start == 0:
            recorder.log({"step": 0, "tokens": 0, **evaluate(0)})
        run_steps(
            engine,
            data.training_rows(run, world),
            world,
            recorder,
            names=TERMS,
            start=start,
            steps=run.train.steps,
            tokens_per_step=run.tokens_per_step,
            log_every=run.logging.every,
            seed=run.seed,
            evaluate=(run.train.evaluate_every, evaluate),
            save=(run.train.save_every, save),
        )


def _summarise(run: RunConfig) -> dict[str, Any]:
    """summary.json, from metrics.jsonl alone, so that a resumed run sums up all of its sessions."""
    lines = read_metrics(run.output_dir)
    first, last = lines[0], lines[-1]
    stage1 = sum(_training_seconds(read_metrics(run.output_dir / f"{side}_filters")) for side in ("teacher", "student"))
    held_out = ("validation_loss", "validation_perplexity")
    summary = {
        "method": run.method,
        "steps": last["step"],
        "tokens": last["tokens"],
        "wall_seconds": stage1 + _training_seconds(lines),
        "stage1_seconds": stage1,
        "peak_memory_gib": max(line.get("peak_memory_gib", 0.0) for line in lines),
        **{f"final_{name}": last[name] for name in TERMS},
        **{f"initial_{name}": first[name] for name in held_out if name in first},
        **{name: last[name] for name in held_out if name in last},
    }
    write_atomically(run.output_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def _training_seconds(lines: list[dict[str, Any]]) -> float:
    """Seconds spent in steps: without evaluation, saving and starting up."""
    steps = [0, *(line["step"] for line in lines)]
    return sum(line.get("step_ms", 0.0) * (b - a) for line, (a, b) in zip(lines, pairwise(steps), strict=True)) / 1000


def _fingerprint(module: nn.Module) -> str:
    """Names and shapes of what is trained: a checkpoint of anything else cannot be loaded."""
    shapes = sorted((name, *getattr(p, "ds_shape", p.shape)) for name, p in module.named_parameters())
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]
