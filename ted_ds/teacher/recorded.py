"""The recorded teacher: a `Teacher` that reads a cache and runs no model."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from ted_ds.batch import Batch, on_device
from ted_ds.data.loader import Rows
from ted_ds.errors import CheckpointError
from ted_ds.models.loading import DTYPES
from ted_ds.ops import Head
from ted_ds.tasks.base import CachedOutput
from ted_ds.teacher.cache_layout import HEAD, Manifest, Places, shard_path, state_field
from ted_ds.teacher.contract import Teacher, UseOutput

Values = dict[str, torch.Tensor]


class ShardReader:
    """A cache's shards, memory-mapped when they are first read; rows that are not read cost no memory.

    lengths: [rows] real tokens. pinned: whether batches are read into pinned memory, which a copy to the device needs
    in order not to block.
    """

    def __init__(self, folder: Path, manifest: Manifest, lengths: np.ndarray, *, pinned: bool) -> None:
        self._folder, self._fields, self._pinned = folder, manifest.fields, pinned
        self._places = Places(lengths, manifest.firsts)
        self._files: dict[int, Any] = {}  # each shard is mapped once: a process may have 65530 maps
        self._slices: dict[tuple[int, str], Any] = {}

    def read(self, names: Sequence[str], rows: torch.Tensor, width: int) -> Values:
        """The fields of the rows [B], on the CPU: [B, width, W], 0 at padding; of a field per row [B, W]."""
        return {name: self._read(name, rows.tolist(), width) for name in names}

    def _read(self, name: str, rows: list[int], width: int) -> torch.Tensor:
        field = self._fields[name]
        shape = (len(rows), 1 if field.per_row else width, field.width)
        out = torch.empty(shape, dtype=DTYPES[field.dtype], pin_memory=self._pinned)
        for items, row in zip(out, rows, strict=True):
            shard = self._places.shard_of(row)
            place = self._places.within(shard, row, field)
            count = place.stop - place.start
            items[:count].copy_(self._slice(shard, name)[place])
            items[count:].zero_()
        return out[:, 0] if field.per_row else out

    def _slice(self, shard: int, name: str) -> Any:
        if (shard, name) not in self._slices:
            path = shard_path(self._folder, shard)
            try:
                if shard not in self._files:
                    self._files[shard] = safe_open(path, framework="pt")
                self._slices[shard, name] = self._files[shard].get_slice(name)
            except Exception as error:  # a torn file makes safetensors raise errors of several kinds
                raise CheckpointError(f"{path} is torn ({error}): delete its folder to record it anew") from error
        return self._slices[shard, name]


class CachedTeacher:
    """A `Teacher` made of records. `sources` give the states of the pairs' blocks, filtered before they were recorded.

    blocks: the teacher's blocks of the layer map, in order. width: F. output: how the teacher's output was kept; None
    without a KL.
    While one micro-batch is used, a thread reads the next one that `expect` named.
    """

    def __init__(
        self,
        reader: ShardReader,
        device: torch.device,
        *,
        blocks: Sequence[int],
        width: int,
        output: CachedOutput | None,
        head: Head | None,
    ) -> None:
        self._reader, self._device, self._output, self._head = reader, device, output, head
        self.target_width = width
        self.sources: Mapping[int, nn.Module] = {block: nn.Identity() for block in blocks}
        self._state_names = [*map(state_field, blocks)]
        self._names = [*self._state_names, *(output.fields if output else ())]
        self._thread = ThreadPoolExecutor(1, "teacher-cache")
        self._coming: deque[Batch] = deque()
        self._next: tuple[torch.Tensor, Future[Values]] | None = None

    def target(self, pair: int, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden` [B, S, F] itself: it was filtered before it was recorded."""
        return hidden

    def stream(self, batch: Batch, use_output: UseOutput | None = None, *, until: nn.Module | None = None) -> None:
        """Gives the recorded states of the batch's rows block by block, then their output; never waits for the device.

        until: ignored, as nothing is recorded of what comes after the last pair.
        """
        values = self._take(batch, self._state_names if use_output is None else self._names)
        if self._state_names:
            with torch.no_grad():
                for block, source in self.sources.items():
                    source(on_device(values.pop(state_field(block)), self._device))
        if use_output is None:
            return
        assert self._output is not None
        placed = {name: on_device(values[name], self._device) for name in self._output.fields}
        with torch.enable_grad():
            use_output(self._output.restore(placed), self._head)

    def end_states(self) -> None:
        """Outputs alone are read from now on."""
        self._names, self._state_names = self._names[len(self._state_names) :], []

    def expect(self, batches: Sequence[Batch]) -> None:
        """Names the batches that `stream` will be given next, in order."""
        self._coming = deque(batches)
        self._fetch()

    def _take(self, batch: Batch, names: Sequence[str]) -> Values:
        assert batch.rows is not None and not batch.rows.is_cuda
        found, self._next = self._next, None
        if found is not None and found[0] is batch.rows:
            values = found[1].result()
        else:
            values = self._reader.read(names, batch.rows, batch.input_ids.shape[1])
        self._fetch()
        return values

    def _fetch(self) -> None:
        if self._coming and self._names:
            batch = self._coming.popleft()
            assert batch.rows is not None
            future = self._thread.submit(self._reader.read, self._names, batch.rows, batch.input_ids.shape[1])
            self._next = (batch.rows, future)


class AnnouncedRows:
    """Training rows that name a step's micro-batches to the teacher before they are worked on."""

    def __init__(self, rows: Rows, teacher: Teacher) -> None:
        self._rows, self._teacher = rows, teacher

    def micro_batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of the 0-based `step`."""
        batches = self._rows.micro_batches(step)
        self._teacher.expect(batches)
        return batches

    def tokens(self, step: int) -> int:
        """Real tokens of a step over all ranks."""
        return self._rows.tokens(step)


def load_head(folder: Path, manifest: Manifest, device: torch.device) -> Head | None:
    """The LM head that was recorded, whole on this rank; None if the cache has none."""
    if manifest.head is None:
        return None
    tensors = load_file(folder / HEAD, device=str(device))
    scale = manifest.head["scale"]
    assert scale is not None
    return Head(tensors["weight"], tensors.get("bias"), softcap=manifest.head["softcap"], scale=scale)
