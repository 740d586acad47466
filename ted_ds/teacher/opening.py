"""The run's teacher: hosted, or read from `teacher.cache`, which is recorded first if it is not there."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ted_ds.config.schema import RunConfig
from ted_ds.config.sections import TeacherConfig
from ted_ds.data.encoded import EncodedRows
from ted_ds.data.packed import PackedBlocks
from ted_ds.data.tokenizers import Tokenizer
from ted_ds.errors import CheckpointError
from ted_ds.job.world import World
from ted_ds.models.loading import resident_readout
from ted_ds.tasks.base import CachedOutput, Field, Task
from ted_ds.teacher.cache_layout import (
    MANIFEST,
    Manifest,
    find_cache,
    fits,
    plan_shards,
    state_field,
)
from ted_ds.teacher.contract import Teacher
from ted_ds.teacher.fingerprints import file_fingerprint, model_fingerprint
from ted_ds.teacher.frozen import FrozenModel
from ted_ds.teacher.hosting import load_frozen
from ted_ds.teacher.recorded import CachedTeacher, ShardReader, load_head
from ted_ds.teacher.recording import (
    alone_in_cache,
    begin_recording,
    record_batch,
    record_shards,
    write_head,
)


@dataclass(frozen=True)
class TeacherPlan:
    """The teacher that Stage II compares with.

    model: folder or hub id. filters: Stage I's folder; None: without filters (lwd, or no layer loss).
    blocks: its blocks of the layer map, in order. width: F; 0 without a layer loss.
    """

    model: str
    filters: Path | None
    blocks: tuple[int, ...]
    width: int


def open_teacher(
    run: RunConfig,
    world: World,
    plan: TeacherPlan,
    *,
    task: Task,
    tokenizer: Tokenizer,
    rows: PackedBlocks | EncodedRows,
) -> Teacher:
    """The teacher, read from `teacher.cache` or, without one, hosted as `teacher.sharding` says; a collective.

    A cache that is not there is recorded first, by the hosted teacher. A job that comes while another records waits
    for it. A cache that holds more than the run needs serves it too. rows: the training rows.
    Raises CheckpointError, on every rank, for a cache of another teacher, other filters or other data, one without
    what the run needs, and a disk without room for it.
    """
    section = run.teacher
    assert section is not None
    load = partial(
        load_frozen,
        run,
        world,
        plan.model,
        task=task,
        tokenizer=tokenizer,
        trust_remote_code=section.trust_remote_code,
        filters=plan.filters,
    )
    if section.cache is None:
        return load()
    kept = task.cached_outputs(run, plan.model) if run.loss.kl_alpha else [None]
    return _Cache(section.cache, section, plan, rows, world).opened(kept, load, run.train.micro_batch_size)


@dataclass(frozen=True)
class _Cache:
    """The cache that a run's recipe names."""

    folder: Path
    section: TeacherConfig
    plan: TeacherPlan
    rows: PackedBlocks | EncodedRows
    world: World

    def opened(
        self, outputs: Sequence[CachedOutput | None], load: Callable[[], FrozenModel], batch_size: int
    ) -> CachedTeacher:
        """The teacher in it, recorded first if need be; a collective.

        outputs: the ways of keeping the teacher's output that serve the run; the first is what is recorded.
        """
        folder, world, lengths = self.folder, self.world, self.rows.lengths
        wanted = world.on_main(lambda: self._manifests(outputs))
        find = partial(find_cache, folder, wanted, lengths)
        found = world.on_main(find)
        if found is None:
            with alone_in_cache(folder, world):
                found = world.on_main(find)  # another job may have recorded it meanwhile
                if found is None:
                    found = wanted[0]
                    world.on_main(partial(begin_recording, folder, found))
                    self._record(found, outputs[0], load, batch_size)
        if not world.min(torch.tensor(int((folder / MANIFEST).exists()))):
            raise CheckpointError(
                f"teacher.cache {folder} is not the same folder on all nodes: give one that they share"
            )
        output = next(output for output, manifest in zip(outputs, wanted, strict=True) if fits(found, manifest))
        return CachedTeacher(
            ShardReader(folder, found, lengths, pinned=world.device.type == "cuda"),
            world.device,
            blocks=self.plan.blocks,
            width=self.plan.width,
            output=output,
            head=load_head(folder, found, world.device) if output is not None and output.head is not None else None,
        )

    def _record(
        self, manifest: Manifest, output: CachedOutput | None, load: Callable[[], FrozenModel], batch_size: int
    ) -> None:
        """Loads the teacher, records it and lets it go; a collective."""
        folder, world, teacher = self.folder, self.world, load()
        if output is not None and output.head is not None:
            _, head = resident_readout(teacher.module.model, world.device)
            world.on_main(lambda: write_head(folder, head))
            del head
        record = partial(record_batch, teacher, self.plan.blocks, output)
        record_shards(folder, manifest, self.rows, record, world, batch_size=batch_size)
        teacher.close()
        del teacher, record
        gc.collect()  # hooks and modules refer to each other: the student must not find this model in memory

    def _manifests(self, outputs: Sequence[CachedOutput | None]) -> list[Manifest]:
        """What a cache that serves the run says of itself, for each way of keeping the output; on one rank."""
        plan, dtype, lengths = self.plan, self.section.dtype, self.rows.lengths
        states = {state_field(block): Field(dtype, plan.width) for block in plan.blocks}
        data, weights = self.rows.fingerprint(), model_fingerprint(plan.model)
        filters = file_fingerprint(plan.filters / "filters.safetensors") if plan.filters and states else ""
        every_fields = [{**states, **(output.fields if output else {})} for output in outputs]
        return [
            Manifest(
                data=data,
                rows=len(lengths),
                tokens=int(lengths.sum()),
                teacher=plan.model,
                weights=weights,
                dtype=dtype,
                filters=filters,
                fields=fields,
                settings=output.settings if output else {},
                head=output.head if output else None,
                firsts=plan_shards(lengths, fields),
            )
            for output, fields in zip(outputs, every_fields, strict=True)
        ]
