"""`deepspeed launchers/pretrain.sh --config RECIPE [--section.key=value ...]`."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from ted_ds.cli.common import guarded, printed, recipe_from
from ted_ds.config.schema import RunConfig
from ted_ds.config.tasks import KINDS
from ted_ds.errors import ConfigError


def main(argv: Sequence[str]) -> int:
    """Runs a recipe of continual pre-training; returns the exit code."""
    return guarded(lambda arguments: run_command(arguments, "pretrain", "distilled"), argv)


def run_command(argv: Sequence[str], program: str, goal: Any) -> int:
    """Runs a recipe as far as `goal`, see `ted_ds.pipeline.run`; returns the exit code.

    Raises ConfigError if a launcher is given the other one's recipe.
    """
    run = recipe_from(argv, program)
    fitting = "pretrain" if KINDS[run.spec.kind].lm_head else "finetune"
    if program in ("pretrain", "finetune") and program != fitting:
        raise ConfigError(f"task: {run.task} is for launchers/{fitting}.sh, this is {program}.sh: start that one")
    run_to(run, goal)
    return 0


def run_to(run: RunConfig, goal: Any) -> None:
    """Runs a recipe on the ranks that this process is one of, as far as `goal`, and prints what it gives.

    Raises a TedError: Stopped if a signal or `train.max_minutes` ended it. If another rank is lost, the process
    ends with RankLost's exit code.
    """
    from ted_ds.job.stop import StopRequest

    stop = StopRequest(run.train.max_minutes)
    stop.listen()
    printed(lambda: _run(run, goal, stop))


def _run(run: RunConfig, goal: Any, stop: Any) -> dict[str, Any] | None:
    from ted_ds.doctor.engines import choose_engines
    from ted_ds.job.world import init_world, lost_ranks_named, shut_down
    from ted_ds.pipeline.run import run_recipe

    world = init_world(timedelta(minutes=run.train.timeout_minutes), stop)
    gc.freeze()  # garbage is collected at each engine's start and end: 0.3 s each over all that is imported
    try:
        with lost_ranks_named(world):
            summary = run_recipe(choose_engines(run, world), world, goal)
            shut_down(world)
    finally:
        gc.unfreeze()
    return summary if world.is_main else None
