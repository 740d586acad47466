"""Recording: the teacher runs once over every training row, and each rank writes whole shards."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tqdm import tqdm

from ted_ds.batch import Batch
from ted_ds.data.encoded import EncodedRows
from ted_ds.data.packed import PackedBlocks
from ted_ds.errors import CheckpointError
from ted_ds.job.lock import alone
from ted_ds.job.world import World, logger
from ted_ds.models.loading import DTYPES
from ted_ds.ops import Head
from ted_ds.tasks.base import CachedOutput, Field
from ted_ds.teacher.cache_layout import (
    HEAD,
    MANIFEST,
    UNFINISHED,
    Manifest,
    Places,
    refuse_difference,
    shard_path,
    state_field,
)
from ted_ds.teacher.contract import Teacher, stream_states

Record = Callable[[Batch], dict[str, torch.Tensor]]


def alone_in_cache(folder: Path, world: World) -> AbstractContextManager[None]:
    """Alone in writing into a cache, as soon as no other job does; a collective."""
    return alone(
        folder / "recording.lock",
        world,
        busy=f"teacher cache {folder} is being written by another job: waiting for it",
    )


def begin_recording(folder: Path, manifest: Manifest) -> None:
    """Checks what an interrupted recording left, and the room on the disk; says what will be written; on one rank.

    Raises CheckpointError for parts of another cache, or too small a disk.
    """
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


def record_batch(
    teacher: Teacher, blocks: Sequence[int], output: CachedOutput | None, batch: Batch
) -> dict[str, torch.Tensor]:
    """The fields of a batch on the CPU, [B, S, width] or [B, width]; one state is on the device at a time.

    blocks: of the pairs, in order. output: None without a KL: the forward then ends after the last pair.
    """
    found: dict[str, torch.Tensor] = {}

    def keep_state(pair: int, hidden: torch.Tensor) -> None:
        found[state_field(blocks[pair])] = teacher.target(pair, hidden).cpu()

    def keep_output(values: torch.Tensor, head: Head | None) -> None:
        assert output is not None
        with torch.no_grad():
            found.update({name: t.cpu() for name, t in output.record(values, head).items()})

    sources = [teacher.sources[block] for block in blocks]
    stream_states(teacher, batch, sources, keep_state, keep_output if output else None)
    return found


def record_shards(
    folder: Path, manifest: Manifest, rows: PackedBlocks | EncodedRows, record: Record, world: World, *, batch_size: int
) -> None:
    """Records the shards that `folder` lacks, dealt to the ranks, then seals it; a collective.

    record: a batch -> its fields, see `record_batch`.
    A shard's rows run through the teacher in order of length, `batch_size` at a time, on every rank alike: what is
    written does not depend on the number of ranks. All ranks make the same number of forwards, as ZeRO-3 requires;
    a rank without rows left repeats row 0 and drops the result.
    Raises CheckpointError, on every rank, if any rank could not write; what is finished stays for the next start.
    """
    lengths = rows.lengths
    places = Places(lengths, manifest.firsts)
    missing = world.on_main(lambda: [i for i in range(places.num_shards) if not shard_path(folder, i).exists()])
    turns = [missing[i : i + world.size] for i in range(0, len(missing), world.size)]
    total = sum(len(places.rows(shard)) for shard in missing)
    with tqdm(total=total, unit="row", desc=f"record {folder.name}", disable=not world.is_main) as bar:
        for turn in turns:
            batches = [_batches(places.rows(number), lengths, batch_size) for number in turn]
            shard = _Shard(places, turn[world.rank], manifest.fields) if world.rank < len(turn) else None
            own = batches[world.rank] if shard else []
            for i in range(max(map(len, batches))):
                found = record(rows.batch(own[i] if i < len(own) else np.arange(1)).to(world.device))
                if shard is not None and i < len(own):
                    shard.add(own[i], found)
            _write_together(folder, shard, world)
            bar.update(sum(len(places.rows(number)) for number in turn))
    world.on_main(lambda: _seal(folder))


def write_head(folder: Path, head: Head) -> None:
    """Writes an LM head's weight and bias."""
    tensors = {"weight": head.weight, "bias": head.bias}
    _write(folder / HEAD, {name: t.detach().cpu().contiguous() for name, t in tensors.items() if t is not None})


class _Shard:
    """The records of a range of rows, filled in any order."""

    def __init__(self, places: Places, number: int, fields: Mapping[str, Field]) -> None:
        self.number, self._places, self._fields = number, places, fields
        sizes = {True: len(places.rows(number)), False: places.tokens(number)}
        self.tensors = {
            name: torch.empty(sizes[field.per_row], field.width, dtype=DTYPES[field.dtype])
            for name, field in fields.items()
        }

    def add(self, rows: np.ndarray, found: dict[str, torch.Tensor]) -> None:
        for name, field in self._fields.items():
            for values, row in zip(found[name], rows.tolist(), strict=True):
                place = self._places.within(self.number, row, field)
                items = values[None] if field.per_row else values[: place.stop - place.start]
                self.tensors[name][place].copy_(items)


def _batches(rows: range, lengths: np.ndarray, size: int) -> list[np.ndarray]:
    """The rows in order of length, `size` at a time."""
    order = np.arange(rows.start, rows.stop)
    order = order[np.argsort(-lengths[order], kind="stable")]
    return [order[i : i + size] for i in range(0, len(order), size)]


def _write_together(folder: Path, shard: _Shard | None, world: World) -> None:
    """Writes every rank's shard. An error is raised on all ranks: one that left would keep the others waiting."""
    error: OSError | None = None
    if shard is not None:
        try:
            _write(shard_path(folder, shard.number), shard.tensors)
        except OSError as caught:
            error = caught
    if not world.min(torch.tensor(0 if error else 1)):
        raise CheckpointError(
            f"teacher.cache {folder} could not be written ({error or 'on another rank'}): make room and start again; "
            "finished shards are kept"
        ) from error


def _write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """The whole file or none: a temporary one, flushed to disk, renamed."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file(tensors, temporary)
    except Exception as error:  # safetensors has an error of its own for a full disk
        temporary.unlink(missing_ok=True)
        raise OSError(str(error)) from error
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def _seal(folder: Path) -> None:
    """Gives the manifest the name that says: all shards are there."""
    with (folder / UNFINISHED).open("rb+") as file:
        os.fsync(file.fileno())
    (folder / UNFINISHED).replace(folder / MANIFEST)
