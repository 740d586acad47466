"""launchers/slurm without a SLURM: stubs stand for srun and scontrol, and what the scripts make of them is seen."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ARGUMENTS = ["--config", "a recipe.yaml", "--student.model="]
ARRAY = {"SLURM_JOB_ID": "40", "SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "3"}

STUBS = {
    "srun": '#!/bin/bash\nprintf "srun"; printf " <%s>" "$@"; echo; exit "$CODE"\n',
    "scontrol": '#!/bin/bash\n[ "$1" = show ] && echo n7 || echo "scontrol $*"\n',
    "deepspeed": "#!/bin/bash\necho deepspeed\n",
    "ted-ds": "#!/bin/bash\n",
}

PRINTS_ITS_RANK = 'import os\n\ndef main(arguments):\n    print("rank", os.environ["RANK"], *arguments)\n'


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    folder = tmp_path / "tools"
    folder.mkdir()
    for name, text in STUBS.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "python3").symlink_to(sys.executable)
    return folder


def job(
    tools: Path, script: Path, *arguments: str, code: int = 0, **variables: str
) -> subprocess.CompletedProcess[str]:
    """The batch script's end where srun ends with `code`."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "TED_DS_", "MASTER_"))}
    environment |= {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "n[7-8]"}
    environment |= {"SLURM_NTASKS": "2", "CODE": str(code), "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", script, *arguments],
        cwd=tools,
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=30,
    )


def spooled(tools: Path, name: str) -> Path:
    """SLURM runs a copy of the script, far from the clone."""
    return Path(shutil.copy(ROOT / f"launchers/slurm/{name}.sbatch", tools / "slurm_script"))


@pytest.mark.parametrize("program", ["pretrain", "finetune"])
def test_the_ranks_get_the_arguments_as_they_are(tools: Path, program: str) -> None:
    words = [program, *ARGUMENTS] if program == "finetune" else ARGUMENTS
    done = job(tools, spooled(tools, "pretrain"), *words)
    assert done.returncode == 0, done.stderr
    call = done.stdout.splitlines()[1]
    assert call.endswith(f" <bash> <{ROOT}/launchers/{program}.sh> <--config> <a recipe.yaml> <--student.model=>")
    assert "<--output=runs/slurm/12/rank-%t.log>" in call and (tools / "runs/slurm/12").is_dir()


def test_a_benchmark_doubles_its_nodes_and_takes_all_in_the_end(tools: Path) -> None:
    numbers = {"SLURM_NTASKS": "12", "SLURM_JOB_NUM_NODES": "6"}
    done = job(tools, spooled(tools, "benchmark"), *ARGUMENTS, **numbers)
    assert done.returncode == 0, done.stderr
    calls = [line for line in done.stdout.splitlines() if line.startswith("srun")]
    command = f" <bash> <{ROOT}/launchers/bench.sh> <--config> <a recipe.yaml> <--student.model=>"
    assert all(call.endswith(command) for call in calls)
    for call, nodes in zip(calls, (1, 2, 4, 6), strict=True):
        assert f" <--nodes={nodes}> <--ntasks={2 * nodes}> " in call
    failed = job(tools, spooled(tools, "benchmark"), *ARGUMENTS, code=2, **numbers)
    assert failed.returncode == 2 and failed.stdout.count("srun") == 4  # what does not fit on one node may fit on two
    assert "scontrol requeue" not in failed.stdout and "1 nodes: exit code 2" in failed.stderr


@pytest.mark.parametrize(
    ("code", "restarts", "again"),
    [(0, 0, False), (2, 0, False), (1, 0, False), (75, 0, True), (76, 4, True), (137, 0, True), (75, 5, False)],
)
def test_what_can_go_on_goes_back_into_the_queue(tools: Path, code: int, restarts: int, again: bool) -> None:
    limits = {"SLURM_RESTART_COUNT": str(restarts), "TED_DS_RESTARTS": "5"}
    done = job(tools, spooled(tools, "pretrain"), *ARGUMENTS, code=code, **limits)
    assert done.returncode == code
    assert ("scontrol requeue 12" in done.stdout) == again
    assert ("submit it again to go on" in done.stderr) == (code == 75 and restarts == 5)


def test_an_index_of_an_array_goes_back_alone(tools: Path) -> None:
    done = job(tools, spooled(tools, "sweep"), "grid.yaml", "--train.steps=3", code=75, **ARRAY)
    assert "<ted-ds> <sweep> <grid.yaml> <--train.steps=3> <--index> <3>" in done.stdout
    assert "<--output=runs/slurm/40_3/rank-%t.log>" in done.stdout
    assert done.stdout.splitlines()[-1] == "scontrol requeue 40_3"  # 40 alone would be all indices


def test_a_submission_from_elsewhere_says_what_is_missing(tools: Path) -> None:
    script = spooled(tools, "pretrain")
    done = job(tools, script, SLURM_SUBMIT_DIR=str(tools))
    remedy = "submit from the clone, or set TED_DS_HOME=CLONE"
    assert (done.returncode, done.stderr) == (2, f"{tools} is no clone of ted_ds: {remedy}\n")
    assert job(tools, script, SLURM_SUBMIT_DIR=str(tools), TED_DS_HOME=str(ROOT)).returncode == 0
    done = job(tools, spooled(tools, "sweep"), "grid.yaml")
    assert (done.returncode, done.stderr.split(":")[0]) == (2, "no job array")


@pytest.mark.parametrize(
    ("tasks", "variables", "said"),
    [("2", {}, "rank 1 x"), ("2", {"RANK": "5"}, "rank 5 x"), ("1", {}, "deepspeed"), ("", {}, "deepspeed")],
)
def test_a_task_among_others_is_a_rank_without_a_launcher(
    tools: Path, tmp_path: Path, tasks: str, variables: dict[str, str], said: str
) -> None:
    """One task alone may be an interactive shell, in which deepspeed's launcher is wanted."""
    (tmp_path / "clone/ted_ds/cli").mkdir(parents=True)
    (tmp_path / "clone/ted_ds/cli/pretrain.py").write_text(PRINTS_ITS_RANK)
    (tmp_path / "clone/launchers").mkdir()
    for name in ("pretrain.sh", "start.sh"):
        shutil.copy(ROOT / "launchers" / name, tmp_path / "clone/launchers")
    step = {"SLURM_STEP_NUM_TASKS": tasks, "SLURM_PROCID": "1"} if tasks else {"SLURM_PROCID": "0"}
    done = job(tools, tmp_path / "clone/launchers/pretrain.sh", "x", **step, **variables)
    assert done.stdout.splitlines() == [said], done.stderr
