"""`deepspeed launchers/pretrain.sh --config RECIPE [--section.key=value ...]`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ted_ds.cli.common import guarded, printed, recipe_from
from ted_ds.config.schema import RunConfig


def main(argv: Sequence[str], goal: Any = "distilled") -> int:
    """Runs a recipe as far as `goal`, see `ted_ds.pretrain.run`; returns the exit code."""
    return guarded(lambda arguments: _run(arguments, goal), argv)


def _run(argv: Sequence[str], goal: Any) -> int:
    run = recipe_from(argv, "pretrain")
    printed(lambda: _pretrain(run, goal))
    return 0


def _pretrain(run: RunConfig, goal: Any) -> dict[str, Any] | None:
    from ted_ds.distributed import init_world, shut_down
    from ted_ds.pretrain.run import pretrain

    world = init_world()
    summary = pretrain(run, world, goal)
    shut_down()
    return summary if world.is_main else None
