"""`deepspeed launchers/pretrain.sh --config RECIPE [--section.key=value ...]`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ted_ds.cli.common import guarded, printed, recipe_from
from ted_ds.config.schema import RunConfig


def main(argv: Sequence[str], until: str | None = None) -> int:
    """Runs all stages of a recipe, or those up to `until` ("student" or "filters"); returns the exit code."""
    return guarded(lambda arguments: _run(arguments, until), argv)


def _run(argv: Sequence[str], until: str | None) -> int:
    run = recipe_from(argv, "pretrain")
    printed(lambda: _pretrain(run, until))
    return 0


def _pretrain(run: RunConfig, until: str | None) -> dict[str, Any] | None:
    from ted_ds.distributed import init_world, shut_down
    from ted_ds.pretrain.run import pretrain

    world = init_world()
    summary = pretrain(run, world, until=until)
    shut_down()
    return summary if world.is_main else None
