"""What the ranks of the distributed tests run: module-level functions of (world, ...)."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from deepspeed.utils import groups, safe_get_full_grad

from ted_ds.batch import Batch
from ted_ds.config.deepspeed import trained_engine_config
from ted_ds.config.load import load_config
from ted_ds.config.schema import RunConfig
from ted_ds.distill.engine import build_trained_engine
from ted_ds.distill.filter_learner import FilterLearner
from ted_ds.doctor.engines import choose_engines
from ted_ds.doctor.throughput import Throughput, measure_throughput
from ted_ds.doctor.throughput_report import write_report
from ted_ds.errors import TedError
from ted_ds.job.world import World
from ted_ds.models.channels import Measurements
from ted_ds.models.cut_plan import find_roles
from ted_ds.models.loading import gathered, meta_model
from ted_ds.pipeline.calibration import Calibration, Trial
from ted_ds.pipeline.pair_plan import plan_pairs
from ted_ds.pipeline.run import Goal, run_recipe
from ted_ds.pipeline.stage0 import ensure_models
from ted_ds.pipeline.stage1 import learn_filters
from ted_ds.pipeline.stage2 import Plan, build_distillation_engine
from ted_ds.pipeline.step import global_counts, train_step
from ted_ds.tasks.base import RunData, Task
from ted_ds.tasks.classification import Regression
from ted_ds.tasks.registry import open_data, open_tokenizer
from ted_ds.teacher.hosting import load_frozen
from tests.golden.check import Case


def pretrain_recipe(
    world: World, path: Path, overrides: tuple[str, ...] = (), goal: Goal = "distilled"
) -> dict[str, Any] | None:
    """Runs a recipe in this rank's process group, as the commands do."""
    return run_recipe(choose_engines(load_config(path, list(overrides)), world), world, goal)


def pretrain_error(world: World, path: Path, overrides: tuple[str, ...] = (), goal: Goal = "distilled") -> str:
    """The message of the TedError that a recipe ends with on this rank."""
    try:
        pretrain_recipe(world, path, overrides, goal)
    except TedError as error:
        return str(error)
    raise AssertionError("the recipe ran without an error")


