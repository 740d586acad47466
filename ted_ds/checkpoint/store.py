"""DeepSpeed checkpoints in OUTPUT_DIR/checkpoints; `latest` moves last, atomically."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ted_ds.distributed import World
from ted_ds.errors import CheckpointError

CARD = "ted_ds.json"


@dataclass(frozen=True)
class Card:
    """What a checkpoint says of itself: steps done, ranks that wrote it, fingerprint of the trained module."""

    step: int
    world_size: int
    model: str


def save_checkpoint(engine: Any, folder: Path, card: Card, world: World, *, keep: int) -> None:
    """Writes the engine's whole state; `latest` names it once every rank has written; a collective.

    A write that fails, on a full disk say, raises and leaves `latest` at the last good checkpoint.
    keep: how many checkpoints stay.
    """
    tag = f"step-{card.step:08d}"
    try:
        engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"checkpoint {folder / tag} could not be written ({error}); `latest` still names the one before it: "
            "make room and start again"
        ) from error
    world.barrier()
    if world.is_main:
        write_atomically(folder / tag / CARD, json.dumps(asdict(card)))
        write_atomically(folder / "latest", tag)
        for old in sorted(folder.glob("step-*"))[:-keep]:
            shutil.rmtree(old)
    world.barrier()


def load_checkpoint(engine: Any, folder: Path, *, model: str, world: World) -> int:
    """Restores the engine from `latest`; returns the steps done, 0 where there is no checkpoint; a collective.

    Raises CheckpointError where the checkpoint is torn, of another model, or of another number of ranks.
    """
    if not (folder / "latest").exists():
        return 0
    path = folder / (folder / "latest").read_text(encoding="utf-8").strip()
    try:
        card = Card(**json.loads((path / CARD).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"checkpoint {path} is torn ({error}); name an older one in {folder / 'latest'}"
        ) from error
    if card.model != model:
        raise CheckpointError(
            f"checkpoint {path} is of another model or other filters (fingerprint {card.model}, this run's {model}); "
            "use another output_dir, or restore the recipe that wrote it"
        )
    if card.world_size != world.size:
        raise CheckpointError(
            f"checkpoint {path} was written by {card.world_size} ranks, this run has {world.size}: start it with "
            f"{card.world_size} ranks, or convert it with `python -m deepspeed.checkpoint.ds_to_universal`"
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


def write_atomically(path: Path, text: str) -> None:
    """The whole text or the old file, never half: a temporary file, flushed to disk, renamed."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
