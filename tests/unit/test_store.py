"""Checkpoints on the disk: what is kept, what counts as whole, and which one a run goes on from."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import pytest
import torch

from ted_ds.config.continuation import deciding
from ted_ds.config.schema import RunConfig
from ted_ds.errors import CheckpointError, ConfigError
from ted_ds.pipeline.checkpoints import (
    CARD,
    Card,
    Identity,
    Retention,
    _read_card,
    _values_digest,
    latest_tag,
    load_checkpoint,
    save_checkpoint,
    write_atomically,
)
from ted_ds.pipeline.universal import loads_universal
from tests.alone import Alone

T = TypeVar("T")
RECIPE = deciding(
    RunConfig.model_validate(
        {
            "output_dir": "o",
            "teacher": {"model": "t"},
            "student": {"init": {"blocks": [0, 2]}},
            "data": {"train": ["a.txt"], "tokenizer": "t"},
        }
    ).model_dump(mode="json")
)
OURS = Identity("model", RECIPE, "data")
NINE = Retention(9)


class Engine:
    """What the store asks of DeepSpeed's: it writes two files of noise, and its number is its state."""

    def __init__(self, number: int = 0) -> None:
        self.number, self.checkpoint_engine = number, self

    def zero_optimization_stage(self) -> int:
        return 3

    def save(self, state_dict: Any, path: str) -> None:
        torch.save(state_dict, path)

    def _copy_recovery_script(self, folder: str) -> None:
        Path(folder, "zero_to_fp32.py").touch()

    def save_checkpoint(self, folder: str, *, tag: str, save_latest: bool) -> None:
        assert not save_latest
        place = Path(folder, tag)
        noise = torch.randn(100, generator=torch.Generator().manual_seed(self.number))
        for name in ("model.pt", "optimizer.pt"):
            self.checkpoint_engine.save(state_dict={"number": self.number, "noise": noise}, path=str(place / name))
        (place / "note.txt").write_text("written by DeepSpeed itself")
        self._copy_recovery_script(folder)

    def load_checkpoint(self, folder: str, *, tag: str) -> tuple[str, dict[str, Any]]:
        loaded = [torch.load(Path(folder, tag, name))["number"] for name in ("model.pt", "optimizer.pt")]
        assert loaded[0] == loaded[1]
        self.number = loaded[0]
        return tag, {}


def save(folder: Path, step: int, keep: Retention = NINE, **card: Any) -> None:
    world: Any = Alone()
    save_checkpoint(Engine(step), folder, Card(step, 8 * step, OURS, **card), world, keep)


def load(folder: Path, identity: Identity = OURS) -> int | None:
    """The state that is restored, which is the step of a checkpoint."""
    world: Any = Alone()
    engine = Engine()
    card = load_checkpoint(engine, folder, identity, world)
    assert card is None or card.step == engine.number
    return None if card is None else card.step


def steps(folder: Path) -> list[int]:
    return [int(path.name[5:]) for path in sorted(folder.glob("step-*"))]


@pytest.mark.parametrize(
    ("saved", "keep", "left"),
    [
        ((100, 200, 300), Retention(2), [200, 300]),
        ((100, 200, 300), Retention(1), [300]),
        ((200, 400, 300), Retention(1), [300]),  # 400 is of a run that went on from 200
        ((100, 200, 400, 300), Retention(5), [100, 200, 300]),
        ((100, 200, 300, 400, 500), Retention(1, 200), [200, 400, 500]),
        ((100, 200, 300), Retention(4), [100, 200, 300]),
        ((100, 200, 300, 400, 500), Retention(4), [200, 300, 400, 500]),
    ],
)
def test_what_is_kept_is_the_saved_one_and_those_before_it(
    tmp_path: Path, saved: tuple[int, ...], keep: Retention, left: list[int]
) -> None:
    for step in saved[:-1]:
        save(tmp_path, step)
    (tmp_path / "step-00000050.tmp").mkdir()  # of a run that was killed as it wrote
    (tmp_path / "step-00000100.universal").mkdir()
    save(tmp_path, saved[-1], keep)
    assert steps(tmp_path) == left
    assert latest_tag(tmp_path) == f"step-{saved[-1]:08d}"


def test_the_best_one_stays(tmp_path: Path) -> None:
    for step, score in ((1, -3.0), (2, -1.0), (3, None), (4, -2.0), (5, -1.5)):
        save(tmp_path, step, Retention(1), score=score)
    assert steps(tmp_path) == [2, 5]
    save(tmp_path, 6, Retention(1), score=math.nan)
    assert steps(tmp_path) == [2, 6]
    save(tmp_path, 7, Retention(1), score=0.5)
    assert steps(tmp_path) == [7]


