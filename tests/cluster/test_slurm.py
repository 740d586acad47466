"""Jobs on a real SLURM of two nodes, by the scripts in launchers/slurm, as users submit them."""

from __future__ import annotations

import csv
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.faults.ranks import recorded, run
from tests.project import make_project, write_recipe
from tests.slurm import Slurm, running_slurm, why_not

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
SMALL = ["--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--time=10"]
STOPPED = 75


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if reason := why_not():
        pytest.skip(reason)
    with running_slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_project(tmp_path_factory.mktemp("jobs"))


def submit(slurm: Slurm, project: Path, *words: object) -> str:
    """The id of a job submitted from the project's folder; its nodes' names resolve nowhere, hence the address."""
    variables = {"TED_DS_HOME": str(ROOT), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join([str(BIN), os.environ["PATH"]])
    return slurm.call("sbatch", "--parsable", *SMALL, *words, cwd=project, PATH=path, **variables)


def wait_for(happened: Callable[[], bool], job: str, slurm: Slurm, within_s: float = 150) -> None:
    deadline = time.monotonic() + within_s
    while not happened():
        assert time.monotonic() < deadline, slurm.call("scontrol", "show", "job", job)
        time.sleep(0.1)


def lines_in(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def test_a_job_that_is_requeued_and_warned_ends_as_an_undisturbed_one(slurm: Slurm, project: Path) -> None:
    script = ROOT / "launchers/slurm/pretrain.sbatch"
    changes = {"train__steps": 60, "train__save_every": 10, "data__prepared": str(project / "data")}
    run(2, write_recipe(project, "undisturbed", **changes), logs=project / "logs")

    recipe = write_recipe(project, "disturbed", **changes)
    job, metrics = submit(slurm, project, script, "--config", recipe), project / "disturbed/metrics.jsonl"
    wait_for(lambda: lines_in(metrics) > 12, job, slurm)
    slurm.call("scontrol", "requeue", job)  # as before a preemption: the ranks get SIGTERM, and 30 s
    wait_for(lambda: slurm.field(job, "Restarts") == "1" and slurm.states(job) == ["RUNNING"], job, slurm)
    before = lines_in(metrics)
    wait_for(lambda: before + 12 < lines_in(metrics) < 55, job, slurm)
    slurm.call("scancel", "--signal=USR1", job)  # as --signal does before the time limit: to the steps, not the script
    wait_for(lambda: slurm.over(job), job, slurm)
    assert slurm.states(job) == ["COMPLETED"] and slurm.field(job, "Restarts") == "2"
    said = (project / f"ted_ds-{job}.log").read_text()
    assert said.count("ranks: 2, nodes: n[1-2]") == 3  # appended by each start
    assert f"exit code {STOPPED}: back into the queue, restart 2 of at most 20" in said
    for rank in (0, 1):  # one on each node, each with a log to which every start appends
        said = (project / f"runs/slurm/{job}/rank-{rank}.log").read_text()
        assert "SIGTERM" in said and "SIGUSR1" in said and "Traceback" not in said
    assert recorded(project / "disturbed") == recorded(project / "undisturbed")


@pytest.mark.slow
def test_an_array_leaves_a_table_and_what_was_cancelled_is_missing_until_it_is_run(slurm: Slurm, project: Path) -> None:
    script = ROOT / "launchers/slurm/sweep.sbatch"
    changes = {"train__steps": 3, "filters__steps": 3, "data__prepared": str(project / "data")}
    grid = project / "grid.yaml"
    settings = {"method": ["kd", "ted"], "seed": [0, 1]}
    recipe = write_recipe(project, "swept", **changes)
    grid.write_text(yaml.safe_dump({"config": str(recipe), "output_dir": str(project / "sweep"), "grid": settings}))

    array = submit(slurm, project, "--array=0-3", script, grid)
    wait_for((project / "sweep/method=ted,seed=0/config.yaml").exists, array, slurm)
    slurm.call("scancel", f"{array}_2")  # its rank saves and ends with 75, but the job is not to come back
    wait_for(lambda: slurm.over(array), array, slurm)
    assert sorted(slurm.states(array)) == ["CANCELLED", "COMPLETED", "COMPLETED", "COMPLETED"]
    missing = ted_ds(slurm, "sweep", grid, "--missing")
    assert missing == "2"

    rest = submit(slurm, project, f"--array={missing}", script, grid)
    wait_for(lambda: slurm.over(rest), rest, slurm)
    assert ted_ds(slurm, "sweep", grid, "--missing") == ""
    ted_ds(slurm, "report", "--sweep", grid, "--csv", project / "table.csv", "--png", project / "table.png")
    with (project / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sorted((row["method"], row["runs"]) for row in rows) == [("kd", "2"), ("ted", "2")]
    assert (project / "table.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_benchmark_leaves_a_table_over_nodes(slurm: Slurm, project: Path) -> None:
    recipe = write_recipe(project, "measured", method="kd", data__prepared=str(project / "data"))
    job = submit(slurm, project, ROOT / "launchers/slurm/benchmark.sbatch", "--config", recipe, "--steps", "1")
    wait_for(lambda: slurm.over(job), job, slurm)
    assert slurm.states(job) == ["COMPLETED"], (project / f"ted_ds-{job}.log").read_text()
    said = (project / f"runs/slurm/{job}/rank-0.log").read_text()
    table = said[said.index("efficiency") :].splitlines()
    assert [line.split()[0] for line in table[1:3]] == ["1", "2"]
    assert {file.name for file in (project / "measured/bench").iterdir()} == {
        *("ranks-1.json", "ranks-1.png", "ranks-2.json", "ranks-2.png", "scaling.png")
    }


def ted_ds(slurm: Slurm, *words: object) -> str:
    return slurm.call(sys.executable, "-m", "ted_ds.cli.main", *words, cwd=ROOT)
