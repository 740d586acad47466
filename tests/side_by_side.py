"""Checks that start programs: side by side, each with a time limit and a log of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from torch.distributed.elastic.utils.distributed import get_free_port

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
SHOWN = 25
"""Lines of the log of a check that failed, on screen."""

ON_CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}


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
                raise CheckError(f"exit code {found}, expected {code}")

    def run(self, *command: object, cpu: bool = False) -> None:
        """Runs a command to its end, which must be good."""
        self.end(self.start(*command, cpu=cpu))

    def launch(self, script: str, recipe: Path) -> None:
        """Runs a recipe on one rank by the deepspeed launcher."""
        launcher = [PYTHON, "-m", "deepspeed.launcher.runner", "--num_gpus", 1, "--master_port", get_free_port()]
        self.run(*launcher, f"launchers/{script}.sh", "--config", recipe)

    def ranks(self, size: int, recipe: Path, *, cpu: bool = False) -> list[subprocess.Popen[bytes]]:
        """Starts pretrain.sh on `size` ranks, without a launcher: a signal reaches them at once."""
        common = {
            "WORLD_SIZE": size,
            "LOCAL_WORLD_SIZE": size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": get_free_port(),
        }
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
"""Does what is checked, and says in a line what it found; raises CheckError."""

Plan = dict[str, tuple[int, tuple[str, ...], Action]]
"""Name -> (seconds that it may take, names that it waits for, what it does), in the order in which they start."""


class Checks:
    """All checks of a run: what they are, in what order they start, and what they wait for."""

    def __init__(self, out: Path, work: Path, device: str) -> None:
        self._out, self._work, self._device = out, work, device
        self._writing = threading.Lock()
        self._done: dict[str, Future[None]] = {}
        self.failed: list[str] = []
        (out / "summary.txt").write_bytes(b"")
        (out / "logs.txt").write_bytes(b"")

    def run(self, checks: Plan, workers: int, deadline: float) -> None:
        """Runs them all, so many at once; a check stands after those that it waits for."""
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
            print(line, *(check.said().splitlines()[-SHOWN:] if name in self.failed else []), sep="\n", flush=True)
            with (self._out / "summary.txt").open("a") as summary, (self._out / "logs.txt").open("a") as logs:
                summary.write(line + "\n")
                logs.write(f"\n===== {line}\n{check.said()}")
