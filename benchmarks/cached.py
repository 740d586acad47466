"""A TED step whose teacher is read from a cache, for `benchmarks.step`."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ted_ds.batch import Batch
from ted_ds.models.layer_map import LayerMap
from ted_ds.models.loading import resident_readout
from ted_ds.models.structure import find_structure
from ted_ds.tasks.base import CachedOutput, Field
from ted_ds.tasks.causal_lm import LastHiddenStates, TopLogits
from ted_ds.teacher.cache_layout import UNFINISHED, Manifest, plan_shards, state_field
from ted_ds.teacher.frozen import FrozenModel
from ted_ds.teacher.recorded import CachedTeacher, ShardReader, load_head
from ted_ds.teacher.recording import record_batch, record_shards, write_head


@dataclass(frozen=True)
class Alone:
    """The one rank of a process without a process group, as recording needs it."""

    device: torch.device
    rank = 0
    size = 1
    is_main = True

    def on_main(self, work: Callable[[], Any]) -> Any:
        return work()

    def min(self, values: torch.Tensor) -> torch.Tensor:
        return values


@dataclass(frozen=True)
class OneBatch:
    """The rows of one micro-batch as training data."""

    ids: Batch

    @property
    def lengths(self) -> np.ndarray:
        rows, length = self.ids.input_ids.shape
        return np.full(rows, length)

    def batch(self, rows: np.ndarray) -> Batch:
        return Batch(self.ids.input_ids[rows], self.ids.targets[rows])


@dataclass(frozen=True)
class Recorded:
    """A teacher out of a cache on disk, which is there for as long as the teacher is."""

    teacher: CachedTeacher
    batch: Batch
    layer_map: LayerMap


def record(frozen: FrozenModel, batch: Batch, layer_map: LayerMap, dtype: str, top_k: int | None) -> Recorded:
    """Records what a TED step needs of a teacher: exactly, or its top k in place of its last hidden states."""
    folder, device = Path(tempfile.mkdtemp()), batch.input_ids.device
    structure = find_structure(frozen.module.model)
    output: CachedOutput = LastHiddenStates(structure, dtype)
    if top_k is not None:
        output = TopLogits(top_k, 2.0, structure.vocab_rows)
    rows: Any = OneBatch(batch)
    blocks = tuple(t for _, t in layer_map)
    fields = {state_field(block): Field(dtype, frozen.target_width) for block in blocks} | output.fields
    manifest = Manifest(
        data="",
        rows=len(rows.lengths),
        tokens=int(rows.lengths.sum()),
        teacher="",
        weights="",
        dtype=dtype,
        filters="",
        fields=fields,
        settings=output.settings,
        head=output.head,
        firsts=plan_shards(rows.lengths, fields),
    )
    manifest.write(folder / UNFINISHED)
    if output.head is not None:
        write_head(folder, resident_readout(frozen.module.model, device)[1])
    world: Any = Alone(device)
    record_shards(
        folder, manifest, rows, partial(record_batch, frozen, blocks, output), world, batch_size=len(rows.lengths)
    )
    reader = ShardReader(folder, manifest, rows.lengths, pinned=device.type == "cuda")
    head = load_head(folder, manifest, device)
    teacher = CachedTeacher(reader, device, blocks=blocks, width=frozen.target_width, output=output, head=head)
    weakref.finalize(teacher, shutil.rmtree, folder, ignore_errors=True)
    numbered = replace(batch, rows=torch.arange(len(rows.lengths)))
    return Recorded(teacher, numbered, layer_map)
