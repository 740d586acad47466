"""Filters of the paper's authors in a run of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ted_ds.config.load import load_config
from ted_ds.errors import ModelError
from ted_ds.models.filters import FilterPlan
from ted_ds.pipeline.pair_plan import PairPlan, plan_pairs
from ted_ds.pipeline.stage0 import ModelPaths
from tests.task_project import make_task_project, write_task_recipe


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of 4 blocks of width 24, a student of 2 of width 16."""
    return make_task_project(tmp_path_factory.mktemp("project"), "sst2", family="deberta-v2")


def pairs_with(project: Path, *, recipe: dict[str, Any], **came: FilterPlan) -> PairPlan | None:
    """The plan of a run to whose models filters came with the checkpoints."""
    published = {}
    for side, plan in came.items():
        published[side] = project / f"{side}-filters"
        published[side].mkdir(exist_ok=True)
        fields = {"blocks": plan.blocks, "width": plan.width, "output_dim": plan.output_dim}
        (published[side] / "filters.json").write_text(json.dumps({"plan": fields}))
    run = load_config(write_task_recipe(project, "sst2", "run", **AS_THEY_ARE | recipe))
    return plan_pairs(run, ModelPaths(str(project / "student"), str(project / "teacher"), published))


ANY_WIDTH: dict[str, Any] = {"filters__output_dim": None}
AS_THEY_ARE = {"loss__layer_loss": "mse"}
"""Filters of the paper's authors read hidden states as they are."""
TEACHERS, STUDENTS = FilterPlan((1, 3), 24, 12), FilterPlan((0, 1), 16, 12)


def test_filters_that_came_are_kept_and_their_width_is_f(project: Path) -> None:
    both = pairs_with(project, recipe=ANY_WIDTH, teacher=TEACHERS, student=STUDENTS)
    assert both == PairPlan(((0, 1), (1, 3)), TEACHERS, STUDENTS)
    assert pairs_with(project, recipe=ANY_WIDTH, teacher=TEACHERS) == both
    assert pairs_with(project, recipe=ANY_WIDTH, student=STUDENTS) == both
    neither = pairs_with(project, recipe=ANY_WIDTH)
    assert neither is not None and neither.student.output_dim == 24  # the teacher's width
    wide = pairs_with(project, recipe={"filters__output_dim": 8, "filters__nonlinear": True})
    assert wide is not None and wide.teacher == FilterPlan((1, 3), 24, 8, True)


def test_hidden_states_alone_take_no_filters_of_the_teacher(project: Path) -> None:
    for width in (None, 8):  # F is the teacher's width whatever the recipe says
        recipe = {"filters__output_dim": width, "method": "lwd"}
        plan = pairs_with(project, recipe=recipe, teacher=TEACHERS, student=STUDENTS)
        assert plan == PairPlan(((0, 1), (1, 3)), None, FilterPlan((0, 1), 16, 24))
    kd = {**ANY_WIDTH, "method": "kd", "loss__mse_alpha": None}
    assert pairs_with(project, recipe=kd, teacher=TEACHERS) is None


@pytest.mark.parametrize(
    ("recipe", "came", "message"),
    [
        ({}, {"teacher": FilterPlan((0, 1, 2, 3), 24, 12)}, "the teacher has 4 filters, the student 2: K must be the"),
        ({}, {"student": FilterPlan((1,), 16, 12)}, "the teacher has 2 filters, the student 1: K must be the same"),
        (
            {"loss__layer_loss": "cosine"},
            {"teacher": TEACHERS},
            "the teacher's filters were learnt on hidden states as they are, loss.layer_loss cosine normalises them",
        ),
        (
            {"filters__output_dim": 8},
            {"teacher": TEACHERS},
            "the teacher's filters have width 12, F of this run is 8: set filters.output_dim to 12",
        ),
        (
            {},
            {"teacher": TEACHERS, "student": FilterPlan((0, 1), 16, 10)},
            "the student's filters have width 10, F of this run is 12",
        ),
        (
            {},
            {"teacher": FilterPlan((0, 1), 24, 12)},
            r"teacher's filters are on its blocks \[0, 1\], filters.layer_map pairs blocks \[1, 3\]: "
            r"set filters.layer_map to \[\[0, 0\], \[1, 1\]\]",
        ),
        (
            {"filters__layer_map": [[1, 3]]},
            {"teacher": FilterPlan((3,), 24, 12), "student": FilterPlan((0,), 16, 12)},
            r"student's filters are on its blocks \[0\], filters.layer_map pairs blocks \[1\]: "
            r"set filters.layer_map to \[\[0, 3\]\]",
        ),
    ],
)
def test_filters_that_do_not_fit_the_run_are_refused(
    project: Path, recipe: dict[str, Any], came: dict[str, FilterPlan], message: str
) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        pairs_with(project, recipe={**ANY_WIDTH, **recipe}, **came)
    assert "\n" not in str(caught.value)


def test_a_layer_map_as_the_message_says_it_is_accepted(project: Path) -> None:
    plan = pairs_with(
        project, recipe={**ANY_WIDTH, "filters__layer_map": [[0, 0], [1, 1]]}, teacher=FilterPlan((0, 1), 24, 12)
    )
    assert plan is not None and plan.layer_map == ((0, 0), (1, 1))


def test_nonlinear_filters_have_their_models_activation(project: Path, tmp_path: Path) -> None:
    content = json.loads((project / "teacher/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, "hidden_act": "silu"}))
    run = load_config(write_task_recipe(project, "sst2", "activations", filters__nonlinear=True))
    plan = plan_pairs(run, ModelPaths(str(project / "student"), str(tmp_path)))
    assert plan is not None and plan.teacher is not None
    assert (plan.teacher.activation, plan.student.activation) == ("silu", "gelu")
