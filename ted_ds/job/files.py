"""Files and folders that are whole or not there, whenever a process dies."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock


def write_atomically(path: Path, text: str) -> None:
    """The whole text or the old file, never half, even if the power fails: flushed to disk, renamed."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """A rename is on the disk once its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to write in, which becomes `folder` when the `with` is left without an error."""
    temporary = empty_folder(folder.with_name(folder.name + ".tmp"))
    yield temporary
    temporary.rename(folder)


@contextmanager
def missing(folder: Path) -> Iterator[bool]:
    """Whether `folder` is not there. Within it no other process finds it missing: one that comes second waits."""
    if folder.exists():
        yield False
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(folder.name + ".lock")):
        yield not folder.exists()


def empty_folder(folder: Path) -> Path:
    """The folder, made anew; what was in it is gone."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def replace_folder(folder: Path, new: Path) -> None:
    """Puts `new` in the place of `folder`; a process that dies on the way leaves one of them, see `recover_folder`."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(folder: Path) -> None:
    """Puts the former folder back if `replace_folder` was interrupted between its two renames."""
    old = folder.with_name(folder.name + ".old")
    if old.exists() and not folder.exists():
        old.rename(folder)
