"""What a teacher cache holds, where each row lies in it, and how large it is: names and numbers alone.

A folder of `shard-00000.safetensors` and so on, each with the records of a range of training rows, `head.safetensors`
if the losses need the teacher's LM head, and `manifest.json`, which is there once the cache is whole. Of a row only
its real tokens are kept, one after another, so that the rows' lengths tell where each row begins.
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
"""About what a tensor takes in the header of a safetensors file: its name, dtype, shape and place."""


Fields = Mapping[str, Field]


def size_of(fields: Fields, *, rows: int, tokens: int) -> int:
    """Bytes of the fields of so many rows and tokens."""
    return sum(field.item_bytes * (rows if field.per_row else tokens) for field in fields.values())


@dataclass(frozen=True)
class Manifest:
    """What was recorded, and of what.

    data, weights, filters: fingerprints of the training rows, of the teacher, and of Stage I's filters ("" if the
    states are unfiltered, or none are kept). teacher: its name in the run that recorded it.
    settings: what the recorded output depends on beyond that (a top k's temperature and vocabulary).
    head: softcap, scale and bytes of the LM head in `head.safetensors`; None without one.
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
        """None if there is none. Raises CheckpointError for a file that is no manifest."""
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
        """What the whole cache takes on disk, except for a few bytes of each shard."""
        headers = len(self.firsts) * HEADER_BYTES * len(self.fields)
        return size_of(self.fields, rows=self.rows, tokens=self.tokens) + headers + self.head_bytes

    @property
    def head_bytes(self) -> int:
        """Of the LM head; 0 without one."""
        return int(self.head["bytes"] or 0) if self.head else 0


def state_field(block: int) -> str:
    """The field of the (filtered) states of a teacher's block."""
    return f"states.{block}"


def shard_path(folder: Path, number: int) -> Path:
    """The file of a shard."""
    return folder / f"shard-{number:05d}.safetensors"


def plan_shards(lengths: np.ndarray, fields: Fields) -> tuple[int, ...]:
    """The first row of each shard: ranges of at most `SHARD_BYTES`, or of one row. lengths: [rows] real tokens."""
    per_token, per_row = size_of(fields, rows=0, tokens=1), size_of(fields, rows=1, tokens=0)
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

    def bytes(self, shard: int, fields: Fields) -> int:
        """What a shard's records take, without the file's header."""
        return size_of(fields, rows=len(self.rows(shard)), tokens=self.tokens(shard))

    def within(self, shard: int, row: int, field: Field) -> slice:
        """A row's items in its shard: its tokens, or itself."""
        first = self._firsts[shard]
        if field.per_row:
            return slice(int(row - first), int(row - first + 1))
        start, end = self._starts[row] - self._starts[first], self._starts[row + 1] - self._starts[first]
        return slice(int(start), int(end))


def find_cache(folder: Path, wanted: Sequence[Manifest], lengths: np.ndarray) -> Manifest | None:
    """The finished cache in `folder`, None if there is none; on one rank.

    wanted: each of them serves the run. lengths: [rows] real tokens.
    Raises CheckpointError if what is there serves the run in no way, or a file is missing or too short.
    """
    found = Manifest.read(folder / MANIFEST)
    if found is None:
        return None
    if not any(fits(found, manifest) for manifest in wanted):
        refuse_difference(folder, found, wanted[0])
    places = Places(lengths, found.firsts)
    sizes = {shard_path(folder, i): places.bytes(i, found.fields) for i in range(places.num_shards)}
    if found.head is not None:
        sizes[folder / HEAD] = found.head_bytes
    for path, size in sizes.items():
        there = path.stat().st_size if path.exists() else 0
        if there < size:
            raise CheckpointError(f"{path} has {there} of {size} bytes: delete that folder to record it anew")
    return found


def refuse_difference(folder: Path, found: Manifest, wanted: Manifest) -> None:
    """Raises CheckpointError if a cache is of another teacher, filter or data, or lacks what a run needs."""
    if (difference := _difference(found, wanted)) is not None:
        raise CheckpointError(f"{folder} is a cache {difference}")


def fits(found: Manifest, wanted: Manifest) -> bool:
    """Whether a cache holds all that `wanted` names, of the same teacher, filters and data."""
    return _difference(found, wanted) is None


def _difference(found: Manifest, wanted: Manifest) -> str | None:
    """What makes `found` unfit for a run, and the remedy; None if it serves the run."""
    remedy = "give another teacher.cache, or delete that folder to record it anew"
    take = "give another teacher.cache, or delete teacher_filters in output_dir to take the cache's"
    both = found, wanted
    data = [f"{m.rows} rows, {m.data[:12]}" for m in both]
    teachers = [f"{m.teacher}, weights {m.weights[:12]}" for m in both]
    compared: list[tuple[str, bool, Sequence[Any], str]] = [
        ("other training data", data[0] == data[1], data, remedy),
        # a teacher is its weights, whatever path it was loaded from
        ("another teacher", found.weights == wanted.weights, teachers, remedy),
        ("another teacher.dtype", found.dtype == wanted.dtype, (found.dtype, wanted.dtype), remedy),
    ]
    if all(any(name.startswith("states.") for name in m.fields) for m in both):
        filters = [m.filters[:12] or "none, as lwd" for m in both]
        # lwd has no filters of its own, and cannot take any
        todo = take if found.filters and wanted.filters else remedy
        compared.append(("other filters", filters[0] == filters[1], filters, todo))
    compared += [
        (f"another {name}", found.settings[name] == value, (found.settings[name], value), remedy)
        for name, value in wanted.settings.items()
        if name in found.settings
    ]
    for what, same, (before, now), todo in compared:
        if not same:
            return f"of {what} ({before}, this run's {now}): {todo}"
    lacking = [name for name, field in wanted.fields.items() if found.fields.get(name) != field]
    if not lacking:
        return None
    return f"without {', '.join(lacking)} (it holds {', '.join(found.fields)}), which this run's loss needs: {remedy}"
