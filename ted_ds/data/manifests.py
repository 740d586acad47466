"""What folders of prepared data say they were made of, and how that is compared with a recipe."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from ted_ds.config.data_section import HubDataset
from ted_ds.data.text_files import matching_files
from ted_ds.errors import DataError

Entries = Sequence[str | HubDataset]

Made = TypeVar("Made")

MANIFEST = "manifest.json"
"""The file of a folder of prepared data that says so."""

CALLED = {
    "tokenizer_fingerprint": "tokenizer",
    "prefix": "ids before each document",
    "labels": "data.labels",
    "sequence_length": "data.sequence_length",
    "max_length": "data.sequence_length",
    "stride": "data.doc_stride",
    "text_column": "data.text_column",
    "entries": "data entries",
    "sources": "sizes of data files",
    "training": "use (training: true or false)",
}
"""What messages call a manifest's fields, if otherwise."""


def write_manifest(folder: Path, manifest: Any) -> None:
    """Writes what a folder's data, a dataclass, were made of."""
    (folder / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")


def open_prepared(folder: Path, name: str, kind: Callable[..., Made]) -> tuple[Made, list[pa.RecordBatch]]:
    """(the manifest, of the dataclass `kind`; the record batches of the Arrow file `name`, memory-mapped).

    Raises DataError if the folder is not whole.
    """
    try:
        written = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in written.items()}
        manifest = kind(**{**values, "entries": reread_names(values["entries"])})
        file = pa.ipc.open_file(pa.memory_map(str(folder / name)))
        batches = [file.get_batch(i) for i in range(file.num_record_batches)]
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise DataError(f"{folder} holds no whole prepared data ({error}): delete it to prepare it anew") from error
    if sum(batch.num_rows for batch in batches) != values["rows"]:
        raise DataError(f"{folder}: {name} and {MANIFEST} differ in rows: delete the folder to prepare it anew")
    return manifest, batches


def check_prepared(
    folder: Path, manifest: Any, asked: Mapping[str, Any], entries: Entries, *, skip_bad_rows: bool | None
) -> None:
    """Raises DataError if a field of `asked`, or the size of a data file, is not what the manifest of `folder` says.

    Likewise if bad rows, which the folder lacks, are not to be left out; skip_bad_rows: see `BadRows`.
    """
    if manifest.left_out and not skip_bad_rows:
        raise DataError(
            f"{folder} was prepared without {manifest.left_out} bad rows, which data.skip_bad_rows: false refuses: set "
            "it to true, or delete that folder to prepare it anew"
        )
    sizes = file_sizes(entries) if manifest.entries == asked["entries"] else {}
    for field, now in {**asked, "sources": sizes}.items():
        before, now = (list(value) if isinstance(value, tuple) else value for value in (getattr(manifest, field), now))
        if before != now:
            raise DataError(
                f"{folder} was prepared with other {CALLED.get(field, field)}: {before!s:.200}, now {now!s:.200}: "
                "delete that folder to prepare it anew, or set data.prepared to another"
            )


def entry_names(entries: Entries) -> tuple[str, ...]:
    """What a manifest calls the entries of a recipe."""
    return tuple(entry if isinstance(entry, str) else entry.model_dump_json() for entry in entries)


def reread_names(names: Sequence[str]) -> tuple[str, ...]:
    """A manifest's entries as `entry_names` has them today: a hub data set's key that came later has its default.

    Raises ValueError for a hub data set with a key that is none today.
    """
    return tuple(HubDataset.model_validate_json(n).model_dump_json() if n.startswith('{"hub":') else n for n in names)


def file_sizes(entries: Entries) -> dict[str, int]:
    """Bytes of every local file; what a hub serves is not counted."""
    files = [path for entry in entries if isinstance(entry, str) for path in matching_files(entry)]
    return {str(path): path.stat().st_size for path in files}
