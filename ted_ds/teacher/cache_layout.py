"""What a teacher cache holds, where each row of it lies, and how large it is: names and numbers alone.

A folder of `shard-00000.safetensors` and so on, each the records of a range of training rows, `head.safetensors`
where the losses need the teacher's LM head, and `manifest.json`, which is there when all of it is. Of a row only its
real tokens are kept, one after another; where a row begins follows from the rows' lengths.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ted_ds.errors import CheckpointError
from ted_ds.job.files import write_atomically
from ted_ds.tasks.base import Field

MANIFEST, UNFINISHED, HEAD = "manifest.json", "manifest.unfinished.json", "head.safetensors"

SHARD_BYTES = 256 << 20
"""Largest size of a shard that has more than one row; a rank holds one while it records it."""

HEADER_BYTES = 96
"""Of a safetensors file's header, a tensor: its name, dtype, shape and place."""


@dataclass(frozen=True)
class Manifest:
    """What was recorded, and of what.

    data, weights, filters: fingerprints of the training rows, of the teacher, and of Stage I's filters ("" where
    the states are unfiltered, or none are kept). teacher: its name as the run that recorded had it.
    settings: what the recorded output was computed with beyond that (a top k's temperature and vocabulary).
    head: an LM head's softcap, scale and bytes, where `head.safetensors` holds one.
    firsts: the first row of each shard.
    """

    data: str
    rows: int
    tokens: int
    teacher: str
    weights: str
    dtype: str
    filters: str
    fields: dict[str, Field]
    settings: dict[str, float]
    head: dict[str, float | None] | None
    firsts: tuple[int, ...]

    def write(self, path: Path) -> None:
        """As JSON, whole or not at all."""
        write_atomically(path, json.dumps(asdict(self), indent=2) + "\n")

    @staticmethod
    def read(path: Path) -> Manifest | None:
        """None where there is none; CheckpointError where it is no manifest."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            fields = {name: Field(**field) for name, field in values["fields"].items()}
            return Manifest(**{**values, "fields": fields, "firsts": tuple(values["firsts"])})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} is no manifest of a teacher cache ({error}): give another teacher.cache, or delete its folder"
            ) from error

    def bytes(self) -> int:
        """What the whole cache takes on disk, to a few bytes a shard."""
        per_token = sum(field.item_bytes for field in self.fields.values() if not field.per_row)
        per_row = sum(field.item_bytes for field in self.fields.values() if field.per_row)
        headers = len(self.firsts) * HEADER_BYTES * len(self.fields)
        head = int(self.head["bytes"] or 0) if self.head else 0
        return per_token * self.tokens + per_row * self.rows + headers + head


def state_field(block: int) -> str:
    """The field of the (filtered) states of a teacher's block."""
    return f"states.{block}"


def shard_path(folder: Path, number: int) -> Path:
    """The file of a shard."""
    return folder / f"shard-{number:05d}.safetensors"


def plan_shards(lengths: np.ndarray, fields: Mapping[str, Field]) -> tuple[int, ...]:
    """The first row of each shard: ranges of at most `SHARD_BYTES`, or of one row. lengths: [rows] real tokens."""
    per_token = sum(field.item_bytes for field in fields.values() if not field.per_row)
    per_row = sum(field.item_bytes for field in fields.values() if field.per_row)
    ends = np.cumsum(lengths.astype(np.int64) * per_token + per_row)
    firsts = [0]
    while True:
        before = int(ends[firsts[-1] - 1]) if firsts[-1] else 0
        following = max(firsts[-1] + 1, int(np.searchsorted(ends, before + SHARD_BYTES, side="right")))
        if following >= len(lengths):
            return tuple(firsts)
        firsts.append(following)