def test_a_card_says_what_a_checkpoint_is(tmp_path: Path) -> None:
    save(tmp_path, 7, metrics_bytes=123, best={"best_step": 5}, score=0.25, balance=[0.5])
    card = json.loads((tmp_path / "step-00000007" / CARD).read_text())
    assert {name: entry[0] for name, entry in card.pop("files").items()} == {
        path.name: path.stat().st_size for path in (tmp_path / "step-00000007").iterdir() if path.name != CARD
    }
    assert len(card.pop("digest")) == 64
    assert card == {
        **{"step": 7, "rows": 56, "metrics_bytes": 123, "best": {"best_step": 5}, "score": 0.25, "balance": [0.5]},
        **{"identity": {"model": "model", "recipe": RECIPE, "data": "data"}, "world_size": 1, "zero_stage": 3},
    }


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert latest_tag(tmp_path / "nothing") is None and load(tmp_path / "nothing") is None
    assert latest_tag(tmp_path) is None and load(tmp_path) is None


def test_any_flipped_bit_or_lost_end_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """100 random places of a checkpoint and of `latest`: a run goes on from the one before, or nothing has changed."""
    for step in (5, 10):
        save(tmp_path, step)
    draw = random.Random(0)
    files = [*(tmp_path / "step-00000010").iterdir(), tmp_path / "latest"]
    for turn in range(100):
        file = files[turn % len(files)]
        whole = file.read_bytes()
        place = draw.randrange(len(whole))
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draw.randrange(8)
        file.write_bytes(whole[:place] if turn // len(files) % 2 else bytes(damaged))
        caplog.clear()
        step = load(tmp_path)
        # all that a damaged `latest` can do is to name no checkpoint: then the newest is taken
        assert step == (10 if file.name == "latest" else 5), (file, place)
        said = [record.message for record in caplog.records]
        assert file.name == "latest" or (len(said) == 1 and f"going on from {tmp_path / 'step-00000005'}" in said[0])
        file.write_bytes(whole)
    assert load(tmp_path) == 10


def test_a_missing_file_or_folder_is_noticed(tmp_path: Path) -> None:
    for step in (5, 10):
        save(tmp_path, step)
    (tmp_path / "step-00000010/model.pt").unlink()
    assert load(tmp_path) == 5
    (tmp_path / "step-00000005" / CARD).unlink()
    with pytest.raises(CheckpointError) as error:
        load(tmp_path)
    assert str(error.value) == (
        f"no checkpoint in {tmp_path} is whole ({tmp_path}/step-00000010 is damaged: model.pt is not what was written; "
        f"{tmp_path}/step-00000005 has no whole {CARD}): put a whole one there, or delete that folder to start over"
    )


def test_what_was_saved_after_a_fallback_replaces_the_damaged_one(tmp_path: Path) -> None:
    for step in (5, 10):
        save(tmp_path, step)
    (tmp_path / "step-00000010/model.pt").write_bytes(b"")
    assert load(tmp_path) == 5
    save(tmp_path, 10)
    assert load(tmp_path) == 10 and steps(tmp_path) == [5, 10]


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("model", "other filters or another model"),
        ("data", "other training rows"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, what: str, said: str) -> None:
    save(tmp_path, 5)
    with pytest.raises(CheckpointError, match=f"step-00000005 is of {said}.*fingerprints {what} and other"):
        load(tmp_path, replace(OURS, **{what: "other"}))


def test_a_checkpoint_of_another_recipe_is_refused_by_its_key(tmp_path: Path) -> None:
    save(tmp_path, 5)
    other = replace(OURS, recipe={**RECIPE, "loss": {**RECIPE["loss"], "mse_alpha": 2.5}})
    with pytest.raises(CheckpointError) as error:
        load(tmp_path, other)
    assert str(error.value) == (
        f"checkpoint {tmp_path}/step-00000005 is of another recipe (loss.mse_alpha: 1.0, this recipe says 2.5); use "
        "another output_dir, or restore the recipe that wrote it"
    )


def edit_card(path: Path, **identity: Any) -> None:
    values = json.loads((path / CARD).read_text())
    del values["digest"]
    values["identity"] |= identity
    (path / CARD).write_text(json.dumps({**values, "digest": _values_digest(values)}))


def test_a_checkpoint_of_an_earlier_version_is_taken(tmp_path: Path) -> None:
    save(tmp_path, 5)
    edit_card(tmp_path / "step-00000005", recipe="3ec832ca49275c63")  # a hash of all keys that there were
    assert load(tmp_path) == 5
    earlier = {name: section for name, section in RECIPE.items() if name != "optimizer"}
    earlier["loss"] = {key: value for key, value in RECIPE["loss"].items() if key != "divergence"}
    edit_card(tmp_path / "step-00000005", recipe=earlier)
    assert load(tmp_path) == 5
    edit_card(tmp_path / "step-00000005", recipe={**earlier, "loss": {**earlier["loss"], "gone": 1}})
    with pytest.raises(ConfigError, match=rf"{CARD}: loss.gone: this version of ted_ds has no such key: go on with"):
        load(tmp_path)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("file write failed")])
