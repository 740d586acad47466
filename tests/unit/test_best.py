"""The best student: which scores are better, and that its folder is whole whenever the process dies."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from ted_ds.data.tokenizers import Tokenizer, load_tokenizer
from ted_ds.errors import CheckpointError
from ted_ds.job.files import recover_folder, replace_folder
from ted_ds.pipeline.best import BestStudent
from tests.alone import Alone
from tests.task_project import write_tokenizer
from tests.tiny_encoders import tiny_encoder

T = TypeVar("T")


class Killed(BaseException):
    """What ends the process in the middle of its work."""


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    write_tokenizer(tmp_path / "tokenizer")
    return load_tokenizer(str(tmp_path / "tokenizer"))


@pytest.fixture
def start(tmp_path: Path, tokenizer: Tokenizer) -> Callable[[], BestStudent]:
    """A process that starts, or starts again, on one folder."""
    return lambda: BestStudent(tmp_path / "best", "matthews", tokenizer, Alone())  # type: ignore[arg-type]


def student(step: int) -> PreTrainedModel:
    """A model that tells of which step it is."""
    model = tiny_encoder("bert", blocks=1)
    with torch.no_grad():
        model.classifier.bias.fill_(step)
    return model


def score(value: float) -> dict[str, float]:
    return {"validation_accuracy": 0.5, "validation_matthews": value}


def steps_kept(best: BestStudent, values: list[float]) -> list[int]:
    kept = []
    for step, value in enumerate(values, 1):
        if best.beaten_by(step, score(value)):
            best.keep(student(step), step, score(value))
            kept.append(step)
    return kept


def step_in(folder: Path) -> int:
    return int(load_file(folder / "model.safetensors")["classifier.bias"][0])


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ([-0.5, -0.7, -0.1], [1, 3]),  # any score beats none
        ([0.0, 0.0], [1]),
        ([0.25, 0.5, 0.5, 0.4, 0.5], [1, 2]),  # the first of equal ones stays
        ([math.nan, 0.1, math.nan, 0.05, 0.2], [2, 5]),
        ([math.nan], []),
    ],
)
def test_the_first_highest_score_is_kept(
    start: Callable[[], BestStudent], tmp_path: Path, values: list[float], kept: list[int]
) -> None:
    best = start()
    assert best.card is None
    assert steps_kept(best, values) == kept
    if not kept:
        assert best.card is None and not (tmp_path / "best").exists()
        return
    assert best.card == {"best_step": kept[-1], **score(values[kept[-1] - 1])}
    assert step_in(tmp_path / "best") == kept[-1]
    assert json.loads((tmp_path / "best/ted_ds.json").read_text()) == best.card


def test_scores_of_other_sets_do_not_count(start: Callable[[], BestStudent]) -> None:
    best = start()
    assert not best.beaten_by(1, {}) and not best.beaten_by(1, {"mismatched_matthews": 1.0, "validation_accuracy": 1.0})


def test_the_best_of_before_is_found_again_after_a_restart(start: Callable[[], BestStudent], tmp_path: Path) -> None:
    steps_kept(start(), [0.5])
    again = start()
    assert again.card == {"best_step": 1, **score(0.5)}
    assert not again.beaten_by(9, score(0.5)) and not again.beaten_by(9, score(0.4)) and again.beaten_by(9, score(0.6))
    assert steps_kept(again, [0.3, 0.6]) == [2] and start().card == again.card
    assert step_in(tmp_path / "best") == 2


def test_a_run_goes_back_to_the_best_of_its_checkpoint(start: Callable[[], BestStudent], tmp_path: Path) -> None:
    """Step 3 was kept after the last checkpoint, which knows of step 1: it is repeated and kept again."""
    steps_kept(start(), [0.5, 0.4, 0.6])
    again = start()
    with pytest.raises(CheckpointError, match=r"holds the student of step 3, train.steps is 2: give as many steps at"):
        again.go_back({"best_step": 1, **score(0.5)}, 2)
    again.go_back({"best_step": 1, **score(0.5)}, 3)
    assert again.beaten_by(2, score(0.6)) and not again.beaten_by(2, score(0.5))
    assert again.beaten_by(3, score(0.49))  # rounded otherwise than before: the folder's is this step's
    again.go_back(None, 3)
    assert again.beaten_by(1, score(-1.0))


def test_a_process_that_dies_between_the_two_renames_loses_nothing(
    start: Callable[[], BestStudent], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = start()
    steps_kept(best, [0.5])
    rename = Path.rename

    def killed(source: Path, target: Path) -> Any:
        if source.name == "best.tmp":
            raise Killed
        return rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "rename", killed)
        best.keep(student(2), 2, score(0.6))
    assert not (tmp_path / "best").exists()
    again = start()
    assert again.card == {"best_step": 1, **score(0.5)} and step_in(tmp_path / "best") == 1
    assert steps_kept(again, [0.1, 0.6]) == [2] and step_in(tmp_path / "best") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "tokenizer"]


def test_a_process_that_dies_after_the_renames_keeps_the_new_folder(tmp_path: Path) -> None:
    folder, old, new = tmp_path / "best", tmp_path / "best.old", tmp_path / "new"
    for path in (folder, old, new):
        path.mkdir()
        (path / path.name).touch()
    recover_folder(folder)
    assert (folder / "best").exists() and old.exists()
    replace_folder(folder, new)
    assert [path.name for path in folder.iterdir()] == ["new"] and [*tmp_path.iterdir()] == [folder]
    recover_folder(tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_the_copy_is_a_plain_folder_without_the_card(start: Callable[[], BestStudent], tmp_path: Path) -> None:
    best = start()
    steps_kept(best, [0.5])
    for leftover in ("student", "student.tmp"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "other").touch()
    best.copy_to(tmp_path / "student")
    names = {path.name for path in (tmp_path / "best").iterdir()}
    assert {path.name for path in (tmp_path / "student").iterdir()} == names - {"ted_ds.json"}
    assert {"config.json", "model.safetensors", "tokenizer.json", "ted_ds.json"} <= names
    assert not (tmp_path / "student.tmp").exists()
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
    assert all(torch.equal(p, student(1).get_parameter(name)) for name, p in model.named_parameters())
