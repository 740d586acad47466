"""The files beside the package that runs read, `ds_configs/` and `launchers/`: in a clone and in an installed wheel."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent


def shipped_folder() -> Path:
    """The folder that holds `ds_configs` and `launchers` of this copy of ted_ds.

    A wheel carries them inside the package (setup.py); a clone, an editable install of it too, has them beside it.
    """
    inside = PACKAGE / "shipped"
    return inside if inside.is_dir() else PACKAGE.parent


def find_file(path: Path) -> Path | None:
    """`path` from the working directory or, if it is not there, from `shipped_folder()`; None if neither has it."""
    return next((found for found in (path, shipped_folder() / path) if found.is_file()), None)
