"""The whole job, of any task: the stages in order, skipping what is complete."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from ted_ds.config.choices import METHODS
from ted_ds.config.continuation import as_begun, first_change
from ted_ds.config.deepspeed import trained_engine_config
from ted_ds.config.load import dump_config, read_yaml
from ted_ds.config.schema import RunConfig
from ted_ds.data.text_files import matching_files
from ted_ds.distill.engine_config import check_engine_config
from ted_ds.errors import CheckpointError, ConfigError
from ted_ds.job.lock import alone
from ted_ds.job.versions import commit, versions
from ted_ds.job.world import World, logger
from ted_ds.models.fit import check_ids
from ted_ds.pipeline.checkpoints import latest_tag
from ted_ds.pipeline.iterative import ROUNDS, heal_in_rounds
from ted_ds.pipeline.layer_loss_probe import PROBE, probe_layer_loss
from ted_ds.pipeline.pair_plan import plan_pairs
from ted_ds.pipeline.stage0 import CALIBRATION, MODELS, check_models, ensure_models
from ted_ds.pipeline.stage1 import learn_filters
from ted_ds.pipeline.stage2 import Plan, distill, export_checkpoint
from ted_ds.runs.progress import finished
from ted_ds.tasks.registry import open_data, open_tokenizer
from ted_ds.teacher.hosting import HOSTS

LOCK = "run.lock"
"""In an output folder: held by the run that writes there."""

Goal = Literal["student", "filters", "distilled", "export"]
"""Stage 0 done; Stage I done; all done; the last checkpoint exported, whether or not all is done."""


def run_recipe(run: RunConfig, world: World, goal: Goal = "distilled") -> dict[str, Any] | None:
    """Runs a recipe on its output folder as far as `goal`, continuing what is there; a collective.

    Returns summary.json if all is done, None after Stage 0 and I, the steps and folder of an export.

    Raises a TedError, on every rank, if recipe, data or models are wrong.
    """
    if (begun := run.output_dir / "config.yaml").exists():
        run = as_begun(run, read_yaml(begun))
    _refuse_own_folders(run)
    _check_engines(run, world)
    world.on_main(lambda: _find_files(run))
    if goal == "export":
        return _run(run, world, goal)
    busy = (
        f"{run.output_dir} has a run going on (it holds {LOCK}): wait until its processes have ended, or give another "
        "output_dir"
    )
    with alone(run.output_dir / LOCK, world, busy=ConfigError(busy)):
        return _run(run, world, goal)


def _run(run: RunConfig, world: World, goal: Goal) -> dict[str, Any] | None:
    world.on_main(lambda: _claim(run, export=goal == "export"))
    _check_shared(run.output_dir / "config.yaml", world)
    summary = world.on_main(lambda: finished(run))
    if summary is not None:
        if goal == "export":
            raise ConfigError(f"{run.output_dir} is complete: its student is in {run.output_dir / 'student'}")
        logger.info("%s is complete (%d steps); nothing to do", run.output_dir, summary["steps"])
        return summary
    tokenizer = open_tokenizer(run, world)
    cut, origin = run, None
    if run.student.init is not None and run.student.init.heals_in_rounds:
        cut, origin = heal_in_rounds(run, world, run_recipe)
    models = ensure_models(cut, tokenizer, world, origin)
    if goal == "student":
        return None
    pairs = plan_pairs(run, models)
    rows = check_models(run, models, tokenizer, world)
    data = open_data(run, world, tokenizer, rows)
    world.on_main(lambda: check_ids(tokenizer, rows, data.splits))
    resolved = run.resolved(data.num_rows)
    filters = learn_filters(resolved, world, data, pairs, models) if pairs else {}
    if goal == "filters":
        return None
    if goal != "export":
        probe_layer_loss(run, world, run_recipe)
    last_stage = export_checkpoint if goal == "export" else distill
    return last_stage(resolved, world, data, Plan(models, pairs, filters))


def _refuse_own_folders(run: RunConfig) -> None:
    """Raises ConfigError if the recipe reads something from where the run will write: it would be replaced."""
    written = ["published_teacher", "published_student", "teacher_filters", "student_filters"]
    written += ["checkpoints", "best", "student", CALIBRATION, ROUNDS, PROBE]
    written += ["initial_student"] if run.student.model is None or run.student.init_from_pretrained else []
    written += ["data"] if run.data.prepared is None else []
    given: dict[str, list[str | None]] = {
        "student.model": [run.student.model],
        "student.pretrained": [run.student.pretrained],
        "student.init.model": [None if run.student.init is None else run.student.init.model],
        "teacher.model": [None if run.teacher is None else run.teacher.model],
        "data.tokenizer": [run.data.tokenizer],
    }
    entries = {"data.train": run.data.train, "data.validation": run.data.validation}
    entries |= {f"data.extra_validation.{name}": files for name, files in run.data.extra_validation.items()}
    given |= {key: [entry for entry in files if isinstance(entry, str)] for key, files in entries.items()}
    for key, paths in given.items():
        for path in filter(None, paths):
            for own in (run.output_dir / name for name in written):
                if Path(path).resolve().is_relative_to(own.resolve()):
                    raise ConfigError(
                        f"{key} is {path}, but the run writes {own} itself: give a copy that lies elsewhere, or "
                        "another output_dir"
                    )


def _find_files(run: RunConfig) -> None:
    """Raises DataError for a file that is not there, before the folder is claimed; prepared data need none."""
    for split, entries in (("train", run.data.train), ("validation", run.data.validation)):
        if not (run.prepared_folder / split).exists():
            for entry in entries:
                if isinstance(entry, str):
                    matching_files(entry)


def _check_engines(run: RunConfig, world: World) -> None:
    """Raises ConfigError for DeepSpeed files and batch sizes that cannot be, before hours are spent on data."""
    if run.teacher is not None and run.teacher.sharding == "auto":
        raise ConfigError("teacher.sharding: auto was not replaced: call ted_ds.choose_engines(run, world) before")
    own = run.filters.global_batch_size if METHODS[run.method].learns_filters else None
    for size in (None, *(() if own is None else (own.teacher, own.student))):
        config = trained_engine_config(
            run, world_size=world.size, cpu=world.device.type == "cpu", global_batch_size=size
        )
        check_engine_config(run.deepspeed, config)
    if run.teacher is not None and (frozen := HOSTS[run.teacher.sharding].engine_config(run, world.size)) is not None:
        check_engine_config(run.teacher.deepspeed, frozen)


def _check_shared(path: Path, world: World) -> None:
    """Raises ConfigError, on every rank, if a node does not see what rank 0 has just written; a collective."""
    if not world.min(torch.tensor(int(path.exists()))):
        raise ConfigError(f"{path.parent} is not the same folder on all nodes: give an output_dir that they share")


def _claim(run: RunConfig, *, export: bool) -> None:
    """Writes config.yaml, or checks it if the folder has one: one folder, one run.

    A run that ended before it made anything, for a wrong path say, leaves the folder free.
    """
    path = run.output_dir / "config.yaml"
    if export and latest_tag(run.output_dir / "checkpoints") is None:
        raise CheckpointError(f"{run.output_dir} has no checkpoint to export: run it past train.save_every steps")
    run.output_dir.mkdir(parents=True, exist_ok=True)
    if path.exists() and (change := first_change(read_yaml(path), run, str(path))) is not None:
        made = {file.name for file in run.output_dir.rglob("*") if file.is_file()} - {path.name, MODELS, LOCK}
        if made:
            raise ConfigError(
                f"{run.output_dir} holds a run with {change}: give another output_dir, or delete that folder"
            )
        for written in (path, run.output_dir / MODELS):
            written.unlink(missing_ok=True)
    if not export:
        dump_config(run, path, {**versions(), "commit": commit()})
