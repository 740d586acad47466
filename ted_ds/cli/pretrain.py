"""`deepspeed launchers/pretrain.sh --config RECIPE [--section.key=value ...]`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ted_ds.cli.common import guarded, printed, recipe_from
from ted_ds.config.schema import RunConfig
from ted_ds.errors import ConfigError, TedError


def main(argv: Sequence[str]) -> int:
    """Runs a recipe of continual pre-training; returns the exit code."""
    return guarded(lambda arguments: run_command(arguments, "pretrain", "distilled"), argv)


def run_command(argv: Sequence[str], program: str, goal: Any) -> int:
    """Runs a recipe as far as `goal`, see `ted_ds.stages.run`; returns the exit code.

    Raises ConfigError where a launcher is given the other one's recipe.
    """
    run = recipe_from(argv, program)
    fitting = "pretrain" if run.task == "causal-lm" else "finetune"
    if program in ("pretrain", "finetune") and program != fitting:
        raise ConfigError(f"task: {run.task} is for launchers/{fitting}.sh, this is {program}.sh: start that one")
    printed(lambda: _run(run, goal))
    return 0


def _run(run: RunConfig, goal: Any) -> dict[str, Any] | None:
    from ted_ds.distributed import init_world, leave_at_once, shut_down
    from ted_ds.stages.run import run_recipe

    world = init_world()
    try:
        summary = run_recipe(run, world, goal)
    except TedError:
        leave_at_once()
        raise
    shut_down()
    return summary if world.is_main else None
