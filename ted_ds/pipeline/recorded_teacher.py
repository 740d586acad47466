"""Stage II's teacher out of a cache, which is recorded first where it is not there."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ted_ds.config.schema import RunConfig
from ted_ds.errors import CheckpointError
from ted_ds.job.world import World, logger
from ted_ds.models.loading import resident_readout
from ted_ds.pipeline.stage1 import PairPlan
from ted_ds.tasks.base import CachedOutput, Field, RunData
from ted_ds.teacher.cache_layout import (
    MANIFEST,
    UNFINISHED,
    Manifest,
    check_whole,
    fits,
    plan_shards,
    refuse_difference,
    state_field,
)
from ted_ds.teacher.cache_lock import alone_in
from ted_ds.teacher.fingerprints import file_fingerprint, model_fingerprint
from ted_ds.teacher.frozen import FrozenModel
from ted_ds.teacher.recorded import CachedTeacher, ShardReader, load_head
from ted_ds.teacher.recording import TeacherRecorder, record_shards, write_head
from ted_ds.teacher.rows import TeacherRows, teacher_rows


@dataclass(frozen=True)
class LiveTeacher:
    """The teacher that a cache stands for.

    model: folder or hub id. pairs: of the layer loss, None without one. filters: Stage I's folder, None for lwd.
    load: hosts it; a collective.
    """

    model: str
    pairs: PairPlan | None
    filters: Path | None
    load: Callable[[], FrozenModel]

    @property
    def blocks(self) -> tuple[int, ...]:
        """Its blocks of the layer map."""
        return tuple(t for _, t in self.pairs.layer_map) if self.pairs else ()

    @property
    def width(self) -> int:
        """F; 0 without a layer loss."""
        if self.pairs is None:
            return 0
        # unfiltered states have the teacher's width, which the student's filters then have too
        return (self.pairs.teacher or self.pairs.student).output_dim


def open_cached_teacher(run: RunConfig, world: World, data: RunData, live: LiveTeacher) -> CachedTeacher:
    """The teacher out of `teacher.cache`; the live one is loaded only where that has to be recorded; a collective.

    A job that comes while another records waits for it. A cache that holds more than the run needs serves it too.
    Raises CheckpointError, on every rank, for a cache of another teacher, other filters or other data, one without
    what the run needs, and a disk without room for it.
    """
    assert run.teacher is not None and run.teacher.cache is not None
    folder, rows = run.teacher.cache, teacher_rows(data.train)
    outputs: list[CachedOutput | None] = [None]
    if run.loss.kl_alpha:
        outputs = [*data.task.cached_outputs(run, live.model)]
    wanted = world.on_main(lambda: _manifests(run, rows, live, outputs))
    found = world.on_main(lambda: _find(folder, wanted, rows))
    if found is None:
        found = _record(run, world, rows, live, outputs[0], wanted)
    output = next(output for output, manifest in zip(outputs, wanted, strict=True) if fits(found, manifest))
    if not world.min(torch.tensor(int((folder / MANIFEST).exists()))):
        raise CheckpointError(f"teacher.cache {folder} is not the same folder on all nodes: give one that they share")
    return CachedTeacher(
        ShardReader(folder, found, rows.lengths, pinned=world.device.type == "cuda"),
        world.device,
        blocks=live.blocks,
        width=live.width,
        output=output,
        head=load_head(folder, found, world.device) if output is not None and output.head is not None else None,
    )


def _manifests(
    run: RunConfig, rows: TeacherRows, live: LiveTeacher, outputs: Sequence[CachedOutput | None]
) -> list[Manifest]:
    """What a cache that serves the run says of itself, for each way of keeping the output; on one rank."""
    assert run.teacher is not None
    states = {state_field(block): Field(run.teacher.dtype, live.width) for block in live.blocks}
    data, weights = rows.fingerprint(), model_fingerprint(live.model)
    filters = file_fingerprint(live.filters / "filters.safetensors") if live.filters and states else ""
    manifests = []
    for output in outputs:
        fields = {**states, **(output.fields if output else {})}
        manifests.append(
            Manifest(
                data=data,
                rows=len(rows.lengths),
                tokens=int(rows.lengths.sum()),
                teacher=live.model,
                weights=weights,
                dtype=run.teacher.dtype,
                filters=filters,
                fields=fields,
                settings=output.settings if output else {},
                head=output.head if output else None,
                firsts=plan_shards(rows.lengths, fields),
            )
        )
    return manifests


def _find(folder: Path, wanted: Sequence[Manifest], rows: TeacherRows) -> Manifest | None:
    """The cache that is there; CheckpointError where it does not serve the run, or lacks a file; on one rank."""
    found = Manifest.read(folder / MANIFEST)
    if found is None:
        return None
    if not any(fits(found, manifest) for manifest in wanted):
        refuse_difference(folder, found, wanted[0])
    check_whole(folder, found, rows.lengths)
    return found


def _record(
    run: RunConfig,
    world: World,
    rows: TeacherRows,
    live: LiveTeacher,
    output: CachedOutput | None,
    wanted: Sequence[Manifest],
) -> Manifest:
    """Records the first of `wanted`, unless another job records one meanwhile; returns what is there; a collective."""
    assert run.teacher is not None and run.teacher.cache is not None
    folder, manifest = run.teacher.cache, wanted[0]
    with alone_in(folder, world):
        found = world.on_main(lambda: _find(folder, wanted, rows))
        if found is not None:
            return found
        world.on_main(lambda: _begin(folder, manifest))
        teacher = live.load()
        if output is not None and output.head is not None:
            trusted = run.teacher.trust_remote_code
            _, head = resident_readout(teacher.module.model, world.device, trust_remote_code=trusted)
            world.on_main(lambda: write_head(folder, head))
            del head
        recorder = TeacherRecorder(teacher, live.blocks, output)
        record_shards(folder, manifest, rows, recorder, world, batch_size=run.train.micro_batch_size)
        teacher.close()
        del teacher, recorder
        gc.collect()  # hooks and modules refer to each other: the student must not find this model in memory
    return manifest


def _begin(folder: Path, manifest: Manifest) -> None:
    """Checks what an interrupted recording left, and the room on the disk; says what will be written; on one rank."""
    before, shards = Manifest.read(folder / UNFINISHED), sorted(folder.glob("shard-*.safetensors"))
    if before is not None:
        refuse_difference(folder, before, manifest)
    same = before is not None and (before.fields, before.firsts) == (manifest.fields, manifest.firsts)
    if not same and (shards or before is not None):
        raise CheckpointError(
            f"{folder} holds parts of another cache: give another teacher.cache, or delete that folder"
        )
    size, there = manifest.bytes(), sum(path.stat().st_size for path in shards)
    free = shutil.disk_usage(folder).free
    what = f"{_said(size)} for {manifest.rows} rows, {manifest.tokens} tokens ({size / manifest.tokens:.0f} bytes each)"
    if size - there > free:
        raise CheckpointError(
            f"teacher.cache {folder} would take {what}, {_said(there)} of it there, but {_said(free)} are free: "
            "make room, give a folder on another disk, or remove teacher.cache"
        )
    logger.info("teacher cache %s: %s, %d of %d shards there", folder, what, len(shards), len(manifest.firsts))
    manifest.write(folder / UNFINISHED)


def _said(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"
