"""A rank that is killed, hangs or fails: the others end in time, name it, and leave nobody behind."""

from __future__ import annotations

import multiprocessing as mp
import os
import re
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.elastic.utils.distributed import get_free_port

from ted_ds.job.lost_ranks import RankWatch
from tests.faults.patches import bad_rows, errs, hangs, has_a_bug, waits_for
from tests.faults.ranks import Ranks, latest_is_whole, recorded, run
from tests.marks import slow

Disturbed = Callable[..., tuple[Path, Path]]

TIMEOUT_S = 8.0
LEAVING_S = 15.0
"""For five seconds a rank that failed in a collective looks who else did; the rest is two cores that others use too."""

LIMIT = f"--train.timeout_minutes={TIMEOUT_S / 60}"


def ended(ranks: Ranks, survivors: list[int]) -> str:
    """What the survivors said as they ended with the code of a lost rank, in time."""
    codes = []
    for rank in survivors:
        ranks.processes[rank].join(TIMEOUT_S + LEAVING_S)
        codes.append(ranks.processes[rank].exitcode)
    assert codes == [76] * len(survivors), (codes, ranks.said())
    said = ranks.said(*survivors)
    ranks.send(signal.SIGKILL)
    ranks.wait()
    return said


@pytest.mark.parametrize("lost", [0, slow(1)])
def test_a_killed_rank_is_named(fault_project: Path, disturbed: Disturbed, lost: int) -> None:
    recipe, logs = disturbed(f"lost-{lost}")
    ranks = Ranks(2, logs, recipe, LIMIT)
    ranks.wait_for(lambda: (fault_project / f"lost-{lost}/checkpoints/latest").exists())
    name = f"process {ranks.processes[lost].pid}"
    ranks.send(signal.SIGKILL, lost)
    said = ended(ranks, [1 - lost])
    assert "the same command goes on from the last checkpoint" in said
    assert f"rank {lost} (" in said and name in said if lost else "rank 0" in said
    assert latest_is_whole(fault_project / f"lost-{lost}")


def test_a_stopped_process_is_named_by_the_watch(fault_project: Path, undisturbed: Any, disturbed: Disturbed) -> None:
    """SIGSTOP, as a machine that has died: its connections stay open and silent."""
    recipe, logs = disturbed("frozen")
    ranks = Ranks(3, logs, recipe, LIMIT, "--train.global_batch_size=3")
    ranks.wait_for(lambda: (fault_project / "frozen/teacher_filters.tmp/checkpoints/latest").exists())
    ranks.send(signal.SIGSTOP, 1)
    said = ended(ranks, [0, 2])
    assert said.count("rank 1 (") == 2 and said.count("has given no sign of life for") == 2


