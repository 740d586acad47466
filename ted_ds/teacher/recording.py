"""Recording: the teacher runs once over every training row, and each rank writes whole shards."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tqdm import tqdm

from ted_ds.batch import Batch
from ted_ds.errors import CheckpointError
from ted_ds.job.world import World
from ted_ds.ops import Head
from ted_ds.teacher.cache_layout import (
    DTYPES,
    HEAD,
    MANIFEST,
    UNFINISHED,
    Field,
    Manifest,
    Places,
    shard_path,
    state_field,
)
from ted_ds.teacher.contract import Teacher, stream_states
from ted_ds.teacher.outputs import CachedOutput
from ted_ds.teacher.rows import TeacherRows

Fields = Mapping[str, Field]


class TeacherRecorder:
    """Takes from a teacher's forward what a cache keeps.

    blocks: of the pairs, in order; output: None where there is no KL, and the forward ends after the last pair.
    """

    def __init__(self, teacher: Teacher, blocks: tuple[int, ...], output: CachedOutput | None) -> None:
        self._teacher, self._blocks, self._output = teacher, blocks, output
        self._sources = [teacher.sources[block] for block in blocks]

    def record(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The fields of a batch on the CPU, [B, S, width] or [B, width]; one state is on the device at a time."""
        found: dict[str, torch.Tensor] = {}

        def keep_state(pair: int, hidden: torch.Tensor) -> None:
            found[state_field(self._blocks[pair])] = self._teacher.target(pair, hidden).cpu()

        def keep_output(output: torch.Tensor, head: Head | None) -> None:
            assert self._output is not None
            with torch.no_grad():
                found.update({name: t.cpu() for name, t in self._output.record(output, head).items()})

        stream_states(self._teacher, batch, self._sources, keep_state, keep_output if self._output else None)
        return found


def record_shards(
    folder: Path, manifest: Manifest, rows: TeacherRows, recorder: TeacherRecorder, world: World, *, batch_size: int
) -> None:
    """Records the shards that `folder` lacks, dealt to the ranks, then makes it whole; a collective.

    A shard's rows run through the teacher in order of length, `batch_size` at a time, whatever rank has it: what is
    written does not depend on the number of ranks. Every rank makes as many forwards, some of them for nothing.
    Raises CheckpointError, on every rank, where any rank could not write; what is finished stays for the next start.
    """
    places = Places(rows.lengths, manifest.firsts)
    missing = world.on_main(lambda: [i for i in range(places.num_shards) if not shard_path(folder, i).exists()])
    turns = [missing[i : i + world.size] for i in range(0, len(missing), world.size)]
    total = sum(len(places.rows(shard)) for shard in missing)
    with tqdm(total=total, unit="row", desc=f"record {folder.name}", disable=not world.is_main) as bar:
        for turn in turns:
            mine = turn[world.rank] if world.rank < len(turn) else None
            shard = None if mine is None else _Shard(places, mine, manifest.fields)
            batches = [_batches(places.rows(number), rows.lengths, batch_size) for number in turn]
            own = [] if mine is None else batches[world.rank]
            for i in range(max(map(len, batches))):
                filler = i >= len(own)
                found = recorder.record(rows.batch(np.arange(1) if filler else own[i]).to(world.device))
                if shard is not None and not filler:
                    shard.add(own[i], found)
            _all_wrote(folder, world, None if shard is None else shard.write(folder))
            bar.update(sum(len(places.rows(other)) for other in turn))
    world.on_main(lambda: _seal(folder))


def write_head(folder: Path, head: Head) -> None:
    """Writes an LM head's weight and bias."""
    tensors = {"weight": head.weight, "bias": head.bias}
    _write(folder / HEAD, {name: t.detach().cpu().contiguous() for name, t in tensors.items() if t is not None})


class _Shard:
    """The records of a range of rows, filled in any order."""

    def __init__(self, places: Places, number: int, fields: Fields) -> None:
        self._places, self._number, self._fields = places, number, fields
        sizes = {True: len(places.rows(number)), False: places.tokens(number)}
        self._tensors = {
            name: torch.empty(sizes[field.per_row], field.width, dtype=DTYPES[field.dtype])
            for name, field in fields.items()
        }

    def add(self, rows: np.ndarray, found: dict[str, torch.Tensor]) -> None:
        for name, field in self._fields.items():
            for values, row in zip(found[name], rows.tolist(), strict=True):
                place = self._places.within(self._number, row, field)
                items = values[None] if field.per_row else values[: place.stop - place.start]
                self._tensors[name][place].copy_(items)

    def write(self, folder: Path) -> OSError | None:
        """Writes it; what went wrong is returned, for ranks that leave would keep the others waiting."""
        try:
            _write(shard_path(folder, self._number), self._tensors)
        except OSError as error:
            return error
        return None


def _batches(rows: range, lengths: np.ndarray, size: int) -> list[np.ndarray]:
    """The rows in order of length, `size` at a time."""
    order = np.arange(rows.start, rows.stop)
    order = order[np.argsort(-lengths[order], kind="stable")]
    return [order[i : i + size] for i in range(0, len(order), size)]


def _all_wrote(folder: Path, world: World, error: OSError | None) -> None:
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
    """Every shard is there: the manifest gets the name by which a cache is whole."""
    with (folder / UNFINISHED).open("rb+") as file:
        os.fsync(file.fileno())
    (folder / UNFINISHED).replace(folder / MANIFEST)
