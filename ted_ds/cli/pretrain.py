"""`deepspeed launchers/pretrain.sh --config RECIPE [--section.key=value ...]`."""

from __future__ import annotations

import json
from collections.abc import Sequence

from ted_ds.cli.common import guarded, recipe_from


def main(argv: Sequence[str], until: str | None = None) -> int:
    """Runs all stages of a recipe, or those up to `until` ("student" or "filters"); returns the exit code."""
    return guarded(lambda arguments: _run(arguments, until), argv)


def _run(argv: Sequence[str], until: str | None) -> int:
    run = recipe_from(argv, "pretrain")

    from ted_ds.distributed import init_world, shut_down
    from ted_ds.pretrain.run import pretrain

    world = init_world()
    summary = pretrain(run, world, until=until)
    if world.is_main and summary:
        print(json.dumps(summary, indent=2))
    shut_down()
    return 0
