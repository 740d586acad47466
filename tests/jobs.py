"""What the ranks of the distributed tests run: module-level functions of (world, ...)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ted_ds.distributed import World


def pretrain_recipe(world: World, path: Path, overrides: tuple[str, ...] = ()) -> dict[str, Any] | None:
    """Runs a recipe in this rank's process group."""
    from ted_ds.config.load import load_config
    from ted_ds.pretrain.run import pretrain

    return pretrain(load_config(path, list(overrides)), world)


def pretrain_error(world: World, path: Path, overrides: tuple[str, ...] = ()) -> str:
    """The message of the TedError that a recipe ends with on this rank."""
    from ted_ds.errors import TedError

    try:
        pretrain_recipe(world, path, overrides)
    except TedError as error:
        return str(error)
    raise AssertionError("the recipe ran without an error")
