"""Data sets of the hub, and folders that `datasets` saved."""

from __future__ import annotations

from pathlib import Path
from traceback import walk_tb
from typing import Any

from ted_ds.config.data_section import HubDataset
from ted_ds.data.text_files import refuse_incomplete
from ted_ds.errors import DataError


def hub_rows(entry: HubDataset) -> tuple[str, Any]:
    """(what messages call it, the data set as `datasets` loads it).

    A local folder that `save_to_disk` wrote is memory-mapped. The files of other local folders are looked at first.
    Raises DataError with the cause, and the file and column if `datasets` knows them.
    """
    from datasets import load_dataset  # here and below: a second of importing, which most runs do without
    from datasets.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    where = f"data set {entry.hub} ({entry.name or 'default'}, {entry.split})"
    try:
        if _is_saved(Path(entry.hub)):
            return where, _saved(entry, where)
        if Path(entry.hub).is_dir():
            _look_at_files(entry)
        return where, load_dataset(entry.hub, entry.name, split=entry.split, streaming=entry.streaming)
    except DataError:
        raise
    except Exception as error:  # network, hub, builder and file errors have no common base
        raise DataError(f"{where} cannot be loaded: {cause(error)}") from error


def _look_at_files(entry: HubDataset) -> None:
    """Raises DataError for a file that `datasets` would read as if it were whole."""
    from datasets import load_dataset_builder

    splits = load_dataset_builder(entry.hub, entry.name).config.data_files or {}
    for path in dict.fromkeys(path for files in splits.values() for path in files):
        refuse_incomplete(Path(path))


def cause(error: BaseException) -> str:
    """One line of what went wrong; of a failure while `datasets` reads files, also in which file and column."""
    from datasets.exceptions import DatasetGenerationError
    from datasets.table import CastError

    while isinstance(error, DatasetGenerationError) and (inner := error.__cause__ or error.__context__):
        error = inner  # its own message says no more than that there was an error
    text = f"its columns differ, {error.details()}" if isinstance(error, CastError) else " ".join(str(error).split())
    places = [f"{name} {value}" for name, value in _places(error).items()]
    return ", ".join(places) + (": " if places else "") + (text[:400] or type(error).__name__)


def _places(error: BaseException) -> dict[str, str]:
    """The file and the column that `datasets` was at: its errors do not say, the frames they went through do."""
    found: dict[str, str] = {}
    for frame, _ in walk_tb(error.__traceback__):
        name, values = frame.f_code.co_name, frame.f_locals
        if name == "_generate_tables" and "file" in values:
            found["file"] = str(values["file"])
        elif name == "cast_table_to_schema" and "table" in values and "features" in values:
            found |= _no_cast(values["table"], values["features"])
    return found


def _no_cast(table: Any, features: Any) -> dict[str, str]:
    from datasets.table import cast_array_to_feature

    for column in table.column_names:
        try:
            cast_array_to_feature(table[column], features[column])
        except Exception:  # Arrow's errors and plain TypeErrors
            return {"column": repr(column)}
    return {}


def _is_saved(folder: Path) -> bool:
    from datasets import config

    return any(
        (folder / name).is_file() for name in (config.DATASET_STATE_JSON_FILENAME, config.DATASETDICT_JSON_FILENAME)
    )


def _saved(entry: HubDataset, where: str) -> Any:
    from datasets import Dataset, load_from_disk

    found = load_from_disk(entry.hub)
    if entry.name is not None:
        raise DataError(f"{where} is a saved folder, which has no configurations: leave out name")
    splits = found if not isinstance(found, Dataset) else {str(found.split or entry.split): found}
    if entry.split not in splits:
        raise DataError(f"{where} is a saved folder of {', '.join(splits)}: set split to one of them")
    return splits[entry.split]
