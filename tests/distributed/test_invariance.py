"""The same losses and gradients however a run is split, sharded or checkpointed; plain torch is the measure."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from ted_ds.telemetry.recorder import read_metrics
from tests.jobs import first_gradients, pretrain_recipe
from tests.marks import slow
from tests.plain_training import plain_stage1, plain_stage2
from tests.project import make_project, relative, write_recipe
from tests.tiny_models import FAMILIES
from tests.workers import Workers

TERMS = ("loss", "pred_loss", "kl_loss", "layer_loss")
ZERO0, ZERO3 = "--deepspeed=ds_configs/zero0.json", "--deepspeed=ds_configs/zero3.json"
REPLICATED = "--teacher.sharding=replicated"
SHORT: dict[str, Any] = {"filters__steps": 5, "train__steps": 5, "train__save_every": 0}

SPLITS = {
    "1 rank x 4 micro-batches": (1, ()),
    "2 ranks x 2": (2, ()),
    "4 ranks x 1": (4, ()),
    "1 rank, the whole batch at once": (1, ("--train.micro_batch_size=4",)),
    "ZeRO-0": (2, (ZERO0,)),
    "ZeRO-0, replicated teacher": (2, (ZERO0, REPLICATED)),
    "ZeRO-1, replicated teacher": (2, ("--deepspeed=ds_configs/zero1.json", REPLICATED)),
    "replicated teacher": (2, (REPLICATED,)),
    "offloaded parameters and optimizer": (2, ("--deepspeed=ds_configs/zero3_offload.json",)),
    "activation checkpointing": (2, ("--student.activation_checkpointing=true",)),
}

SLOW_SPLITS = ("1 rank, the whole batch at once", "ZeRO-0, replicated teacher", "replicated teacher")

NARROW: dict[str, Any] = {
    "student__init": {"blocks": "uniform", "num_blocks": 2, "hidden_size": 8, "intermediate_size": 20},
    "filters__output_dim": 12,
}
"""Cut in depth and width, narrow filters."""

SHAPES: dict[str, dict[str, Any]] = {
    "nonlinear filters, raw layer loss, explicit pairs": {
        "filters__nonlinear": True,
        "filters__layer_map": [[0, 0], [1, 3]],
        "loss__layer_loss": "mse",
        "loss__mse_alpha": 2.0,
    },
    "no KL, and a teacher that ends at its third block": {
        "filters__layer_map": [[0, 0], [1, 2]],
        "loss__kl_alpha": 0.0,
    },
    "lwd": {"method": "lwd"},
    "cosine, nonlinear filters, no fading": {
        "loss__layer_loss": "cosine",
        "loss__layer_fade": 0,
        "filters__nonlinear": True,
    },
    "normalized MSE": {"loss__layer_loss": "normalized_mse"},
    "kd": {"method": "kd", "loss__temperature": 3.0, "loss__kl_alpha": 0.7},
    "reverse KL": {"method": "kd", "loss__divergence": "reverse"},
    "top 5 of the teacher": {"method": "kd", "loss__kl_top_k": 5},
    "ce": {"method": "ce"},
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_project(tmp_path_factory.mktemp("invariance"))


def losses_of(folder: Path) -> list[dict[str, float]]:
    return [{name: line[name] for name in TERMS} for line in read_metrics(folder) if "loss" in line]


def assert_same(losses: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert len(losses) == len(expected)
    for step, (a, b) in enumerate(zip(losses, expected, strict=True)):
        for name in TERMS:
            assert a[name] == pytest.approx(b[name], rel=1e-5), (step, name)


@pytest.mark.parametrize("split", [slow(split) if split in SLOW_SPLITS else split for split in SPLITS])
def test_both_stages_are_plain_torch_however_they_are_split(
    project: Path, workers: Callable[[int], Workers], split: str
) -> None:
    ranks, overrides = SPLITS[split]
    path = write_recipe(project, "-".join(split.split()), **SHORT, **NARROW)
    workers(ranks).run(pretrain_recipe, path, overrides)
    folder = project / path.stem
    assert_same(losses_of(folder), plain_stage2(path, steps=5)[0])
    for side in ("teacher", "student"):
        stage1 = [line["loss"] for line in read_metrics(folder / f"{side}_filters")]
        assert stage1 == pytest.approx(plain_stage1(path, side, steps=5), rel=1e-5)


@pytest.mark.parametrize("shape", [slow(shape) if shape == "reverse KL" else shape for shape in SHAPES])
def test_every_method_and_shape_is_plain_torch(project: Path, workers: Callable[[int], Workers], shape: str) -> None:
    path = write_recipe(project, "shape-" + "-".join(shape.replace(",", "").split()), **SHORT, **SHAPES[shape])
    workers(2).run(pretrain_recipe, path)
    assert_same(losses_of(project / path.stem), plain_stage2(path, steps=5)[0])


@pytest.mark.parametrize("split", ["2 ranks x 2", "4 ranks x 1", "ZeRO-0", "activation checkpointing"])
def test_gradients_are_plain_torchs(project: Path, workers: Callable[[int], Workers], split: str) -> None:
    ranks, overrides = SPLITS[split]
    path = write_recipe(project, "gradients-" + "-".join(split.split()), **NARROW, filters__steps=2)
    ours = workers(ranks).run(first_gradients, path, overrides)[0]
    expected = plain_stage2(path, steps=1)[1]
    assert ours.keys() == expected.keys()
    largest = max(float(gradient.norm()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert float((ours[name] - gradient).norm()) < 1e-5 * max(largest * 1e-2, float(gradient.norm())), name
    assert relative(ours["filters.0.weight"], 2 * expected["filters.0.weight"]) > 0.1  # the measure can fail


@pytest.mark.parametrize("family", [f if f == "gemma3_text" else slow(f) for f in FAMILIES])
def test_every_family_goes_through_both_stages(tmp_path: Path, workers: Callable[[int], Workers], family: str) -> None:
    project = make_project(tmp_path, family=family)
    short = {"filters__steps": 3, "train__steps": 3, "train__save_every": 0, "optimizer__warmup_steps": 0}
    path = write_recipe(project, "run", train__micro_batch_size=2, **short)
    workers(2).run(pretrain_recipe, path)
    assert_same(losses_of(project / "run"), plain_stage2(path, steps=3)[0])


@pytest.mark.parametrize(
    ("zero", "teacher", "student"),
    [(ZERO3, "bfloat16", "bfloat16"), slow(ZERO0, "bfloat16", "bfloat16"), slow(ZERO3, "bfloat16", "float32")],
)
def test_bfloat16_stays_near_float32(
    tmp_path: Path, workers: Callable[[int], Workers], zero: str, teacher: str, student: str
) -> None:
    project = make_project(tmp_path, family="gpt2")
    dtypes = {"teacher__dtype": teacher, "student__dtype": student, "student__activation_checkpointing": True}
    path = write_recipe(project, "run", **SHORT, **dtypes, filters__output_dim=12, optimizer__learning_rate=1e-3)
    workers(2).run(pretrain_recipe, path, (zero,))
    for ours, expected in zip(losses_of(project / path.stem), plain_stage2(path, steps=5)[0], strict=True):
        for name in TERMS:
            assert ours[name] == pytest.approx(expected[name], rel=0.1), name


def test_bfloat16_is_updated_alike_under_every_zero_stage(project: Path, workers: Callable[[int], Workers]) -> None:
    short = {"train__steps": 1, "train__save_every": 0, "train__evaluate_every": 0, "optimizer__warmup_steps": 0}
    students = {}
    for stage in range(4):
        (project / f"zero{stage}.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        changes = {**short, "optimizer__weight_decay": 0.5, "deepspeed": str(project / f"zero{stage}.json")}
        dtypes = {"teacher__dtype": "bfloat16", "student__dtype": "bfloat16"}
        path = write_recipe(project, f"first-update-{stage}", method="kd", **changes, **dtypes)
        workers(2).run(pretrain_recipe, path)
        students[stage] = load_file(project / f"first-update-{stage}/student/model.safetensors")
    start = load_file(project / "first-update-0/initial_student/model.safetensors")
    for stage, student in students.items():
        for name, tensor in student.items():
            moved, expected = ((t.float() - start[name]).norm() for t in (tensor, students[3][name]))
            assert float(moved) == pytest.approx(float(expected), rel=0.02), (stage, name)
