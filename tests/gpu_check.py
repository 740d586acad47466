"""What only a machine with a GPU can show, end to end: `python -m tests.gpu_check OUT`, about 4 minutes.

The tests on the GPU, and small runs by the launchers: ZeRO-3 in float32 against the same run on the CPU, each method in
bfloat16, a teacher's cache, SIGTERM and resume, a checkpoint of two CPU ranks continued on the GPU, a labelled task,
`ted-ds evaluate` and `doctor`, waits for the device in a micro-batch. It needs no network and no data.

Checks run side by side, each with a time limit of its own; one that fails does not end the others. OUT gets
summary.txt (a line a check, as it ends) and logs.txt. `--device cpu` rehearses all of it without a GPU. The exit code
is not 0 if a check failed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.faults.ranks import recorded
from tests.project import make_project, write_recipe
from tests.side_by_side import PYTHON, Action, Check, CheckError, Checks, Plan
from tests.task_project import make_task_project, write_task_recipe

NEAR = 1e-4
"""Relative: what another order of float32 sums may do to losses over a short run."""

WAITS = re.compile(r"^(\w+): waits of a step: (.*)$", re.MULTILINE)
"""What `benchmarks.engine --waits` says of a mode."""

RUN: dict[str, Any] = {
    "train__steps": 60,
    "train__save_every": 10,
    "train__evaluate_every": 20,
    "filters__steps": 10,
    "optimizer__learning_rate": 0.002,
    "filters__learning_rate": 0.002,
}


def furthest(found: dict[str, list[dict[str, Any]]], expected: dict[str, list[dict[str, Any]]]) -> float:
    """The largest relative difference between two recorded runs; raises CheckError if they differ in their lines."""
    worst = 0.0
    for stage, lines in expected.items():
        if len(found[stage]) != len(lines):
            raise CheckError(f"{stage}: {len(found[stage])} lines, expected {len(lines)}")
        for line, other in zip(lines, found[stage], strict=True):
            if line.keys() != other.keys():
                raise CheckError(f"{stage}, step {line['step']}: other fields")
            for name, value in line.items():
                one, two = (value, other[name]) if isinstance(value, list) else ([value], [other[name]])
                for wanted, got in zip(one, two, strict=True):
                    if isinstance(wanted, float) and isinstance(got, float):
                        difference = abs(got - wanted) / max(abs(wanted), 1e-30)
                        worst = max(worst, math.inf if math.isnan(difference) else difference)
                    elif wanted != got:
                        raise CheckError(f"{stage}, step {line['step']}: {name} is {got}, expected {wanted}")
    return worst


def compared(found: Path, expected: Path, limit: float) -> str:
    """Raises CheckError if two runs' lines differ by more than `limit`, relatively."""
    worst = furthest(recorded(found), recorded(expected))
    if not worst <= limit:
        raise CheckError(f"differs from {expected.name} by {worst:.1e}, at most {limit:.0e} is allowed")
    return f"{worst:.1e} of {expected.name}"


def scores(text: str) -> dict[str, Any]:
    """The JSON that a command printed last."""
    found: dict[str, Any] = json.loads(text[text.rindex("\n{\n") :].partition("\n}")[0] + "\n}")
    return found


def pytest_check(*arguments: str, processes: int = 0) -> Action:
    """Tests; processes: of pytest-xdist. Other versions of libraries may warn of other things."""

    def check(check: Check) -> str:
        options = ["-q", "-rs", "-W", "default", "-p", "no:cacheprovider"]
        split = ["-n", processes] if processes else []
        check.run(PYTHON, "-m", "pytest", *options, *split, *arguments)
        return check.said().strip().splitlines()[-1].strip("= ")

    return check


