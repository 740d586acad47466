"""DeepSpeed checkpoints in OUTPUT_DIR/checkpoints; `latest` moves last, atomically."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ted_ds.distributed import World
from ted_ds.errors import CheckpointError

CARD = "ted_ds.json"


@dataclass(frozen=True)
class Card:
    """What a checkpoint says of itself: steps done, ranks that wrote it, fingerprint of the trained module.

    files: name -> bytes of everything that belongs to it, filled in when it is saved.
    """

    step: int
    world_size: int
    model: str
    files: Mapping[str, int] = field(default_factory=dict)


def save_checkpoint(engine: Any, folder: Path, card: Card, world: World, *, keep: int) -> None:
    """Writes the engine's whole state; `latest` names it once every rank has written; a collective.

    keep: how many checkpoints stay.
    Raises CheckpointError, on every rank, where any rank could not write (a full disk, say); `latest` then
    still names the last good checkpoint.
    """
    tag = f"step-{card.step:08d}"
    with _write_errors(engine) as errors:
        engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
    if not world.min(torch.tensor(0 if errors else 1)):
        reason = errors[0] if errors else "on another rank"
        raise CheckpointError(
            f"checkpoint {folder / tag} could not be written ({reason}); `latest` still names the one before it: "
            "make room and start again"
        )
    world.on_main(lambda: _seal(folder, tag, card, keep))


def load_checkpoint(engine: Any, folder: Path, *, model: str, world: World) -> int:
    """Restores the engine from `latest`; returns the steps done, 0 where there is no checkpoint; a collective.

    Raises CheckpointError where the checkpoint is torn, of another model, or of another number of ranks.
    """
    tag = world.on_main(lambda: latest_tag(folder))
    if tag is None:
        return 0
    path = folder / tag
    card = world.on_main(lambda: _read_card(path))
    if card.model != model:
        raise CheckpointError(
            f"checkpoint {path} is of another model or other filters (fingerprint {card.model}, this run's {model}); "
            "use another output_dir, or restore the recipe that wrote it"
        )
    if card.world_size != world.size:
        raise CheckpointError(
            f"checkpoint {path} was written by {card.world_size} ranks, this run has {world.size}: start it with "
            f"{card.world_size} ranks"
        )
    try:
        loaded, _ = engine.load_checkpoint(str(folder), tag=path.name)
    except Exception as error:  # whatever a torn archive makes torch or DeepSpeed raise
        raise CheckpointError(
            f"checkpoint {path} cannot be read ({error}); name an older one in {folder / 'latest'}"
        ) from error
    if loaded is None:
        raise CheckpointError(f"checkpoint {path} is torn; name an older one in {folder / 'latest'}")
    return card.step


def latest_tag(folder: Path) -> str | None:
    """The name of the last good checkpoint in `folder`; None where there is none."""
    path = folder / "latest"
    return path.read_text(encoding="utf-8").strip() if path.exists() else None


def _seal(folder: Path, tag: str, card: Card, keep: int) -> None:
    """Makes a written checkpoint the latest, and deletes what it replaces: `keep - 1` older ones stay.

    Folders of later steps were left by a run that went on from an earlier checkpoint, or are torn.
    """
    card = replace(card, files=_sizes(folder / tag))
    write_atomically(folder / tag / CARD, json.dumps(asdict(card), indent=2))
    write_atomically(folder / "latest", tag)
    others = sorted(path for path in folder.glob("step-*") if path.name != tag)
    older = [path for path in others if path.name < tag]
    for path in others:
        if path not in older[len(older) - (keep - 1) :]:
            shutil.rmtree(path)


def _read_card(path: Path) -> Card:
    """The checkpoint's card, its files there and of the size they were; else CheckpointError."""
    remedy = f"name an older one in {path.parent / 'latest'}, or delete that file to start over"
    try:
        card = Card(**json.loads((path / CARD).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"checkpoint {path} is torn ({error}): {remedy}") from error
    there = _sizes(path)
    for name, size in card.files.items():
        if there.get(name) != size:
            raise CheckpointError(
                f"checkpoint {path} is torn: {name} has {there.get(name, 0)} of {size} bytes: {remedy}"
            )
    return card


def _sizes(folder: Path) -> dict[str, int]:
    return {
        str(file.relative_to(folder)): file.stat().st_size
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != CARD
    }


@contextmanager
def _write_errors(engine: Any) -> Iterator[list[Exception]]:
    """Collects what goes wrong as DeepSpeed writes, in place of raising it.

    DeepSpeed's ranks meet while saving: one that leaves by an exception would keep the others waiting.
    """
    errors: list[Exception] = []
    writer = engine.checkpoint_engine
    write = writer.save

    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            write(*args, **kwargs)
        except (OSError, RuntimeError) as error:
            errors.append(error)

    writer.save = guarded
    try:
        yield errors
    except OSError as error:  # of what DeepSpeed writes by itself, on rank 0
        errors.append(error)
    finally:
        del writer.save


def write_atomically(path: Path, text: str) -> None:
    """The whole text or the old file, never half: a temporary file, flushed to disk, renamed."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
