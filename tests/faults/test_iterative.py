"""`blocks: iterative`: rounds of cutting and healing, killed inside and between them."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.faults.ranks import Ranks, recorded, run
from tests.project import make_project, write_recipe

BLOCKS = 6
INIT = {"blocks": "iterative", "num_blocks": 3, "round_blocks": 1, "round_steps": 4, "calibration_tokens": 60}
SHORT = {"filters__steps": 2, "train__steps": 3, "train__save_every": 2, "train__evaluate_every": 0}


def rounds_recipe(project: Path, name: str, **changes: Any) -> Path:
    student = {"dtype": "float32", "init": INIT | changes}
    return write_recipe(project, name, student=student, filters={"learn": "always", "steps": 2}, **SHORT)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of six blocks; `whole` is a run of two ranks that nobody disturbed."""
    project = make_project(tmp_path_factory.mktemp("iterative"), blocks=BLOCKS)
    run(2, rounds_recipe(project, "whole"), logs=project / "logs/whole")
    return project


def rounds(folder: Path) -> list[dict[str, Any]]:
    found: dict[str, Any] = json.loads((folder / "rounds/rounds.json").read_text())
    assert found["score"] == "validation_loss"
    return list(found["rounds"])


def test_each_round_cuts_heals_and_hands_over(project: Path) -> None:
    folder, done = project / "whole", rounds(project / "whole")
    assert [one["blocks"] for one in done] == [5, 4]
    assert all(one["tokens"] == 4 * 4 * 12 for one in done)
    assert (folder / "rounds/rounds.png").stat().st_size > 1000
    removed = [block for one in done for block in one["removed"]]
    last = json.loads((folder / "calibration/blocks.json").read_text())["kept"]
    there = [block for block in range(BLOCKS) if block not in removed]
    kept = [there[i] for i in last]
    # the pairs are matched over all rounds, in the teacher's own numbers
    pairs = json.loads((folder / "teacher_filters/filters.json").read_text())["plan"]["blocks"]
    assert pairs == [block - 1 for block in kept[1:]]  # the last pair is left out
    # the second round begins with what the first one left
    first, second = folder / "rounds/01", folder / "rounds/02"
    kept_there = json.loads((second / "calibration/blocks.json").read_text())["kept"]
    healed, cut = (load_file(f / "model.safetensors") for f in (first / "student", second / "initial_student"))
    weight = "self_attn.q_proj.weight"
    for i, block in enumerate(kept_there):
        assert cut[f"model.layers.{i}.{weight}"].equal(healed[f"model.layers.{block}.{weight}"])
    teacher = load_file(project / "teacher/model.safetensors")
    assert not healed[f"model.layers.0.{weight}"].equal(teacher[f"model.layers.{there[0]}.{weight}"])


def test_killed_inside_and_between_rounds_it_goes_on(project: Path) -> None:
    recipe, folder, logs = rounds_recipe(project, "killed"), project / "killed", project / "logs/killed"
    between = (folder / "rounds/01/summary.json").exists
    inside = (folder / "rounds/02/checkpoints/latest").exists
    for happened in ("the teacher reads a sample", between, inside):
        ranks = Ranks(2, logs, recipe)
        ranks.wait_for(happened)
        ranks.send(signal.SIGKILL)
        assert -signal.SIGKILL in ranks.wait()
        assert not (folder / "rounds/rounds.json").exists()
        if isinstance(happened, str):
            assert not (folder / "rounds/01/calibration").exists()
    run(2, recipe, logs=logs)
    assert rounds(folder) == rounds(project / "whole")
    assert recorded(folder) == recorded(project / "whole")


def test_without_a_round_between_it_is_greedy(project: Path) -> None:
    run(1, rounds_recipe(project, "one", round_blocks=3), logs=project / "logs/one")
    assert not (project / "one/rounds").exists()
    assert (project / "one/summary.json").exists()


def test_a_student_out_of_another_model_has_no_matched_pairs(project: Path) -> None:
    init = {"model": str(project / "whole/student"), "num_blocks": 2}
    recipe = write_recipe(project, "other", student={"dtype": "float32", "init": init}, **SHORT)
    run(1, recipe, "--filters.layer_map=null", logs=project / "logs/other")
    blocks = json.loads((project / "other/teacher_filters/filters.json").read_text())["plan"]["blocks"]
    assert blocks == [2, 5]  # uniform
    ranks = Ranks(
        1, project / "logs/matched", recipe, "--filters.layer_map=matched", "--output_dir=" + str(project / "m")
    )
    assert ranks.wait() == [2]
    assert "matched needs a student that was cut from the teacher" in ranks.said()
