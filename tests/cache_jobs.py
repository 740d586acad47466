"""What the ranks of the teacher cache's tests run."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest

import ted_ds.teacher.cache_layout
import ted_ds.teacher.hosting
import ted_ds.teacher.opening
import ted_ds.teacher.recording
from ted_ds.config.load import load_config
from ted_ds.job.world import World
from tests.jobs import pretrain_error, pretrain_recipe


def in_small_shards(world: World, path: Path, shard_bytes: int, overrides: tuple[str, ...] = ()) -> None:
    """Runs a recipe whose cache is cut into shards of `shard_bytes`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ted_ds.teacher.cache_layout, "SHARD_BYTES", shard_bytes)
        pretrain_recipe(world, path, overrides)


def without_a_teacher(world: World, path: Path, overrides: tuple[str, ...] = ()) -> None:
    """Runs a recipe on a machine that cannot load its teacher."""
    load, run = ted_ds.teacher.hosting.load_model, load_config(path, list(overrides))

    def refuse(name_or_path: str, *args: Any, **kwargs: Any) -> Any:
        assert run.teacher is not None and name_or_path != run.teacher.model, "the teacher was loaded"
        return load(name_or_path, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ted_ds.teacher.hosting, "load_model", refuse)
        pretrain_recipe(world, path, overrides)


def full_while_recording(world: World, path: Path, shard_bytes: int, written: int) -> str:
    """The error of a recipe whose disk is full after `written` shards of rank 0."""
    save, count = ted_ds.teacher.recording.save_file, 0

    def limited(tensors: Any, target: Path) -> None:
        nonlocal count
        count += "shard" in target.name
        if count > written and world.is_main:
            raise OSError(28, "No space left on device")
        save(tensors, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ted_ds.teacher.cache_layout, "SHARD_BYTES", shard_bytes)
        patch.setattr(ted_ds.teacher.recording, "save_file", limited)
        return pretrain_error(world, path)


def on_a_small_disk(world: World, path: Path, free: int) -> str:
    """The error of a recipe on a disk with `free` bytes left."""
    usage = shutil.disk_usage(path.parent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
        return pretrain_error(world, path)


def recordings(world: World, path: Path) -> int:
    """Runs a recipe whose recording takes its time; how often it recorded."""
    record, count = ted_ds.teacher.opening.record_shards, 0

    def slowly(*args: Any, **options: Any) -> None:
        nonlocal count
        count += 1
        time.sleep(3.0)
        record(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ted_ds.teacher.opening, "record_shards", slowly)
        pretrain_recipe(world, path)
    return count
