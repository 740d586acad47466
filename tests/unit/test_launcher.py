"""Each launcher is one file for bash and for Python; a stub stands for the command behind it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

STUB = """
import json, os, sys

def main(arguments):
    tools_first = os.environ["PATH"].startswith(os.path.dirname(sys.executable) + os.pathsep)
    line = {"rank": os.environ.get("RANK"), "arguments": arguments, "tools_first": tools_first}
    sys.stdout.write(json.dumps(line) + "\\n")
    return 0
"""

ARGUMENTS = ["--config", "a recipe.yaml", "--data.train=['a b.txt', \"$HOME\"]", "--student.model="]
"""Spaces, both quotes, a dollar and an empty value: what a shell in between would spoil."""


@pytest.fixture(params=["pretrain", "finetune", "bench"])
def clone(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A copy of one launcher, as `launchers/it.sh`, in a clone whose command prints what it was called with."""
    root = tmp_path / "a clone"
    (root / "ted_ds/cli").mkdir(parents=True)
    (root / f"ted_ds/cli/{request.param}.py").write_text(STUB)
    (root / "launchers").mkdir()
    shutil.copy(ROOT / f"launchers/{request.param}.sh", root / "launchers/it.sh")
    shutil.copy(ROOT / "launchers/start.sh", root / "launchers")
    return root


def make_tools(folder: Path) -> Path:
    """A folder with python3 and a `deepspeed` that starts one rank as DeepSpeed's launcher does."""
    folder.mkdir(parents=True)
    wrapper = f'#!/bin/sh\nexec {sys.executable} "$@"\n'
    deepspeed = (
        "#!/usr/bin/env bash\n"
        'options=(); while [[ "$1" == --* ]]; do options+=("$1" "$2"); shift 2; done\n'
        'echo "options ${options[*]}"; script="$1"; shift\n'
        f'RANK=0 exec {sys.executable} -u "$script" --local_rank=0 "$@"\n'
    )
    for name, text in {"python3": wrapper, "deepspeed": deepspeed}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def call(command: list[str | Path], *, path: Path | None = None, **variables: str) -> list[str]:
    """The command's lines, run elsewhere with no rank in the environment and `path` first on PATH."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH", "TED_DS_RANKS")
    environment = {k: v for k, v in os.environ.items() if k not in names} | variables
    environment["PATH"] = os.pathsep.join([*([str(path)] if path else []), "/usr/bin", "/bin"])
    done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def calls(lines: list[str]) -> list[dict[str, object]]:
    return sorted((json.loads(line) for line in lines if line.startswith("{")), key=lambda c: str(c["rank"]))


def test_torchrun_starts_it_on_every_rank(clone):
    script = clone / "launchers/it.sh"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    lines = call([*launch, script, *ARGUMENTS])
    assert calls(lines) == [{"rank": r, "arguments": ARGUMENTS, "tools_first": True} for r in ("0", "1")]


@pytest.mark.parametrize("how", [["bash"], []], ids=["bash", "./"])
def test_bash_starts_deepspeed_with_the_ranks_asked_for(clone, tmp_path, how):
    tools = make_tools(tmp_path / "tools")
    script = clone / "launchers/it.sh"
    lines = call([*how, script, *ARGUMENTS], path=tools, TED_DS_RANKS="2", MASTER_PORT="29511")
    assert lines[0] == "options --num_gpus 2 --master_port 29511"
    assert calls(lines) == [{"rank": "0", "arguments": ["--local_rank=0", *ARGUMENTS], "tools_first": True}]


def test_without_a_number_of_ranks_the_choice_is_deepspeeds(clone, tmp_path):
    lines = call(["bash", clone / "launchers/it.sh"], path=make_tools(tmp_path / "tools"))
    assert lines[0] == "options "


def test_a_clones_own_environment_serves_where_path_has_none(clone):
    make_tools(clone / ".venv/bin")
    assert calls(call(["bash", clone / "launchers/it.sh", "x"]))[0]["arguments"] == [
        "--local_rank=0",
        "x",
    ]


def test_run_directly_by_a_launcher_it_is_a_rank(clone, tmp_path):
    """As under `deepspeed --no_python` and `torchrun --no-python`, which execute the file itself."""
    lines = call([clone / "launchers/it.sh", *ARGUMENTS], path=make_tools(tmp_path / "tools"), RANK="1")
    assert calls(lines) == [{"rank": "1", "arguments": ARGUMENTS, "tools_first": True}]


def test_without_an_environment_it_says_how_to_make_one(clone):
    done = subprocess.run(
        ["bash", clone / "launchers/it.sh"],
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    remedy = "activate the environment that has it, or run make venv"
    assert done.stderr == f"deepspeed is neither on PATH nor in {clone}/.venv: {remedy}\n"
