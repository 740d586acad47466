"""A disk that is full or read-only, damaged checkpoints, and data that changed: the last good state is kept."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ted_ds.pipeline.checkpoints import Identity, load_checkpoint
from tests.alone import Alone
from tests.faults.ranks import TORTURE, latest_is_whole, recorded, run

Disturbed = Callable[..., tuple[Path, Path]]


@contextmanager
def mounted(*options: object, at: Path) -> Iterator[None]:
    """A file system at a folder; skips where that is not allowed."""
    at.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", *map(str, options), str(at)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs root and mount: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(at)], check=True)


def nearly_over(fault_project: Path, folder: Path) -> str:
    """Makes a folder of a run that has its last step and checkpoint before it; the one it has."""
    shutil.copytree(fault_project / "undisturbed", folder, dirs_exist_ok=True)
    for gone in ("student", "checkpoints/step-00000016"):
        shutil.rmtree(folder / gone)
    (folder / "checkpoints/latest").write_text("step-00000015")
    return "step-00000015"


@pytest.mark.parametrize("left", [80_000, 0])
def test_a_full_disk_ends_the_run_and_harms_nothing(
    fault_project: Path, undisturbed: Any, disturbed: Disturbed, left: int
) -> None:
    """left: bytes that are free when the last checkpoint, of 150 KB, is due; with none, the start fails already."""
    recipe, logs = disturbed(f"full-{left}")
    folder = fault_project / f"full-{left}"
    with mounted("-t", "tmpfs", "-o", "size=3m", "none", at=folder):
        before = nearly_over(fault_project, folder)
        (folder / "ballast").write_bytes(bytes(shutil.disk_usage(folder).free - left))
        said = run(2, recipe, logs=logs, codes=(2,))
        # torch's writer does not say what the system did
        why = (
            r"No space left on device"
            if left == 0
            else r"step-00000016 could not be written \(rank [01]: .*, with 0(\.0\d+)? MiB"
        )
        assert re.search(why, said) and "make room" in said and "Traceback" not in said
        assert (folder / "checkpoints/latest").read_text() == before and latest_is_whole(folder)
        (folder / "ballast").unlink()
        run(2, recipe, logs=logs)
        assert recorded(folder) == undisturbed


def test_a_disk_that_became_read_only_ends_the_run_and_harms_nothing(
    fault_project: Path, undisturbed: Any, disturbed: Disturbed
) -> None:
    recipe, logs = disturbed("readonly")
    folder = fault_project / "readonly"
    before, checkpoints = nearly_over(fault_project, folder), folder / "checkpoints"
    with mounted("--bind", checkpoints, at=checkpoints):
        subprocess.run(["mount", "-o", "remount,ro,bind", str(checkpoints)], check=True)
        said = run(2, recipe, logs=logs, codes=(2,))
        assert "Read-only file system" in said and "see to the permissions" in said and "Traceback" not in said
    assert (checkpoints / "latest").read_text() == before and latest_is_whole(folder)
    run(2, recipe, logs=logs)
    assert recorded(folder) == undisturbed


class Loads:
    """An engine that notes which checkpoint it is given."""

    tag = ""

    def zero_optimization_stage(self) -> int:
        return 0  # of any number of ranks

    def load_checkpoint(self, folder: str, *, tag: str) -> tuple[str, dict[str, Any]]:
        self.tag = tag
        return tag, {}


@pytest.mark.timeout(300 * TORTURE)
def test_100_places_of_a_real_checkpoint(fault_project: Path, undisturbed: Any, tmp_path: Path) -> None:
    """A flipped bit or a lost end of any file: the one before is taken, or nothing has changed; then a real restart."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(fault_project / "undisturbed/checkpoints", folder)
    newest, older = sorted((path.name for path in folder.glob("step-*")), reverse=True)[:2]
    for tag in (newest, older):  # the stub stands for DeepSpeed under ZeRO-0
        restage(folder / tag)
    identity = Identity(**json.loads((folder / newest / "ted_ds.json").read_text())["identity"])
    draw = random.Random(0)
    places = [*(folder / newest).iterdir(), folder / "latest"]
    world: Any = Alone()
    for turn in range(100 * TORTURE):
        file = draw.choices(places, [max(1, path.stat().st_size) ** 0.5 for path in places])[0]
        whole = file.read_bytes()
        place = draw.randrange(len(whole))
        flipped = bytes([whole[place] ^ 1 << draw.randrange(8)])
        file.write_bytes(whole[:place] if turn % 2 else whole[:place] + flipped + whole[place + 1 :])
        engine = Loads()
        load_checkpoint(engine, folder, identity, world)
        assert engine.tag == (newest if file.name == "latest" else older), (file, place)
        file.write_bytes(whole)


def restage(checkpoint: Path) -> None:
    """Writes the card of a checkpoint anew, as of ZeRO-0."""
    from ted_ds.pipeline.checkpoints import _card_text, _read_card

    card = _read_card(checkpoint)
    assert card is not None
    object.__setattr__(card, "zero_stage", 0)
    (checkpoint / "ted_ds.json").write_text(_card_text(card))


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(
    fault_project: Path, undisturbed: Any, disturbed: Disturbed
) -> None:
    recipe, logs = disturbed("damaged")
    folder = fault_project / "damaged"
    shutil.copytree(fault_project / "undisturbed", folder)
    shutil.rmtree(folder / "student")
    tag = (folder / "checkpoints/latest").read_text()
    states = folder / "checkpoints" / tag / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    damaged = bytearray(states.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    states.write_bytes(damaged)
    said = run(2, recipe, logs=logs)
    assert f"{tag} is damaged: {states.name} is not what was written: going on from " in said
    assert recorded(folder) == undisturbed


def test_data_that_changed_under_a_run_is_refused(fault_project: Path, disturbed: Disturbed) -> None:
    recipe, logs = disturbed("changed")
    folder = fault_project / "changed"
    shutil.copytree(fault_project / "undisturbed", folder)
    shutil.rmtree(folder / "student")
    train, text = fault_project / "train.txt", (fault_project / "train.txt").read_text()
    try:
        train.write_text(text + " w1")
        said = run(1, recipe, logs=logs, codes=(2,))
        assert f"{folder / 'data/train'} was prepared with other sizes of data files: " in said
        train.write_text(" ".join(reversed(text.split()))[: len(text)].ljust(len(text)))
        shutil.rmtree(folder / "data")
        said = run(1, recipe, logs=logs, codes=(2,))
        assert "is of other training rows; restore the data, or use another output_dir (fingerprints " in said
    finally:
        train.write_text(text)