def test_a_killed_rank_among_many_is_named_alone(tmp_path: Path) -> None:
    """In a ring its two neighbours alone fail in the collective; the others wait, and are alive."""
    context = mp.get_context("forkserver")
    port = get_free_port()
    logs = [tmp_path / str(rank) for rank in range(8)]
    ranks = [context.Process(target=ring, args=(rank, port, str(log))) for rank, log in enumerate(logs)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [76] * 5 + [-signal.SIGKILL] + [76] * 2
    for log in logs[:5] + logs[6:]:
        assert re.search(r"rank \d: rank 5 \(\S+, process \d+\) took no part in a collective", log.read_text())


def ring(rank: int, port: int, log: str) -> None:
    """One of eight ranks that add up numbers until rank 5 dies."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    os.environ.update(RANK=str(rank), WORLD_SIZE="8", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=30))
    watch = RankWatch(rank, 8, timedelta(seconds=30), "127.0.0.1", port)
    try:
        for step in range(1 << 20):
            torch.distributed.all_reduce(torch.ones(1000))
            if rank == 5 and step == 100:
                os.kill(os.getpid(), signal.SIGKILL)
    except RuntimeError as error:
        watch.failed(error)


def test_a_rank_that_hangs_in_python_is_named_by_those_that_waited(disturbed: Disturbed) -> None:
    recipe, logs = disturbed("hanging")
    ranks = Ranks(2, logs, recipe, LIMIT, patch=hangs)
    ranks.wait_for(lambda: "rank 1 is at step 3" in ranks.said(1))
    said = ended(ranks, [0])
    assert "rank 1 (" in said and "took no part in a collective: it died, hangs or is cut off" in said


def test_a_rank_that_fails_says_why_and_the_others_quote_it(disturbed: Disturbed) -> None:
    recipe, logs = disturbed("failing")
    ranks = Ranks(2, logs, recipe, LIMIT, patch=has_a_bug)
    assert ranks.wait() == [76, 1], ranks.said()
    assert "ZeroDivisionError: a bug" in ranks.said(1) and "Traceback" in ranks.said(1)
    assert "ended by ZeroDivisionError: a bug; the same command goes on" in ranks.said(0)


def test_one_ranks_mistake_ends_all_with_its_code(disturbed: Disturbed) -> None:
    """So that no job script starts again what a person has to mend."""
    recipe, logs = disturbed("erring")
    ranks = Ranks(2, logs, recipe, LIMIT, patch=errs)
    assert ranks.wait() == [2, 2], ranks.said()
    assert "ended by DataError: row 7 is no text: mend it" in ranks.said(0)


def test_a_run_that_is_suspended_as_a_whole_goes_on(
    fault_project: Path, undisturbed: Any, disturbed: Disturbed
) -> None:
    """For longer than a rank may give no sign of life: no rank is missed by another that slept too."""
    recipe, logs = disturbed("suspended")
    ranks = Ranks(2, logs, recipe, LIMIT)
    ranks.wait_for((fault_project / "suspended/checkpoints/latest").exists)
    ranks.send(signal.SIGSTOP)
    time.sleep(0.75 * TIMEOUT_S)
    ranks.send(signal.SIGCONT)
    assert ranks.wait() == [0, 0], ranks.said()
    assert recorded(fault_project / "suspended") == undisturbed


def test_two_runs_in_one_folder_and_a_lock_that_dies_with_its_holder(fault_project: Path, disturbed: Disturbed) -> None:
    recipe, logs = disturbed("crowded")
    first = Ranks(2, logs, recipe, patch=waits_for_nothing)
    first.wait_for("rank 0 is at step 3")
    said = run(1, recipe, logs=logs.with_name("second"), codes=(2,))
    assert f"{fault_project / 'crowded'} has a run going on (it holds run.lock): wait until its processes have" in said
    first.send(signal.SIGKILL)
    first.wait()
    third = Ranks(2, logs, recipe)
    third.wait_for("Stage I: teacher filters")
    third.send(signal.SIGKILL)
    third.wait()


def waits_for_nothing(rank: int) -> None:
    waits_for(Path("/nonexistent"), rank)


def test_bad_rows_are_left_out_and_named(fault_project: Path, disturbed: Disturbed, tmp_path: Path) -> None:
    recipe, logs = disturbed("spoilt", method="kd")
    ranks = Ranks(2, logs, recipe, patch=bad_rows)
    assert ranks.wait() == [0, 0], ranks.said()
    said = ranks.said(0)
    for number, step in enumerate((4, 6), 1):
        assert f"not finite at step {step} on rank 1, training rows " in said
        assert f": left out, {number} of train.max_skipped_steps 5" in said
    lines = recorded(fault_project / "spoilt")["Stage II"]
    assert [line["step"] for line in lines if line.get("loss", 0.0) is None] == [4, 6]
    assert lines[-1]["skipped_steps"] == 2 and lines[-1]["loss"] < lines[1]["loss"]
    strict = Ranks(2, logs, recipe, f"--output_dir={tmp_path}", "--train.max_skipped_steps=1", patch=bad_rows)
    assert strict.wait() == [2, 2], strict.said()
    assert "not finite at step 6 on rank 1, training rows " in strict.said(0)
    assert (tmp_path / "checkpoints/latest").read_text() == "step-00000003"
