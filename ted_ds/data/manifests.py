"""What folders of prepared data say they were made of, and how that is compared with a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ted_ds.config.data_section import HubDataset
from ted_ds.data.text_files import matching_files
from ted_ds.errors import DataError

Entries = Sequence[str | HubDataset]

MANIFEST = "manifest.json"
"""The file of a folder of prepared data that says so."""


def refuse_differences(folder: Path, wanted: Sequence[tuple[str, object, object]]) -> None:
    """Raises DataError for the first (what, as the folder was made, as it is asked for now) that differs."""
    for what, before, now in wanted:
        if before != now:
            raise DataError(
                f"{folder} was prepared with other {what}: {before!s:.200}, now {now!s:.200}: delete that folder to "
                "prepare it anew, or set data.prepared to another"
            )


def refuse_left_out(folder: Path, left_out: int, skip_bad_rows: bool | None) -> None:
    """Raises DataError if the folder lacks bad rows of its data that are not to be left out."""
    if left_out and not skip_bad_rows:
        raise DataError(
            f"{folder} was prepared without {left_out} bad rows, which data.skip_bad_rows: false refuses: set it to "
            "true, or delete that folder to prepare it anew"
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
