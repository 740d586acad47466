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
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.ranks import recorded
from tests.project import make_project, write_recipe
from tests.task_project import make_task_project, write_task_recipe

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
ON_CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
NEAR = 1e-4
"""Relative: what another order of float32 sums may do to losses over a short run."""

RUN: dict[str, Any] = {
    "train__steps": 60,
    "train__save_every": 10,
    "train__evaluate_every": 20,
    "filters__steps": 10,
    "optimizer__learning_rate": 0.002,
    "filters__learning_rate": 0.002,
}


class CheckError(Exception):
    """What a check found wrong, in one line."""


@dataclass
class Check:
    """One check while it runs: its log and its deadline; device: where what it starts runs, unless told `cpu`."""

    name: str
    device: str
    log: Path
    deadline: float
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, *command: object, cpu: bool = False, **environment: object) -> subprocess.Popen[bytes]:
        """Starts a command in a session of its own; its output goes to the check's log."""
        with self.log.open("ab") as log:
            log.write(f"$ {' '.join(map(str, command))}\n".encode())
            log.flush()
            given = {name: str(value) for name, value in environment.items()}
            process = subprocess.Popen(
                list(map(str, command)),
                cwd=ROOT,
                env=os.environ | (ON_CPU if cpu or self.device == "cpu" else {}) | given,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def end(self, *processes: subprocess.Popen[bytes], code: int = 0) -> None:
        """Waits until the deadline; raises CheckError unless all end with `code`."""
        for process in processes:
            try:
                found = process.wait(max(0.0, self.deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise CheckError("past its time limit") from None
            if found != code:
                raise CheckError(f"exit code {found} where {code} was expected")

    def run(self, *command: object, cpu: bool = False) -> None:
        """Runs a command to its end, which must be good."""
        self.end(self.start(*command, cpu=cpu))

    def launch(self, script: str, recipe: Path) -> None:
        """Runs a recipe on one rank by the deepspeed launcher."""
        launcher = [PYTHON, "-m", "deepspeed.launcher.runner", "--num_gpus", 1, "--master_port", free_port()]
        self.run(*launcher, f"launchers/{script}.sh", "--config", recipe)

    def ranks(self, size: int, recipe: Path, *, cpu: bool = False) -> list[subprocess.Popen[bytes]]:
        """Starts pretrain.sh on `size` ranks, without a launcher: a signal reaches them at once."""
        common = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        command = [PYTHON, "launchers/pretrain.sh", "--config", recipe]
        return [self.start(*command, cpu=cpu, RANK=rank, LOCAL_RANK=rank, **common) for rank in range(size)]

    def stop_after(self, text: str, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        """Sends SIGTERM once the log has `text`; the ranks must save and end with 75."""
        while text not in self.said():
            if time.monotonic() > self.deadline or all(process.poll() is not None for process in processes):
                raise CheckError(f"ended before it said {text!r}")
            time.sleep(0.005)
        for process in processes:
            process.send_signal(signal.SIGTERM)
        self.end(*processes, code=75)

    def said(self) -> str:
        """The log up to now."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def kill(self) -> None:
        """Ends whatever it started and is still there."""
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


Action = Callable[[Check], str]


class Checks:
    """All checks of a run: what they are, in what order they start, and what they wait for."""

    def __init__(self, out: Path, work: Path, device: str) -> None:
        self._out, self._work, self._device = out, work, device
        self._writing = threading.Lock()
        self._done: dict[str, Future[None]] = {}
        self.failed: list[str] = []
        (out / "summary.txt").write_bytes(b"")
        (out / "logs.txt").write_bytes(b"")

    def run(self, checks: dict[str, tuple[int, tuple[str, ...], Action]], workers: int, deadline: float) -> None:
        """Runs {name: (seconds, names that it waits for, what it does)}; a check comes after those it waits for."""
        with ThreadPoolExecutor(workers) as pool:
            for name, (seconds, needs, action) in checks.items():
                self._done[name] = pool.submit(self._one, name, seconds, needs, action, deadline)

    def _one(self, name: str, seconds: int, needs: tuple[str, ...], action: Action, deadline: float) -> None:
        for need in needs:
            self._done[need].result()
        start = time.monotonic()
        limit = seconds * (1 if self._device == "cuda" else 6)
        check = Check(name, self._device, self._work / f"{name}.log", min(start + limit, deadline))
        try:
            if lacking := [need for need in needs if need in self.failed]:
                raise CheckError(f"needs {', '.join(lacking)}")
            verdict = f"PASS  {action(check)}"
        except Exception as error:  # whatever happens in one check, the others go on
            self.failed.append(name)
            verdict = f"FAIL  {error if isinstance(error, CheckError) else repr(error)}"
        finally:
            check.kill()
        line = f"{name:<16} {time.monotonic() - start:4.0f} s  {verdict}"
        with self._writing:
            print(line, flush=True)
            with (self._out / "summary.txt").open("a") as summary, (self._out / "logs.txt").open("a") as logs:
                summary.write(line + "\n")
                logs.write(f"\n===== {line}\n{check.said()}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def furthest(found: dict[str, list[dict[str, Any]]], expected: dict[str, list[dict[str, Any]]]) -> float:
    """The largest relative difference between two recorded runs; raises CheckError where they differ in their lines."""
    worst = 0.0
    for stage, lines in expected.items():
        if len(found[stage]) != len(lines):
            raise CheckError(f"{stage}: {len(found[stage])} lines where {len(lines)} were expected")
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
    """Raises CheckError where two runs' lines differ by more than `limit`, relatively."""
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


def checks_of(folder: Path, device: str) -> dict[str, tuple[int, tuple[str, ...], Action]]:
    """Every check: (seconds, names that it waits for, what it does)."""
    project, task = make_project(folder / "lm"), make_task_project(folder / "sst2", "sst2")
    cuda = device == "cuda"

    def recipe(name: str, **changes: Any) -> Path:
        return write_recipe(project, name, **(RUN | {"data__prepared": str(project / "data")} | changes))

    def machine(check: Check) -> str:
        if cuda:
            check.run("nvidia-smi")
        check.run(PYTHON, "-m", "ted_ds.cli.main", "doctor", "--config", recipe("doctor"))
        return "doctor has no FAIL"

    def cpu_operator(check: Check) -> str:
        code = "from ted_ds.distributed import init_world, shut_down; shut_down(init_world())"
        check.run(PYTHON, "-c", code, cpu=True)
        return "DeepSpeed's operator for CPU ranks is built"

    def base(check: Check) -> str:
        check.launch("pretrain", recipe("base"))
        last = recorded(project / "base")["Stage II"][-1]
        return f"ZeRO-3, float32, both stages: loss {last['loss']:.6g} at step {last['step']}"

    def same_on_cpu(check: Check) -> str:
        check.run(PYTHON, "launchers/pretrain.sh", "--config", recipe("cpu"), cpu=True)
        return compared(project / "base", project / "cpu", NEAR)

    def again(check: Check) -> str:
        check.run(PYTHON, "launchers/pretrain.sh", "--config", recipe("again"))
        return compared(project / "again", project / "base", 0.0)

    def stop(check: Check) -> str:
        path = recipe("stop")
        check.stop_after(f"saved {project / 'stop/checkpoints'}/", check.ranks(1, path))
        check.end(*check.ranks(1, path))
        return compared(project / "stop", project / "base", 0.0)

    def elastic(check: Check) -> str:
        path = recipe("elastic", train__micro_batch_size=2)
        check.stop_after(f"saved {project / 'elastic/checkpoints'}/", check.ranks(2, path, cpu=True))
        check.end(*check.ranks(1, path))
        if "was written by 2 ranks: converting it for 1" not in check.said():
            raise CheckError("nothing was converted")
        return compared(project / "elastic", project / "base", NEAR)

    def in_bfloat16(method: str, **changes: Any) -> Action:
        def check(check: Check) -> str:
            types = {"student__dtype": "bfloat16", "teacher__dtype": "bfloat16", "method": method}
            check.launch("pretrain", recipe(check.name, **types, **changes))
            losses = [line["loss"] for line in recorded(project / check.name)["Stage II"] if "loss" in line]
            if not all(map(math.isfinite, losses)):
                raise CheckError(f"losses are not finite: {losses}")
            return f"loss {losses[0]:.4g} to {losses[-1]:.4g}"

        return check

    def cache(check: Check) -> str:
        for name in ("records", "reads"):
            path = recipe(name, teacher__cache=str(project / "cache"))
            check.run(PYTHON, "launchers/pretrain.sh", "--config", path)
        stages = {"Stage II": recorded(project / "base")["Stage II"]}
        worst = max(furthest(recorded(project / name), stages) for name in ("records", "reads"))
        if worst > (NEAR if cuda else 0):
            raise CheckError(f"differs from the live teacher by {worst:.1e}")
        return f"{worst:.1e} of the live teacher"

    def evaluate(check: Check) -> str:
        data = ["--data", project / "validation.txt", "--sequence-length", 12]
        found = []
        for cpu in (False, True):
            check.run(PYTHON, "-m", "ted_ds.cli.main", "evaluate", project / "base/student", *data, cpu=cpu)
            found.append(scores(check.said())["perplexity"])
        if abs(found[0] / found[1] - 1) > NEAR:
            raise CheckError(f"perplexity {found[0]} here, {found[1]} on the CPU")
        return f"perplexity {found[0]:.6g}, on the CPU {found[1]:.6g}"

    def finetune(check: Check) -> str:
        options = {"deepspeed": "ds_configs/zero0.json", "teacher__sharding": "replicated"}
        check.launch("finetune", write_task_recipe(task, "sst2", "here", **options))
        path = write_task_recipe(task, "sst2", "cpu", **options)
        check.run(PYTHON, "launchers/finetune.sh", "--config", path, cpu=True)
        check.run(
            *(PYTHON, "-m", "ted_ds.cli.main", "evaluate", task / "here/student", "--task", "sst2"),
            *("--data", task / "validation.tsv", "--sequence-length", 32),
        )
        best = max(line.get("validation_accuracy", 0) for line in recorded(task / "here")["Stage II"])
        if abs(scores(check.said())["accuracy"] - best) > 1e-6:
            raise CheckError(f"the student scores {scores(check.said())['accuracy']}, its run had {best}")
        return f"accuracy {best:.4f}; {compared(task / 'here', task / 'cpu', 10 * NEAR)}"

    def waits(check: Check) -> str:
        check.run(PYTHON, "-m", "benchmarks.engine", "--device", device, "--size", "tiny", "--steps", 4, "--waits")
        return check.said().strip().splitlines()[-1]

    workers = 5 if cuda else 0
    offload = {"deepspeed": "ds_configs/zero3_offload.json", "train__steps": 4}
    found: dict[str, tuple[int, tuple[str, ...], Action]] = {
        "cpu-operator": (150, (), cpu_operator),
        "base": (120, (), base),
        "tests-gpu": (120, (), pytest_check("-m", "requires_gpu", "tests/kernels/test_gpu_step.py")),
        "waits": (100, (), waits),
        "offload": (190, (), in_bfloat16("kd", **offload)),
        "tests-kernels": (190, (), pytest_check("-m", "not requires_gpu", "tests/kernels", processes=workers)),
        "kd": (100, ("base",), in_bfloat16("kd", teacher__sharding="replicated")),
        "lwd": (100, ("base",), in_bfloat16("lwd", student__activation_checkpointing=True)),
        "ted": (100, ("base",), in_bfloat16("ted", loss__residual_dtype="float8")),
        "again": (100, ("base",), again),
        "stop": (120, ("base",), stop),
        "cache": (120, ("base",), cache),
        "machine": (100, ("base",), machine),
        "cpu": (120, ("base", "cpu-operator"), same_on_cpu),
        "elastic": (150, ("base", "cpu-operator"), elastic),
        "finetune": (150, ("cpu-operator",), finetune),
        "evaluate": (100, ("base", "cpu-operator"), evaluate),
        "tests-unit": (190, (), pytest_check("tests/unit", processes=workers)),
    }
    return found


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
        checks = checks_of(Path(name), options.device)
        if options.only:
            wanted = {*options.only, *(need for check in options.only for need in checks[check][1])}
            checks = {name: check for name, check in checks.items() if name in wanted}
        every = Checks(options.out, Path(name), options.device)
        every.run(checks, 16 if options.device == "cuda" else 2, deadline)
    print(f"{len(checks) - len(every.failed)} passed, {len(every.failed)} failed: {' '.join(every.failed)}")
    return 1 if every.failed else 0


if __name__ == "__main__":
    sys.exit(main())
