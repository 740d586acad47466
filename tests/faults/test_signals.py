"""SIGTERM, SIGUSR1 and the clock: the run saves, ends with exit code 75, and goes on as if nothing had been."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.patches import slow_evaluation, slow_saving
from tests.faults.ranks import Ranks, latest_is_whole, recorded, run

Disturbed = Callable[..., tuple[Path, Path]]


def stopped(ranks: Ranks, number: int, *to: int) -> str:
    """Sends a signal to a run, which ends as documented; what it said."""
    ranks.send(number, *to)
    assert ranks.wait() == [75, 75], ranks.said()
    said = ranks.said(0)
    assert f"{signal.Signals(number).name} received: saved after step " in said and "the same command goes on" in said
    return said


def test_a_run_that_is_stopped_in_every_stage_goes_on_exactly(
    fault_project: Path, undisturbed: Any, disturbed: Disturbed
) -> None:
    recipe, logs = disturbed("stopped")
    folder = fault_project / "stopped"

    ranks = Ranks(2, logs, recipe)  # one rank alone is asked: all agree
    ranks.wait_for(lambda: (folder / "student_filters.tmp/checkpoints/latest").exists())
    assert "of 8, the same command" in stopped(ranks, signal.SIGTERM, 1)
    assert not (folder / "checkpoints").exists()

    ranks = Ranks(2, logs, recipe, patch=slow_evaluation)
    ranks.wait_for(lambda: (folder / "checkpoints/latest").exists())
    before = ranks.said(0).count("evaluating")
    ranks.wait_for(lambda: ranks.said(0).count("evaluating") > before)
    assert "saved after step 4 of 16" in stopped(ranks, signal.SIGUSR1)

    ranks = Ranks(2, logs, recipe, patch=slow_saving)
    ranks.wait_for("saving")
    assert "saved after step 6 of 16" in stopped(ranks, signal.SIGTERM)

    assert "train.max_minutes are over: saved after step 8 of 16" in run(
        2, recipe, "--train.max_minutes=0.0001", logs=logs, codes=(75,)
    )
    run(2, recipe, logs=logs)
    assert recorded(folder) == undisturbed


def test_a_second_signal_ends_a_run_at_once_and_harms_nothing(
    fault_project: Path, undisturbed: Any, disturbed: Disturbed
) -> None:
    recipe, logs = disturbed("impatient")
    folder = fault_project / "impatient"
    ranks = Ranks(2, logs, recipe, patch=slow_saving)
    ranks.wait_for(lambda: (folder / "checkpoints/latest").exists())
    said = ranks.said(0).count("saving")
    ranks.wait_for(lambda: ranks.said(0).count("saving") > said)
    for pause in (0.1, 0.3):  # within a second it is the same request, sent twice on its way
        ranks.send(signal.SIGTERM)
        time.sleep(pause)
    assert "again" not in ranks.said(0)
    time.sleep(0.8)
    ranks.send(signal.SIGTERM)
    assert ranks.wait(5) == [143, 143]
    assert "SIGTERM again: the run ends at once; the last checkpoint is whole" in ranks.said(0)
    assert latest_is_whole(folder)
    run(2, recipe, logs=logs)
    assert recorded(folder) == undisturbed


def test_a_signal_before_the_steps_ends_the_run_where_it_is(disturbed: Disturbed) -> None:
    recipe, logs = disturbed("early")
    ranks = Ranks(2, logs, recipe)
    ranks.wait_for("Stage I: teacher filters")
    ranks.send(signal.SIGTERM)
    assert ranks.wait() == [75, 75]
    assert "SIGTERM outside of the training steps: nothing is lost" in ranks.said(0)
