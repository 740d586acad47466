"""A checkpoint of n ranks continues on m: by DeepSpeed's universal checkpoints, converted once."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.faults.ranks import TORTURE, Ranks, assert_near, recorded, run
from tests.marks import slow
from tests.project import write_recipe

STOPS = {"teacher_filters.tmp": (2, 1), "student_filters.tmp": (1, 4), ".": (4, 2)}
"""Where a run of so many ranks is stopped, and how many take a step each after it."""
if TORTURE > 1:
    STOPS = dict.fromkeys(STOPS, (2, 1, 4, 2))

HOW = ("--train.micro_batch_size", "--student.activation_checkpointing=true", "--teacher.sharding=replicated")
"""What else may be another: how a step is computed."""

OTHERS = [slow(0, "bfloat16"), (2, "float32"), slow(3, "bfloat16")]
if TORTURE > 1:
    OTHERS = [(stage, dtype) for stage in range(4) for dtype in ("float32", "bfloat16")]

Disturbed = Callable[..., tuple[Path, Path]]


def test_a_run_goes_on_with_other_numbers_of_ranks_and_micro_batches_in_every_stage(
    fault_project: Path, undisturbed: Any, disturbed: Disturbed
) -> None:
    recipe, logs = disturbed("elastic")
    for stage, sizes in STOPS.items():
        ranks = Ranks(sizes[0], logs, recipe)
        ranks.wait_for(f"saved {fault_project / 'elastic' / stage / 'checkpoints'}/")
        ranks.send(signal.SIGTERM)
        assert set(ranks.wait()) == {75}, ranks.said()
        for before, size in pairwise(sizes):
            how = (f"{HOW[0]}={4 // size}", *HOW[1:])
            said = run(size, recipe, "--train.max_minutes=0.0001", *how, logs=logs, codes=(75,))
            assert f"was written by {before} ranks: converting it for {size}" in said
    run(2, recipe, logs=logs)
    assert_near(recorded(fault_project / "elastic"), undisturbed)
    assert not list(fault_project.glob("elastic/**/*universal*"))


@pytest.mark.parametrize(("stage", "dtype"), OTHERS)
def test_other_zero_stages_go_on_too(fault_project: Path, tmp_path: Path, stage: int, dtype: str) -> None:
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    common = {
        "method": "kd",
        "optimizer__schedule": "constant",
        "student__dtype": dtype,
        "deepspeed": str(file),
        "data__prepared": str(tmp_path / "data"),
    }
    whole, halved = (write_recipe(fault_project, f"zero-{stage}-{dtype}-{n}", **common) for n in ("whole", "halved"))
    logs = fault_project / "logs/zero"
    run(2, whole, logs=logs)
    run(2, halved, "--train.steps=5", logs=logs)
    run(1, halved, logs=logs)
    # sums of bfloat16 gradients over one rank and over two are not rounded alike
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    assert_near(*(recorded(fault_project / path.stem) for path in (halved, whole)), tolerance=tolerance)
