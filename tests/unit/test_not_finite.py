"""Outputs that are nan or infinite: refused with the name of the model or step, at every place that scores."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ted_ds.cli import evaluate
from ted_ds.cli.common import guarded, printed
from ted_ds.config.tasks import TASKS
from ted_ds.errors import DataError, NotFiniteError, TrainingError
from ted_ds.evaluation.perplexity import held_out_perplexity
from ted_ds.pipeline.stage2 import scorable
from ted_ds.tasks import labelled
from ted_ds.tasks.classification import Classification
from ted_ds.tasks.labelled import ExampleData


class World:
    device = torch.device("cpu")
    rank, size = 0, 1

    def __init__(self, *, is_main: bool = True) -> None:
        self.is_main = is_main

    def on_main(self, work: Callable[[], Any]) -> Any:
        return work()


@pytest.mark.parametrize("is_main", [True, False])
@pytest.mark.parametrize(("step", "remedy"), [(0, "see to the weights that it begins with"), (7, "lower optimizer.l")])
def test_a_run_ends_with_its_step_and_one_rank_says_so(step: int, remedy: str, is_main: bool) -> None:
    world: Any = World(is_main=is_main)
    said = rf"^step {step}: the student has no score: the loss is nan: {remedy}"
    with pytest.raises(TrainingError, match=said) as e, scorable(step, world):
        raise NotFiniteError("the loss is nan")
    assert e.value.exit_code == 2 and e.value.said_by_main is not is_main
    with pytest.raises(DataError, match=r"^another fault$"), scorable(step, world):
        raise DataError("another fault")


def test_a_held_out_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """`argmax` would call nan the likeliest class, and 2 of 3 rows right."""
    outputs = np.full((3, 2), math.nan, dtype=np.float32)
    monkeypatch.setattr(labelled, "collect_outputs", lambda *_: outputs)
    monkeypatch.setattr(labelled, "ScoringRows", lambda *_, **__: [])

    class Rows:
        targets = np.array([0, 0, 1])

        def __len__(self) -> int:
            return 3

    nothing: Any = None
    rows: Any = Rows()
    run: Any = SimpleNamespace(train=SimpleNamespace(micro_batch_size=1))
    world: Any = World()
    data = ExampleData(nothing, Classification(TASKS["sst2"].labels), rows, {"validation": rows, "mismatched": rows})
    for work, name in ((data.evaluate, "validation"), (data.evaluate_extra, "mismatched")):
        with pytest.raises(NotFiniteError, match=rf"^in {name}, the outputs for 3 of 3 rows are not finite, the first"):
            work(None, run, world)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_perplexity(broken: float) -> None:
    class Summed(World):
        """What all ranks add up to: a sum of losses, then counts."""

        def sum(self, values: torch.Tensor) -> torch.Tensor:
            return torch.full_like(values, 8.0).index_fill_(0, torch.tensor([0]), broken)

    engine: Any = torch.nn.Identity()
    world: Any = Summed()
    with pytest.raises(NotFiniteError, match=rf"^the loss of 8 tokens is {broken}, which is not finite$"):
        held_out_perplexity(engine, [], world)


def test_evaluate_names_the_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def diverged(arguments: Any) -> dict[str, Any]:
        raise NotFiniteError("the loss of 8 tokens is nan, which is not finite")

    monkeypatch.setattr(evaluate, "_evaluate", diverged)
    assert guarded(evaluate.main, ["org/model", "--data", "a.txt"]) == 2
    assert capsys.readouterr() == (
        "",
        "ted_ds: model org/model: the loss of 8 tokens is nan, which is not finite: there is no score, see to its "
        "weights\n",
    )


@pytest.mark.parametrize("option", ["--batch-size", "--sequence-length", "--doc-stride"])
@pytest.mark.parametrize("value", ["0", "-1", "x"])
def test_numbers_of_evaluate_are_from_1_on(capsys: pytest.CaptureFixture[str], option: str, value: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(["m", "--data", "a.txt", option, value])
    assert f"error: argument {option}: {value!r} is not a whole number from 1 on" in capsys.readouterr().err


def test_nothing_that_is_no_json_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        printed(lambda: {"loss": math.nan})
    assert capsys.readouterr().out == ""