def first_gradients(world: World, path: Path, overrides: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    """Stage II's gradients of the first global batch, whole, of a recipe whose Stage I is done or is run now."""
    run, data, engine = built(world, path, overrides)
    counts = global_counts(batches := data.training_rows(run, world).micro_batches(0), world)
    for i, batch in enumerate(batches):
        loss, _ = engine(batch=batch, counts=counts)
        engine.backward(loss * world.size, scale_wrt_gas=False)
        if i < len(batches) - 1:
            engine.step()
    gradients = {name: safe_get_full_grad(p).clone() for name, p in engine.module.named_parameters()}
    engine.destroy()
    return gradients if world.is_main else {}


def first_filters(world: World, path: Path, overrides: tuple[str, ...] = ()) -> list[torch.Tensor]:
    """The weights that the student's filters have as Stage II begins."""
    _, _, engine = built(world, path, overrides)
    weights = [filter_.weight for filter_ in engine.module.filters]
    with gathered(weights):
        found = [weight.detach().clone() for weight in weights]
    engine.destroy()
    return found


def attention_of(world: World, path: Path, overrides: tuple[str, ...] = ()) -> list[str]:
    """How the student and the teacher of Stage II compute attention."""
    _, _, engine = built(world, path, overrides)
    models = (engine.module.student, engine.module.teacher.module.model)
    found = [model.config._attn_implementation for model in models]
    engine.destroy()
    return found


def restored_logits(world: World, path: Path, ids: torch.Tensor) -> torch.Tensor:
    """A finished run's logits from its engine, restored from the last checkpoint."""
    run, _, engine = built(world, path)
    folder = run.output_dir / "checkpoints"
    engine.load_checkpoint(str(folder), tag=(folder / "latest").read_text())
    engine.eval()
    with torch.no_grad(), gathered(list(engine.module.student.parameters())):
        logits = engine.module.student(ids).logits
    engine.destroy()
    return logits


def built(world: World, path: Path, overrides: tuple[str, ...] = ()) -> tuple[RunConfig, RunData, Any]:
    """A recipe's Stage II engine before its first step."""
    run = load_config(path, list(overrides))
    tokenizer = open_tokenizer(run, world)
    models = ensure_models(run, tokenizer, world)
    pairs = plan_pairs(run, models)
    data = open_data(run, world, tokenizer)
    run = run.resolved(data.num_rows)
    filters = learn_filters(run, world, data, pairs, models) if pairs else {}
    return run, data, build_distillation_engine(run, world, data, Plan(models, pairs, filters))


def full_disk(world: World, path: Path, overrides: tuple[str, ...]) -> str:
    """The error of a recipe while rank 0's disk is full: nothing that torch writes fits on it."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        if world.is_main:
            patch.setattr(torch, "save", refuse)
        return pretrain_error(world, path, overrides)


def zero_timeout(world: World) -> float:
    """Seconds that ZeRO's collectives wait for the other ranks."""
    options: Any = groups._get_data_parallel_group()._get_backend(world.device).options
    return float(options._timeout.total_seconds())


@dataclass(frozen=True)
class TaskOnly:
    """What Stage II needs of a run's data when its batches come from elsewhere."""

    task: Task
    tokenizer: Any
    train: Any = None


def golden_losses(world: World, path: Path, case: Path) -> dict[str, list[float]]:
    """The ten-step trajectories of a golden case through DeepSpeed's engines, its rows dealt to the ranks.

    path: a recipe of the case's options, whose models are the case's own checkpoints.
    """
    run = load_config(path)
    tokenizer: Any = SimpleNamespace(pad_id=0)  # published checkpoints need no more of one
    models = ensure_models(run, tokenizer, world)
    pairs = plan_pairs(run, models)
    assert pairs is not None and pairs.teacher is not None
    golden = Case(case, torch.float32)
    batches = [_share(golden.batch, world)]
    losses: dict[str, list[float]] = {}
    config = trained_engine_config(
        run, world_size=world.size, learning_rate=1e-3, weight_decay=0.0, cpu=world.device.type == "cpu"
    )
    task = golden.task()
    if isinstance(task, Regression):
        task = Regression(world.gather)
    only: Any = TaskOnly(task, tokenizer)
    for side, model, filters in (
        ("teacher", models.teacher, pairs.teacher),
        ("student", models.student, pairs.student),
    ):
        assert model is not None
        frozen = load_frozen(run, world, model, task=task, tokenizer=tokenizer, trust_remote_code=False)
        learner = FilterLearner(filters.build(), frozen, filters.blocks, golden.head(side))
        golden.load_probes(learner, side)
        engine = build_trained_engine(learner, deepspeed_config=config, schedule=lambda step: 1.0)
        losses[f"stage1_{side}"] = _eleven_steps(engine, batches, world, step=0)
        engine.destroy()
        frozen.close()
    plan = Plan(models, pairs, {side: models.published[side] for side in ("teacher", "student")})
    engine = build_distillation_engine(run, world, only, plan)
    losses["ted"] = _eleven_steps(engine, batches, world)
    engine.destroy()
    return losses


def _eleven_steps(engine: Any, batches: list[Batch], world: World, **inputs: Any) -> list[float]:
    engine.train()
    return [float(world.sum(train_step(engine, batches, world, **inputs))[0]) for _ in range(11)]


def _share(batch: Batch, world: World) -> Batch:
    """This rank's rows of a batch."""
    tensors = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return replace(batch, **{name: t[world.rank :: world.size] for name, t in tensors.items() if t is not None})


def trials_of(
    world: World, path: Path, left_out: list[tuple[int, ...]], overrides: tuple[str, ...] = ()
) -> tuple[list[Trial], Measurements, list[dict[str, torch.Tensor]]]:
    """What the calibration of a recipe finds of its teacher without these blocks; its states without the last ones."""
    run = load_config(path, list(overrides))
    assert run.teacher is not None and run.student.init is not None
    tokenizer = open_tokenizer(run, world)
    data = open_data(run, world, tokenizer)
    teacher = load_frozen(run, world, run.teacher.model, task=data.task, tokenizer=tokenizer, trust_remote_code=False)
    calibration = Calibration.of(run, world, data, teacher, run.student.init.calibration_tokens)
    roles = find_roles(meta_model(run.teacher.model, run.spec.kind))
    measured = calibration.measure(roles, left_out[-1])
    sites = {site: len(energy) for site, energy in measured.energies.items()}
    if roles is not None:
        sites["norm.weight"] = sites["1.post_attention_layernorm.weight"] = calibration.width
    with patch("ted_ds.pipeline.calibration.MOMENTS_BYTES", 20_000):  # several readings of the sample
        moments = list(calibration.moments(roles, left_out[-1], sites))
    found = calibration.trials(left_out), measured, moments
    teacher.close()
    return found


def throughput_of(
    world: World, path: Path, overrides: tuple[str, ...] = (), limit_gib: float | None = None
) -> tuple[Throughput, list[tuple[int, int, float]], str]:
    """What `ted-ds bench` measures of a recipe, and prints; of each of its steps the micro-batches, how many optimizer
    steps the engine made of them, and what was left of the layer loss. limit_gib: the memory, if not this machine's.
    """
    run, steps = load_config(path, list(overrides)), []

    def recorded(engine: Any, batches: list[Batch], *given: Any, **inputs: Any) -> Any:
        before = engine.global_steps
        terms = train_step(engine, batches, *given, **inputs)
        steps.append((len(batches), engine.global_steps - before, inputs["fade"]))
        return terms

    def few_documents(folder: Path) -> None:
        folder.mkdir()
        (folder / "train.jsonl").write_text(('{"text": "' + "w1 w2 w3 " * 20 + '"}\n') * 10, encoding="utf-8")

    changes: dict[str, Any] = {"train_step": recorded, "write_stdlib_corpus": few_documents}
    changes |= {"available_bytes": lambda _: limit_gib * 2**30} if limit_gib else {}
    with patch.multiple("ted_ds.doctor.throughput", **changes):
        found = measure_throughput(run, world, run.output_dir / "bench/work", steps=1)
    text = world.on_main(lambda: write_report(found, run, {}, run.output_dir / "bench"))
    return found, steps, text
