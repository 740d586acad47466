"""SIGKILL at random moments, again and again: `latest` is always whole, and the run ends as if nothing had been."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.faults.patches import SAVED_EVERY, dies_after_a_best
from tests.faults.ranks import TORTURE, Ranks, latest_is_whole, recorded, run
from tests.project import write_recipe
from tests.task_project import make_task_project, write_task_recipe

Disturbed = Callable[..., tuple[Path, Path]]

KILLS = 4


def half_written(folder: Path) -> set[int]:
    """Checkpoints that are being written, or that were when something was killed, by the numbers of their folders."""
    try:
        return {path.stat().st_ino for path in folder.rglob("step-*.tmp")}
    except FileNotFoundError:  # renamed meanwhile
        return set()


def kill(ranks: Ranks, draw: random.Random, folder: Path) -> str:
    """Kills one rank or all of them, at a random moment or while they save; says what was done."""
    before, saving = half_written(folder), draw.random() < 0.5
    began = time.monotonic()
    deadline = began + draw.uniform(0.2, 20.0 if saving else 7.0)
    while time.monotonic() < deadline and ranks.processes[0].is_alive():
        if saving and half_written(folder) - before:
            break
        time.sleep(0.0005)
    after, during = time.monotonic() - began, bool(half_written(folder) - before)
    victims = draw.choice([(0,), (1,), (0, 1)])
    ranks.send(signal.SIGKILL, *victims)
    codes = ranks.wait(60.0)
    assert all(code in (0, 76, -signal.SIGKILL) for code in codes), (codes, ranks.said())
    return f"ranks {victims} after {after:.2f} s{' while saving' * during}" if -signal.SIGKILL in codes else ""


@pytest.mark.timeout(300 * TORTURE)
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(
    fault_project: Path, undisturbed: Any, disturbed: Disturbed
) -> None:
    draw, kills, runs = random.Random(0), 0, 0
    while kills < KILLS * TORTURE:
        recipe, logs = disturbed(f"killed-{runs}")
        folder = fault_project / f"killed-{runs}"
        for _ in range(KILLS):
            done = kill(Ranks(2, logs, recipe, "--train.timeout_minutes=0.3"), draw, folder)
            assert latest_is_whole(folder), done
            assert all(latest_is_whole(folder / f"{side}_filters.tmp") for side in ("teacher", "student")), done
            if not done:  # it had ended before
                break
            kills += 1
            print(f"kill {kills}: {done}")
        run(2, recipe, logs=logs)
        assert recorded(folder) == undisturbed
        assert not list(folder.rglob("*.tmp"))
        runs += 1
    print(f"{kills} kills of {runs} runs, all of which ended as the undisturbed one")


def test_a_task_goes_back_to_the_best_of_its_checkpoint(tmp_path: Path) -> None:
    """Killed with a best student that its checkpoint does not know: it is found again, with the scores of all sets."""
    project = make_task_project(tmp_path, "mnli")
    settings = {
        "data__extra_validation": {"mismatched": [str(project / "train.tsv")]},
        **{"method": "kd", "loss__mse_alpha": None, "optimizer__schedule": "constant"},
        **{"train__steps": 9, "train__evaluate_every": 1, "train__save_every": SAVED_EVERY},
    }
    whole, killed = (write_task_recipe(project, "mnli", name, **settings) for name in ("whole", "killed"))
    run(2, whole, logs=tmp_path / "logs")
    assert Ranks(2, tmp_path / "logs", killed, patch=dies_after_a_best).wait() == [-signal.SIGKILL] * 2
    card = json.loads((project / "killed/best/ted_ds.json").read_text())
    assert card["best_step"] % SAVED_EVERY
    run(2, killed, logs=tmp_path / "logs")
    assert recorded(project / "killed") == recorded(project / "whole")
    names = ("summary.json", "best/ted_ds.json")
    ours, theirs = ([json.loads((project / n / name).read_text()) for name in names] for n in ("killed", "whole"))
    assert ours[1] == theirs[1] and {k: ours[0][k] for k in theirs[1]} == theirs[1]


def tokenizes(process: psutil.Process) -> bool:
    """A process that was spawned, and is there yet."""
    try:
        return "spawn_main" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


def test_a_killed_preparation_leaves_no_process_behind(tmp_path: Path, fault_project: Path) -> None:
    """Its workers hold both ends of the queue that they wait at: they have to watch their parent."""
    text = (fault_project / "train.txt").read_text()
    with (tmp_path / "long.txt").open("w") as file:
        for _ in range(1 + (33 << 20) // len(text)):
            file.write(text)
    recipe = write_recipe(
        fault_project, "orphans", data__train=[str(tmp_path / "long.txt")], data__processes=2, method="ce"
    )
    ranks = Ranks(1, fault_project / "logs/orphans", recipe)
    main = psutil.Process(ranks.processes[0].pid)
    ranks.wait_for(lambda: sum(map(tokenizes, main.children())) >= 2)
    workers = main.children(recursive=True)
    ranks.send(signal.SIGKILL)
    ranks.wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive
