"""Checkpoints in OUTPUT_DIR/checkpoints: a folder each, whole or not there; `latest` moves last, atomically."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock

from ted_ds.config.continuation import first_change
from ted_ds.errors import CheckpointError
from ted_ds.job.files import sync_folder, write_atomically
from ted_ds.job.world import World, logger
from ted_ds.pipeline.universal import convert_to_universal, loads_universal

CARD, LATEST = "ted_ds.json", "latest"

TAG = re.compile(r"step-\d{8}")


@dataclass(frozen=True)
class Identity:
    """What a checkpoint must be of, to be loaded.

    model, data: fingerprints of what is trained, and of the rows. recipe: its deciding keys. Earlier versions wrote a
    hash of them, which is not compared: the run's config.yaml, which is, has the same keys.
    """

    model: str
    recipe: Mapping[str, Any] | str
    data: str


@dataclass(frozen=True)
class Card:
    """What a checkpoint says of itself.

    step, rows: optimizer steps done, and training rows consumed by them on all ranks. What is drawn
    at random is a function of the step and the seed, so that no generator's state is needed.
    metrics_bytes: of metrics.jsonl when it was saved. best: the best weights' step and scores so far (of a task).
    score: of the held-out data, higher is better; None if it was not evaluated at this step.
    balance: `Balance.state`; None if the layer loss has a constant weight.
    world_size, zero_stage: of the engine that wrote it. files: name -> [bytes, SHA-256] of all that belongs to it.
    These are filled in as it is saved.
    """

    step: int
    rows: int
    identity: Identity
    metrics_bytes: int = 0
    best: Mapping[str, Any] | None = None
    score: float | None = None
    balance: Sequence[float] | None = None
    world_size: int = 0
    zero_stage: int = 0
    files: Mapping[str, tuple[int, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the last ones, every so many steps' (0: none of those), and the one of the best score."""

    last: int
    every: int = 0


def save_checkpoint(engine: Any, folder: Path, card: Card, world: World, keep: Retention) -> None:
    """Writes the engine's whole state, to disk and under its name only once every rank has; a collective.

    card: rank 0's counts.
    Raises CheckpointError, on every rank, if any rank could not write (a full disk, say); `latest` then
    still names the last good checkpoint.
    """
    tag = f"step-{card.step:08d}"
    temporary = folder / f"{tag}.tmp"
    began = time.perf_counter()
    world.on_main(lambda: _empty(temporary))
    with _writing(engine) as (written, errors):
        engine.save_checkpoint(str(folder), tag=temporary.name, save_latest=False)
    try:
        mine = {str(path.relative_to(temporary)): _to_disk(path) for path in written}
    except OSError as error:
        errors.append(error)
    said = world.gather_objects(_cause(errors[0], folder) if errors else None)
    if any(said):
        rank = next(r for r, error in enumerate(said) if error)
        world.on_main(partial(shutil.rmtree, temporary, ignore_errors=True))  # the room may be what is missing
        raise CheckpointError(
            f"checkpoint {folder / tag} could not be written (rank {rank}: {said[rank]}); `latest` still names the one "
            "before it: make room, or see to the permissions, and start again"
        )
    files = {name: entry for part in world.gather_objects(mine) for name, entry in part.items()}
    sealed = replace(card, world_size=world.size, zero_stage=engine.zero_optimization_stage())
    world.on_main(lambda: _seal(folder, tag, sealed, files, keep))
    size = sum(bytes_ for bytes_, _ in files.values())
    logger.info("saved %s: %.3g GiB in %.1f s", folder / tag, size / 2**30, time.perf_counter() - began)


def load_checkpoint(engine: Any, folder: Path, identity: Identity, world: World) -> Card | None:
    """Restores the engine from the last whole checkpoint; None if there is none at all; a collective.

    One that another number of ranks wrote is converted first, once, by DeepSpeed's universal checkpoints.
    Raises CheckpointError if there are some and none of them is whole, or the last one is of another run.
    """
    damages: list[str] = []
    for tag in world.on_main(lambda: _newest_first(folder)):
        card = _whole(folder / tag, world, damages)
        if card is None:
            continue
        _refuse_foreign(folder / tag, card, identity)
        if damages:
            logger.warning("%s: going on from %s", "; ".join(damages), folder / tag)
        _load(engine, folder, tag, card, world)
        return card
    if damages:
        raise CheckpointError(
            f"no checkpoint in {folder} is whole ({'; '.join(damages)}): put a whole one there, or delete that folder "
            "to start over"
        )
    return None


def latest_tag(folder: Path) -> str | None:
    """The checkpoint that `latest` names, else the newest there is; None if there is none."""
    return next(iter(_newest_first(folder)), None)


def _cause(error: Exception, folder: Path) -> str:
    """What went wrong, and the room: torch's writer answers a full disk with "unexpected pos" or "iostream error"."""
    return f"{error}, with {shutil.disk_usage(folder).free / 2**20:.3g} MiB free"


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _seal(folder: Path, tag: str, card: Card, files: dict[str, tuple[int, str]], keep: Retention) -> None:
    """Gives a written checkpoint its name, makes it the latest, and deletes what need not stay."""
    _name(folder, f"{tag}.tmp", tag, card, files)
    write_atomically(folder / LATEST, tag)
    for name in _superfluous(folder, tag, keep):
        # what an export that goes on beside the run is writing, or a node still reads, goes next time
        shutil.rmtree(folder / name, ignore_errors=True)


def _name(folder: Path, temporary: str, name: str, card: Card, files: dict[str, tuple[int, str]]) -> None:
    """Renames a folder of written files into place, its card in it; rank 0 sees them all, at their sizes.

    files: those that ranks wrote themselves; what DeepSpeed's rank 0 put beside them is added.
    """
    place = folder / temporary
    for file in sorted(place.rglob("*")):
        relative = str(file.relative_to(place))
        if file.is_file() and relative not in files:
            files[relative] = _to_disk(file)
    for relative, (size, _) in files.items():
        if (place / relative).stat().st_size != size:
            raise OSError(f"{place / relative} has not the {size} bytes that were written")
    write_atomically(place / CARD, _card_text(replace(card, files=files)))
    for inner in (*(path for path in place.rglob("*") if path.is_dir()), place):
        sync_folder(inner)
    if (folder / name).exists():  # damaged, or of a run that went on from an earlier one
        shutil.rmtree(folder / name)
    (folder / temporary).rename(folder / name)
    sync_folder(folder)


def _superfluous(folder: Path, tag: str, keep: Retention) -> list[str]:
    """The folders beside a new checkpoint that need not stay.

    Those of later steps were left by a run that went on from an earlier one; conversions for another number of
    ranks, and what a killed run left half-written, have served.
    """
    names = sorted(path.name for path in folder.iterdir() if path.name.startswith("step-") and path.name != tag)
    older = [name for name in names if TAG.fullmatch(name) and name < tag]
    scores = {name: card.score for name in (*older, tag) if (card := _read_card(folder / name)) is not None}
    scored = {name: score for name, score in scores.items() if score is not None and math.isfinite(score)}
    stay = {
        *older[max(0, len(older) - (keep.last - 1)) :],
        *(n for n in older if keep.every and int(n[5:]) % keep.every == 0),
    }
    stay |= {max(scored, key=lambda name: scored[name])} if scored else set()
    return [name for name in names if name not in stay]


def _newest_first(folder: Path) -> list[str]:
    """The one that `latest` names, then those before it; all of them if it names none that exists."""
    if not folder.exists():
        return []
    tags = sorted((path.name for path in folder.iterdir() if TAG.fullmatch(path.name)), reverse=True)
    path = folder / LATEST
    latest = path.read_bytes().decode(errors="replace").strip() if path.exists() else ""
    if latest in tags and latest != tags[0]:
        logger.warning("%s names %s: %s, which is later, is not looked at", path, latest, tags[0])
    return [tag for tag in tags if tag <= latest] if latest in tags else tags


def _whole(path: Path, world: World, damages: list[str]) -> Card | None:
    """The card of a checkpoint whose files are those that were written; else None, and the damage noted; a collective.

    Every rank reads its share of the files.
    """
    card = world.on_main(lambda: _read_card(path))
    if card is None:
        damages.append(f"{path} has no whole {CARD}")
        return None
    mine = sorted(card.files.items())[world.rank :: world.size]
    found = world.gather_objects(next((name for name, entry in mine if not _is(path / name, entry)), None))
    bad = next((name for name in found if name is not None), None)
    if bad is not None:
        damages.append(f"{path} is damaged: {bad} is not what was written")
        return None
    return card


def _is(path: Path, entry: tuple[int, str]) -> bool:
    try:
        return path.stat().st_size == entry[0] and _digest(path) == entry[1]
    except OSError:
        return False


def _refuse_foreign(path: Path, card: Card, identity: Identity) -> None:
    for what, remedy in (
        ("model", "other filters or another model; use another output_dir, or restore the recipe that wrote it"),
        ("data", "other training rows; restore the data, or use another output_dir"),
    ):
        theirs, ours = getattr(card.identity, what), getattr(identity, what)
        if theirs != ours:
            raise CheckpointError(f"checkpoint {path} is of {remedy} (fingerprints {theirs} and {ours})")
    before, now = card.identity.recipe, identity.recipe
    if isinstance(before, str):
        return
    assert not isinstance(now, str)
    if (change := first_change(before, now, str(path / CARD))) is not None:
        raise CheckpointError(
            f"checkpoint {path} is of another recipe ({change}); use another output_dir, or restore the recipe that "
            "wrote it"
        )


def _load(engine: Any, folder: Path, tag: str, card: Card, world: World) -> None:
    if (stage := engine.zero_optimization_stage()) != card.zero_stage:
        raise CheckpointError(
            f"checkpoint {folder / tag} was written under ZeRO stage {card.zero_stage}, the file that `deepspeed` "
            f"names has stage {stage}: give one of stage {card.zero_stage}"
        )
    if card.world_size == world.size or stage == 0:
        _load_states(engine, folder, tag)
        return
    converted = f"{tag}.universal"
    if _whole(folder / converted, world, []) is None:
        logger.info("%s was written by %d ranks: converting it for %d", folder / tag, card.world_size, world.size)
        world.on_main(lambda: _convert(folder, tag, converted, card))
    with loads_universal(engine):
        _load_states(engine, folder, converted)


def _load_states(engine: Any, folder: Path, tag: str) -> None:
    loaded, _ = engine.load_checkpoint(str(folder), tag=tag)
    if loaded is None:
        raise CheckpointError(f"DeepSpeed finds no states in {folder / tag}: was it written with other ds_configs?")


def _convert(folder: Path, tag: str, name: str, card: Card) -> None:
    """Makes `name` of `tag`, unless another job (an export beside the run, say) has done it meanwhile; on one rank."""
    with FileLock(folder / "converting.lock"):
        if _read_card(folder / name) is None:
            temporary = folder / f"{name}.{os.getpid()}.tmp"
            convert_to_universal(folder / tag, temporary, card.world_size)
            _name(folder, temporary.name, name, card, {})


def _card_text(card: Card) -> str:
    """The card as JSON; its own digest is in it, for a flipped bit in a number would go unnoticed."""
    values = asdict(card)
    return json.dumps({**values, "digest": _values_digest(values)}, indent=2) + "\n"


def _read_card(path: Path) -> Card | None:
    """None if the card is not there, or not as it was written."""
    try:
        values = json.loads((path / CARD).read_text(encoding="utf-8"))
        if values.pop("digest") != _values_digest(values):
            return None
        files = {name: (size, digest) for name, (size, digest) in values.pop("files").items()}
        return Card(**{**values, "identity": Identity(**values["identity"])}, files=files)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _values_digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _to_disk(path: Path) -> tuple[int, str]:
    """Bytes and SHA-256 of a file, once they are on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path.stat().st_size, _digest(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _writing(engine: Any) -> Iterator[tuple[list[Path], list[Exception]]]:
    """What DeepSpeed writes on this rank, and what goes wrong as it does, in place of raising it.

    DeepSpeed's ranks meet while saving: one that leaves by an exception would keep the others waiting.
    """
    written: list[Path] = []
    errors: list[Exception] = []
    writer = engine.checkpoint_engine
    write, copy_script = writer.save, engine._copy_recovery_script

    def save(state_dict: Any, path: str) -> None:
        try:
            write(state_dict, path)
            written.append(Path(path))
        except (OSError, RuntimeError) as error:  # torch's own writer raises the latter
            errors.append(error)

    def copy(*args: Any) -> None:
        try:
            copy_script(*args)
        except OSError as error:
            errors.append(error)

    writer.save, engine._copy_recovery_script = save, copy
    try:
        yield written, errors
    finally:
        del writer.save, engine._copy_recovery_script