class Places:
    """Where the rows lie. lengths: [rows] real tokens; firsts: the first row of each shard."""

    def __init__(self, lengths: np.ndarray, firsts: Sequence[int]) -> None:
        self._firsts = np.array([*firsts, len(lengths)])
        self._starts = np.concatenate([[0], np.cumsum(lengths.astype(np.int64))])

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return len(self._firsts) - 1

    def rows(self, shard: int) -> range:
        """The rows of a shard."""
        return range(int(self._firsts[shard]), int(self._firsts[shard + 1]))

    def tokens(self, shard: int) -> int:
        """Real tokens of a shard."""
        rows = self.rows(shard)
        return int(self._starts[rows.stop] - self._starts[rows.start])

    def shard_of(self, row: int) -> int:
        """The shard that holds a row."""
        return int(np.searchsorted(self._firsts, row, side="right")) - 1

    def bytes(self, shard: int, fields: Mapping[str, Field]) -> int:
        """What a shard's records take, without the file's header."""
        counts = {True: len(self.rows(shard)), False: self.tokens(shard)}
        return sum(field.item_bytes * counts[field.per_row] for field in fields.values())

    def within(self, shard: int, row: int, field: Field) -> slice:
        """A row's items in its shard: its tokens, or itself."""
        first = self._firsts[shard]
        if field.per_row:
            return slice(int(row - first), int(row - first + 1))
        start, end = self._starts[row] - self._starts[first], self._starts[row + 1] - self._starts[first]
        return slice(int(start), int(end))


def check_whole(folder: Path, manifest: Manifest, lengths: np.ndarray) -> None:
    """Raises CheckpointError where a file of a finished cache is not there, or shorter than what it should hold."""
    places = Places(lengths, manifest.firsts)
    sizes = {shard_path(folder, i): places.bytes(i, manifest.fields) for i in range(places.num_shards)}
    if manifest.head is not None:
        sizes[folder / HEAD] = int(manifest.head["bytes"] or 0)
    for path, size in sizes.items():
        there = path.stat().st_size if path.exists() else 0
        if there < size:
            raise CheckpointError(f"{path} has {there} of {size} bytes: delete that folder to record it anew")


def refuse_difference(folder: Path, found: Manifest, wanted: Manifest) -> None:
    """Raises CheckpointError where a cache is of another teacher, filter or data, or lacks what a run needs."""
    remedy = "give another teacher.cache, or delete that folder to record it anew"
    compared: list[tuple[str, Any, Any, str]] = [
        ("other training data", _named(found.data, found.rows), _named(wanted.data, wanted.rows), remedy),
        ("another teacher", (found.teacher, found.weights), (wanted.teacher, wanted.weights), remedy),
        ("another teacher.dtype", found.dtype, wanted.dtype, remedy),
    ]
    if _states(found) and _states(wanted):
        # lwd has none, and cannot take any
        take = "give another teacher.cache, or delete teacher_filters in output_dir to take the cache's"
        todo = take if found.filters and wanted.filters else remedy
        compared.append(("other filters", _filters(found), _filters(wanted), todo))
    compared += [
        (f"another {name}", found.settings[name], value, remedy)
        for name, value in wanted.settings.items()
        if name in found.settings
    ]
    for what, before, now, todo in compared:
        # a teacher is its weights, whatever path it was loaded from
        if (before[1:] != now[1:]) if isinstance(before, tuple) else (before != now):
            raise CheckpointError(f"{folder} is a cache of {what} ({_said(before)}, this run's {_said(now)}): {todo}")
    lacking = [name for name, field in wanted.fields.items() if found.fields.get(name) != field]
    if lacking:
        raise CheckpointError(
            f"{folder} is a cache without {', '.join(lacking)} (it holds {', '.join(found.fields)}), which this run's "
            f"loss needs: {remedy}"
        )


def fits(found: Manifest, wanted: Manifest) -> bool:
    """Whether a cache holds all that `wanted` names, of the same teacher, filters and data."""
    try:
        refuse_difference(Path(), found, wanted)
    except CheckpointError:
        return False
    return True


def _states(manifest: Manifest) -> bool:
    return any(name.startswith("states.") for name in manifest.fields)


def _named(fingerprint: str, rows: int) -> str:
    return f"{rows} rows, {fingerprint[:12]}"


def _filters(manifest: Manifest) -> str:
    return manifest.filters[:12] or "none, as lwd"


def _said(value: Any) -> str:
    return f"{value[0]}, weights {value[1][:12]}" if isinstance(value, tuple) else str(value)