@pytest.mark.parametrize("place", ["save", "_copy_recovery_script"])
def test_what_cannot_be_written_leaves_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, place: str
) -> None:
    save(tmp_path, 5)

    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(Engine, place, full)
    expected = RuntimeError if place != "save" and isinstance(error, RuntimeError) else CheckpointError
    with pytest.raises(expected) as raised:
        save(tmp_path, 10)
    if expected is CheckpointError:
        assert str(raised.value).startswith(
            f"checkpoint {tmp_path}/step-00000010 could not be written (rank 0: {error}"
        )
        assert steps(tmp_path) == [5]
    assert load(tmp_path) == 5


class Killed(BaseException):
    """What ends the process in the middle of its work."""


def test_a_process_that_dies_at_any_rename_or_sync_leaves_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call of os.fsync and Path.rename/replace, one after the other, is the last one that happens."""
    import os

    save(tmp_path, 5)
    calls, limit = 0, 0

    def counted(call: Callable[..., T]) -> Callable[..., T]:
        def wrapper(*args: Any) -> T:
            nonlocal calls
            calls += 1
            if calls > limit:
                raise Killed
            return call(*args)

        return wrapper

    ended = False
    while not ended:
        calls, limit = 0, limit + 1
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", counted(os.fsync))
            for name in ("rename", "replace"):
                patch.setattr(Path, name, counted(getattr(Path, name)))
            try:
                save(tmp_path, 10)
                ended = True
            except Killed:
                pass
        assert load(tmp_path) in (5, 10)
    assert limit > 10 and load(tmp_path) == 10


def test_a_file_that_rank_0_sees_shorter_than_it_was_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As over a network file system that has lost an end."""
    save(tmp_path, 5)
    world = Alone()

    def loses_an_end(value: T) -> list[T]:
        for file in tmp_path.glob("*.tmp/model.pt"):
            file.write_bytes(file.read_bytes()[:-1])
        return [value]

    monkeypatch.setattr(world, "gather_objects", loses_an_end)
    with pytest.raises(OSError, match=r"model.pt has not the \d+ bytes that were written"):
        save_checkpoint(Engine(10), tmp_path, Card(10, 80, OURS), cast(Any, world), NINE)
    assert load(tmp_path) == 5


def test_a_card_survives_its_own_writing(tmp_path: Path) -> None:
    save(tmp_path, 5)
    card = _read_card(tmp_path / "step-00000005")
    assert card is not None and card.identity == OURS and card.files["note.txt"][0] == 27
    write_atomically(tmp_path / "text", "a")
    assert (tmp_path / "text").read_text() == "a" and not list(tmp_path.glob("*.tmp"))


def test_steps_of_a_universal_checkpoint_are_where_their_parameters_are() -> None:
    parameters = [torch.nn.Parameter(torch.ones(2, device=device)) for device in ("meta", "cpu", "cpu")]
    optimizer = torch.optim.AdamW(parameters)
    shared = torch.tensor(7.0)
    for parameter in parameters:
        optimizer.state[parameter] = {"step": shared}
    engine: Any = SimpleNamespace(optimizer=SimpleNamespace(optimizer=optimizer), _config=SimpleNamespace())
    with loads_universal(engine):
        assert engine._config.load_universal_checkpoint
    assert not engine._config.load_universal_checkpoint
    steps = [optimizer.state[parameter]["step"] for parameter in parameters]
    assert [step.device.type for step in steps] == ["meta", "cpu", "cpu"]
    steps[1].add_(1)
    assert (float(steps[1]), float(steps[2])) == (8.0, 7.0)