class Scenarios:
    """What is checked, on a project of its own in `folder`."""

    def __init__(self, folder: Path, device: str) -> None:
        self._device = device
        self._project = make_project(folder / "lm")
        self._task = make_task_project(folder / "sst2", "sst2")

    def recipe(self, name: str, **changes: Any) -> Path:
        return write_recipe(self._project, name, **(RUN | {"data__prepared": str(self._project / "data")} | changes))

    def machine(self, check: Check) -> str:
        if self._device == "cuda":
            check.run("nvidia-smi")
        check.run(PYTHON, "-m", "ted_ds.cli.main", "doctor", "--config", self.recipe("doctor"))
        return "doctor has no FAIL"

    def cpu_operator(self, check: Check) -> str:
        code = "from ted_ds.job.world import init_world, shut_down; shut_down(init_world())"
        check.run(PYTHON, "-c", code, cpu=True)
        return "DeepSpeed's operator for CPU ranks is built"

    def base(self, check: Check) -> str:
        check.launch("pretrain", self.recipe("base"))
        last = recorded(self._project / "base")["Stage II"][-1]
        return f"ZeRO-3, float32, both stages: loss {last['loss']:.6g} at step {last['step']}"

    def same_on_cpu(self, check: Check) -> str:
        check.run(PYTHON, "launchers/pretrain.sh", "--config", self.recipe("cpu"), cpu=True)
        return compared(self._project / "base", self._project / "cpu", NEAR)

    def again(self, check: Check) -> str:
        check.run(PYTHON, "launchers/pretrain.sh", "--config", self.recipe("again"))
        return compared(self._project / "again", self._project / "base", 0.0)

    def stop(self, check: Check) -> str:
        path = self.recipe("stop")
        check.stop_after(f"saved {self._project / 'stop/checkpoints'}/", check.ranks(1, path))
        check.end(*check.ranks(1, path))
        return compared(self._project / "stop", self._project / "base", 0.0)

    def elastic(self, check: Check) -> str:
        path = self.recipe("elastic", train__micro_batch_size=2)
        check.stop_after(f"saved {self._project / 'elastic/checkpoints'}/", check.ranks(2, path, cpu=True))
        check.end(*check.ranks(1, path))
        if "was written by 2 ranks: converting it for 1" not in check.said():
            raise CheckError("nothing was converted")
        return compared(self._project / "elastic", self._project / "base", NEAR)

    def in_bfloat16(self, method: str, **changes: Any) -> Action:
        def check(check: Check) -> str:
            types = {"student__dtype": "bfloat16", "teacher__dtype": "bfloat16", "method": method}
            check.launch("pretrain", self.recipe(check.name, **types, **changes))
            losses = [line["loss"] for line in recorded(self._project / check.name)["Stage II"] if "loss" in line]
            if not all(map(math.isfinite, losses)):
                raise CheckError(f"losses are not finite: {losses}")
            return f"loss {losses[0]:.4g} to {losses[-1]:.4g}"

        return check

    def cache(self, check: Check) -> str:
        for name in ("records", "reads"):
            path = self.recipe(name, teacher__cache=str(self._project / "cache"))
            check.run(PYTHON, "launchers/pretrain.sh", "--config", path)
        stages = {"Stage II": recorded(self._project / "base")["Stage II"]}
        worst = max(furthest(recorded(self._project / name), stages) for name in ("records", "reads"))
        if worst > (NEAR if self._device == "cuda" else 0):
            raise CheckError(f"differs from the live teacher by {worst:.1e}")
        return f"{worst:.1e} of the live teacher"

    def evaluate(self, check: Check) -> str:
        data = ["--data", self._project / "validation.txt", "--sequence-length", 12]
        found = []
        for cpu in (False, True):
            check.run(PYTHON, "-m", "ted_ds.cli.main", "evaluate", self._project / "base/student", *data, cpu=cpu)
            found.append(scores(check.said())["perplexity"])
        if abs(found[0] / found[1] - 1) > NEAR:
            raise CheckError(f"perplexity {found[0]} here, {found[1]} on the CPU")
        return f"perplexity {found[0]:.6g}, on the CPU {found[1]:.6g}"

    def finetune(self, check: Check) -> str:
        options = {"deepspeed": "ds_configs/zero0.json", "teacher__sharding": "replicated"}
        check.launch("finetune", write_task_recipe(self._task, "sst2", "here", **options))
        path = write_task_recipe(self._task, "sst2", "cpu", **options)
        check.run(PYTHON, "launchers/finetune.sh", "--config", path, cpu=True)
        check.run(
            *(PYTHON, "-m", "ted_ds.cli.main", "evaluate", self._task / "here/student", "--task", "sst2"),
            *("--data", self._task / "validation.tsv", "--sequence-length", 32),
        )
        best = max(line.get("validation_accuracy", 0) for line in recorded(self._task / "here")["Stage II"])
        if abs(scores(check.said())["accuracy"] - best) > 1e-6:
            raise CheckError(f"the student scores {scores(check.said())['accuracy']}, its run had {best}")
        return f"accuracy {best:.4f}; {compared(self._task / 'here', self._task / 'cpu', 10 * NEAR)}"

    def waits(self, check: Check) -> str:
        check.run(
            PYTHON, "-m", "benchmarks.engine", "--device", self._device, "--size", "tiny", "--steps", 4, "--waits"
        )
        return "of a step: " + "; ".join(" ".join(found) for found in WAITS.findall(check.said()))

    def all(self) -> Plan:
        """Every check."""
        workers = 5 if self._device == "cuda" else 0
        offload: dict[str, Any] = {"deepspeed": "ds_configs/zero3_offload.json", "train__steps": 4}
        offload["data__prepared"] = str(self._project / "data-of-offload")  # it does not wait for base
        return {
            "cpu-operator": (150, (), self.cpu_operator),
            "base": (120, (), self.base),
            "tests-gpu": (120, (), pytest_check("-m", "requires_gpu", "tests/kernels/test_gpu_step.py")),
            "waits": (100, (), self.waits),
            "offload": (190, (), self.in_bfloat16("kd", **offload)),
            "tests-kernels": (190, (), pytest_check("-m", "not requires_gpu", "tests/kernels", processes=workers)),
            "kd": (100, ("base",), self.in_bfloat16("kd", teacher__sharding="replicated")),
            "lwd": (100, ("base",), self.in_bfloat16("lwd", student__activation_checkpointing=True)),
            "ted": (100, ("base",), self.in_bfloat16("ted")),
            "again": (100, ("base",), self.again),
            "stop": (120, ("base",), self.stop),
            "cache": (120, ("base",), self.cache),
            "machine": (100, ("base",), self.machine),
            "cpu": (120, ("base", "cpu-operator"), self.same_on_cpu),
            "elastic": (150, ("base", "cpu-operator"), self.elastic),
            "finetune": (150, ("cpu-operator",), self.finetune),
            "evaluate": (100, ("base", "cpu-operator"), self.evaluate),
            "tests-unit": (190, (), pytest_check("tests/unit", processes=workers)),
        }


def main() -> int:
    """Runs the checks; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of summary.txt and logs.txt")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--seconds", type=float, default=240, help="everything is over by then")
    parser.add_argument("--only", nargs="+", metavar="CHECK", help="these, and what they wait for")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        checks = Scenarios(Path(name), options.device).all()
        if options.only:
            wanted = {*options.only, *(need for check in options.only for need in checks[check][1])}
            checks = {name: check for name, check in checks.items() if name in wanted}
        every = Checks(options.out, Path(name), options.device)
        every.run(checks, 16 if options.device == "cuda" else 2, deadline)
    print(f"{len(checks) - len(every.failed)} passed, {len(every.failed)} failed: {' '.join(every.failed)}")
    return 1 if every.failed else 0


if __name__ == "__main__":
    sys.exit(main())
