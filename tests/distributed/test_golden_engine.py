"""The paper's code's numbers through DeepSpeed under ZeRO-3, from checkpoints in its layout, at 1 and 2 ranks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification

from ted_ds.models.published import read_published
from ted_ds.telemetry.recorder import read_metrics
from tests.golden.test_golden import CASES
from tests.jobs import golden_losses, pretrain_error, pretrain_recipe
from tests.task_project import make_task_project
from tests.workers import Workers


def case_recipe(case: Path, folder: Path, **changes: Any) -> Path:
    """A recipe of a case's options; its data is never opened."""
    manifest = json.loads((case / "manifest.json").read_text())
    kind = "question-answering" if manifest["task"] == "qa" else "classification"
    kind = "regression" if manifest["num_labels"] == 1 else kind
    labels = {"labels": ["LABEL_0", "LABEL_1", "LABEL_2"][: manifest["num_labels"]]} if kind == "classification" else {}
    columns = {} if kind == "question-answering" else {"text_columns": ["sentence"], **labels}
    recipe: dict[str, Any] = {
        "task": kind,
        "output_dir": str(folder / "run"),
        "teacher": {"model": str(case / "teacher"), "dtype": "float32"},
        "student": {"model": str(case / "student"), "dtype": "float32"},
        "filters": {"nonlinear": manifest["options"]["nonlinear"]},
        "loss": {**manifest["alphas"]["ted"], "layer_loss": "mse", "mask_padding": False},
        "data": {"train": ["none.tsv"], "tokenizer": "none", **columns},
        "optimizer": {
            "learning_rate": 1e-3,
            "warmup_steps": 0,
            "schedule": "constant",
            "weight_decay": 0.0,
            "betas": [0.9, 0.999],
            "gradient_clipping": 0.0,
        },
        "train": {"global_batch_size": 4, "micro_batch_size": 2},
    }
    for dotted, value in changes.items():
        section, _, key = dotted.partition("__")
        recipe[section] = {**recipe[section], key: value} if key else value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=lambda path: path.name)
def test_both_stages_through_the_engine(
    tmp_path: Path, workers: Callable[[int], Workers], case: Path, ranks: int
) -> None:
    manifest = json.loads((case / "manifest.json").read_text())
    # on one rank the rows of a step lie in one micro-batch, as the KL of a regression wants
    path = case_recipe(case, tmp_path, train__micro_batch_size=4 // ranks)
    losses = workers(ranks).run(golden_losses, path, case)[0]
    for side in ("teacher", "student"):
        expected = manifest["stage1"][side]["float32"]["trajectory"]
        assert losses[f"stage1_{side}"] == pytest.approx(expected, rel=1e-4)
    assert losses["ted"] == pytest.approx(manifest["stage2"]["ted"]["float32"]["trajectory_total"], rel=1e-4)
    assert losses["ted"][10] != pytest.approx(losses["ted"][0], rel=1e-2)  # it has moved


def published_project(tmp_path: Path) -> tuple[Path, Path]:
    """(a project of SST-2's layout, a copy of the classification case whose models serve as its own)."""
    case = next(path for path in CASES if path.name.startswith("seqcls2"))
    project = make_task_project(tmp_path, "sst2")
    shutil.copytree(case, tmp_path / "case")
    return project, tmp_path / "case"


def step_recipe(project: Path, case: Path, **changes: Any) -> Path:
    data = {"train": [str(project / "train.tsv")], "tokenizer": str(project / "tokenizer"), "sequence_length": 32}
    train = {"steps": 1, "global_batch_size": 4, "micro_batch_size": 2, "save_every": 1}
    return case_recipe(case, project, task="sst2", data=data, train=train, **changes)


def test_published_checkpoints_run_a_step_from_a_recipe(tmp_path: Path, workers: Callable[[int], Workers]) -> None:
    project, case = published_project(tmp_path)
    workers(2).run(pretrain_recipe, step_recipe(project, case, optimizer__learning_rate=1e-30))
    assert read_metrics(project / "run")[-1]["layer_loss"] > 0
    before = read_published(str(case / "student"))
    after = AutoModelForSequenceClassification.from_pretrained(project / "run/student").state_dict()
    # a step of 1e-30 moves nothing that float32 can hold
    assert after.keys() <= before.weights.keys() and len(before.weights) - len(after) <= 1  # position ids
    assert all(torch.equal(tensor, before.weights[name]) for name, tensor in after.items())


def test_published_filters_that_do_not_fit_are_named(tmp_path: Path, workers: Callable[[int], Workers]) -> None:
    project, case = published_project(tmp_path)
    (message, _) = workers(2).run(pretrain_error, step_recipe(project, case, filters__output_dim=32))
    assert "the teacher's filters have width 64, F of this run is 32: set filters.output_dim to 64" in message
    (message, _) = workers(2).run(
        pretrain_error,
        step_recipe(project, case, output_dir=str(project / "pairs"), filters__layer_map=[[0, 0], [1, 1]]),
    )
    assert "the teacher's filters are on its blocks [1, 3], filters.layer_map pairs blocks [0, 1]" in message
    assert "set filters.layer_map to [[0, 1], [1, 3]]" in message
    # a student with as many blocks as the teacher, and filters on each of them: K differs
    other = next(path for path in CASES if path.name.startswith("regression"))
    shutil.rmtree(case / "student")
    shutil.copytree(other / "student", case / "student")
    message = workers(2).run(pretrain_error, step_recipe(project, case, output_dir=str(project / "k")))[0]
    assert "the teacher has 2 filters, the student 4: K must be the same on both sides" in message
