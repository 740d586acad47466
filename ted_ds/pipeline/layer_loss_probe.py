"""Whether a layer loss pays: two short runs from the run's own start, one of them of kd, and their held-out scores."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ted_ds.config.schema import RunConfig
from ted_ds.job.files import write_atomically
from ted_ds.job.world import World, logger
from ted_ds.pipeline.stage0 import CALIBRATION

PROBE = "probe"
"""In a run's folder: a whole run of each of both methods, and their scores."""

SHARED = ("initial_student", CALIBRATION, "teacher_filters", "student_filters")


def probe_layer_loss(
    run: RunConfig, world: World, run_short: Callable[[RunConfig, World], dict[str, Any] | None]
) -> None:
    """The runs of `loss.probe_steps`, as far as they are not done, and a sentence on what they say; a collective.

    They begin with the run's initial student and Stage I's filters, which are there.
    """
    if not run.loss.probe_steps or not run.loss.mse_alpha:
        return
    folder = run.output_dir / PROBE
    path = folder / "probe.json"
    if world.on_main(path.exists):
        return
    name = f"validation_{run.spec.best or 'loss'}"
    scores: dict[str, float] = {}
    for method in ("kd", run.method):
        short = _recipe(run, folder / method)
        logger.info("does the layer loss pay? %d steps of %s -> %s", run.loss.probe_steps, method, short.output_dir)
        world.on_main(partial(_share, run.output_dir, short.output_dir))
        summary = run_short(short, world)
        gc.collect()  # engines and modules refer to each other: the next model must not find them in memory
        assert summary is not None
        scores[method] = float(summary[name])
    pays = (scores[run.method] - scores["kd"]) * (1 if run.spec.best else -1) > 0
    world.on_main(lambda: _write(path, {"score": name, "steps": run.loss.probe_steps, **scores, "pays": pays}))
    said = f"after {run.loss.probe_steps} steps {name} is {scores[run.method]:.4f}, {scores['kd']:.4f} by kd alone"
    if pays:
        logger.info("the layer loss pays: %s", said)
    else:
        logger.warning("the layer loss does not pay: %s: method kd would be cheaper", said)


def _recipe(run: RunConfig, folder: Path) -> RunConfig:
    """A short run of the method that `folder` is named after; its rate warms up and falls within its own steps."""
    steps = run.loss.probe_steps
    assert run.teacher is not None
    loss: dict[str, Any] = {"probe_steps": 0}
    teacher = run.teacher
    if folder.name != run.method:
        loss["mse_alpha"] = 0.0
        teacher = teacher.model_copy(update={"cache": None})  # what is recorded for layers has more than kd asks for
    changes = {
        "method": folder.name,
        "output_dir": folder,
        "loss": run.loss.model_copy(update=loss),
        "teacher": teacher,
        "data": run.data.model_copy(update={"prepared": run.prepared_folder}),
        "train": run.train.model_copy(update={"steps": steps, "epochs": None, "evaluate_every": 0, "save_every": 0}),
        "optimizer": run.optimizer.model_copy(
            update={"warmup_steps": min(run.optimizer.warmup_steps, max(1, steps // 10))}
        ),
    }
    return run.model_copy(update=changes)


def _share(run: Path, short: Path) -> None:
    """Links what both runs begin with; on one rank."""
    short.mkdir(parents=True, exist_ok=True)
    for name in SHARED:
        if (run / name).exists() and not (short / name).exists():
            (short / name).symlink_to((run / name).resolve())


def _write(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(content, indent=2) + "\n")
