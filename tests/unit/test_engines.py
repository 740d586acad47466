"""`auto` in a recipe: which engines it stands for, by the estimate of memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ted_ds.config.load import load_config
from ted_ds.config.schema import RunConfig
from ted_ds.doctor import engines
from ted_ds.doctor.engines import engine_choices, first_that_fits
from ted_ds.doctor.estimate import Machine, estimate
from ted_ds.doctor.recipe import fit
from ted_ds.doctor.shapes import run_shapes
from tests.project import make_project, write_recipe

ALL = [("zero1", "replicated"), ("zero3", "replicated"), ("zero1", "zero3"), ("zero3", "zero3")]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_project(tmp_path_factory.mktemp("engines"), width=256, blocks=8)


def recipe(project: Path, **changes: Any) -> RunConfig:
    auto = {"deepspeed": "auto", "teacher__sharding": "auto", "train__global_batch_size": 8}
    return load_config(write_recipe(project, "auto", **auto | changes), [])


def taken(run: RunConfig) -> tuple[str, str | None]:
    return run.deepspeed.stem, run.teacher and run.teacher.sharding


def test_the_choices_keep_what_the_recipe_says(project: Path) -> None:
    assert [taken(run) for run in engine_choices(recipe(project))] == ALL
    own = recipe(project, deepspeed="ds_configs/zero0.json")
    assert [taken(run) for run in engine_choices(own)] == [("zero0", "replicated"), ("zero0", "zero3")]
    assert [taken(run) for run in engine_choices(recipe(project, teacher__sharding="zero3"))] == ALL[2:]
    settled = recipe(project, deepspeed="ds_configs/zero3.json", teacher__sharding="zero3")
    assert engine_choices(settled) == [settled]
    alone = load_config(
        write_recipe(project, "ce", deepspeed="auto", method="ce"),
        ["--teacher=null", "--student.init=null", f"--student.model={project}/teacher"],
    )
    assert [taken(run) for run in engine_choices(alone)] == [("zero1", None), ("zero3", None)]


@pytest.mark.parametrize("expected", range(len(ALL)))
def test_the_fastest_that_fits_is_taken(project: Path, expected: int) -> None:
    choices = engine_choices(recipe(project))
    shapes = run_shapes(choices[0])

    def machine(size: float) -> Machine:
        return Machine(8, torch.device("cpu"), size, 0.0, idle=0.0)

    needs = [estimate(run, shapes, machine(0)).total("device") for run in choices]
    room = needs[expected] / engines.TIGHT["cpu"]
    first = next(i for i, need in enumerate(needs) if need <= needs[expected])
    assert first_that_fits(choices, machine(1.001 * room)) == first
    said = {finding.check: finding.what for finding in fit(recipe(project), machine(1.001 * room))}["engines"]
    assert said == f"auto takes deepspeed: ds_configs/{ALL[first][0]}.json, teacher.sharding: {ALL[first][1]}"


def test_nothing_fits_or_nothing_is_known(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choices, none = engine_choices(recipe(project)), Machine(1, torch.device("cpu"), 0.0, 0.0, idle=0.0)
    assert first_that_fits(choices, none) == len(ALL) - 1

    def fail(_: RunConfig) -> None:
        raise RuntimeError("the model's own code looks at values")

    monkeypatch.setattr(engines, "run_shapes", fail)
    assert first_that_fits(choices, replace(none, device_bytes=1e15)) == len(ALL) - 1
