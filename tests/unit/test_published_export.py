"""A student of ours in the authors' layout, and filters of theirs in a run of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig

from ted_ds.config.load import load_config
from ted_ds.errors import ModelError
from ted_ds.models.filters import FilterPlan
from ted_ds.models.loading import load_model, whole_tensors
from ted_ds.models.published import (
    published_model,
    published_options,
    read_published,
    unpack_published,
    write_published,
)
from ted_ds.pipeline.stage0 import ModelPaths
from ted_ds.pipeline.stage1 import PairPlan, plan_pairs
from tests.task_project import make_task_project, write_task_recipe
from tests.tiny_encoders import encoder_config, tiny_encoder


def config(family: str = "deberta-v2", blocks: int = 4) -> PreTrainedConfig:
    return AutoConfig.for_model(**encoder_config(family, blocks=blocks))


@pytest.mark.parametrize(
    ("blocks", "filtered", "interval"),
    [(4, (0, 1, 2, 3), 1), (4, (1, 3), 2), (5, (1, 3), 2), (4, (3,), 4), (6, (2, 5), 3), (5, (2,), 3)],
)
def test_the_interval_is_that_of_the_plan(blocks: int, filtered: tuple[int, ...], interval: int) -> None:
    plan = FilterPlan(filtered, 16, 24, nonlinear=interval == 2)
    assert published_options(config(blocks=blocks), plan) == {
        "filter_disabled": False,
        "filter_interval": interval,
        "filter_nonlinear": interval == 2,
        "filter_output_dim": 24,
        "train_filters": False,
    }


def test_without_filters_they_are_disabled() -> None:
    assert published_options(config(), None) == {"filter_disabled": True, "train_filters": False}


@pytest.mark.parametrize(("blocks", "filtered"), [(4, (0, 2)), (4, (1,)), (4, (1, 2)), (4, (0, 1)), (6, (1, 5))])
def test_filters_that_are_not_on_every_nth_block_are_refused(blocks: int, filtered: tuple[int, ...]) -> None:
    with pytest.raises(ModelError, match=rf"every n-th block, these are on blocks \[{filtered[0]}.*: use export"):
        published_options(config(blocks=blocks), FilterPlan(filtered, 16, 24))


@pytest.mark.parametrize("plan", [None, FilterPlan((1, 3), 16, 24)])
def test_another_family_is_refused(plan: FilterPlan | None) -> None:
    with pytest.raises(ModelError, match=r"holds a deberta-v2, the student is a bert: use export"):
        published_options(config("bert"), plan)


@pytest.mark.parametrize("nonlinear", [False, True])
def test_what_is_written_is_theirs_and_reads_as_ours(nonlinear: bool, tmp_path: Path) -> None:
    tiny_encoder("deberta-v2", blocks=4).save_pretrained(tmp_path / "student")
    student = load_model(str(tmp_path / "student"), "classification", dtype="float32")
    plan = FilterPlan((1, 3), 16, 24, nonlinear)
    bank = plan.build()
    model = published_model(
        student,
        published_options(student.config, plan),
        dict(whole_tensors(student, keep=True)),
        plan,
        dict(whole_tensors(bank, keep=True)),
    )
    write_published(model, tmp_path / "theirs")
    written = json.loads((tmp_path / "theirs/config.json").read_text())
    assert written["architectures"] == ["TEDDebertaV2ForSequenceClassification"]
    assert written["model_type"] == "ted-deberta-v2" and written["filter_interval"] == 2
    assert (written["num_hidden_layers"], written["hidden_size"]) == (4, 16)

    read = read_published(str(tmp_path / "theirs"))
    assert read.plan == plan and not read.heads
    expected = dict(bank.named_parameters())
    assert read.filters.keys() == expected.keys()
    assert all(torch.equal(read.filters[name], tensor) for name, tensor in expected.items())
    # a buffer of their transformers, [1, positions]
    assert torch.equal(read.weights["deberta.embeddings.position_ids"], torch.arange(66)[None])

    unpack_published(str(tmp_path / "theirs"), tmp_path / "new")
    again = load_model(str(tmp_path / "new/model"), "classification", dtype="float32")
    assert all(torch.equal(p, again.get_parameter(name)) for name, p in student.named_parameters())


def test_a_student_without_filters_is_written_without(tmp_path: Path) -> None:
    student = tiny_encoder("deberta-v2")
    weights = dict(whole_tensors(student, keep=True))
    write_published(
        published_model(student, published_options(student.config, None), weights, None, {}), tmp_path / "x"
    )
    read = read_published(str(tmp_path / "x"))
    assert read.plan is None and not read.filters and read.options["filter_disabled"]
    assert read.config["architectures"] == [type(student).__name__]  # whatever the model's config said


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
    run = load_config(write_task_recipe(project, "sst2", "run", **recipe))
    return plan_pairs(run, ModelPaths(str(project / "student"), str(project / "teacher"), published))


ANY_WIDTH: dict[str, Any] = {"filters__output_dim": None}
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
