"""Measuring helpers: interleaved repeats, medians, extra peak memory, and where a number was measured."""

from __future__ import annotations

import gc
import multiprocessing
import os
import platform
import shlex
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ted_ds.telemetry.memory import peak_memory_gib, reset_peak

Step = Callable[[], object]

PACKAGES = ("transformers", "deepspeed", "triton", "liger-kernel")
"""What numbers may depend on beside torch, where it is there."""


def interleaved_seconds(steps: Mapping[str, Step], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every repeat of every step, after one warm-up each.

    Interleaved (a b c, a b c, ...): a machine that slows down half-way slows every step alike, so ratios
    of medians hold where absolute times do not.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            _synchronize(device)
            start = time.perf_counter()
            step()
            _synchronize(device)
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def extra_peak_mib(make_step: Callable[..., Step], *arguments: Any, device: torch.device) -> float:
    """MiB that one call of `make_step(*arguments)()` needs at its peak beyond what was resident before it.

    Each measurement has a process of its own, so no step profits from pages or library buffers that
    another left behind. CPU: the kernel's high-water mark of resident memory (VmHWM), reset just before
    the call; unlike a count of torch's allocations it sees the GEMM library's workspace and memory that is
    reserved but never touched does not count. CUDA: the caching allocator's peak.
    `make_step` must be importable (a module's function): the process is spawned.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_measure_peak, args=(sender, make_step, arguments, str(device)))
    child.start()
    sender.close()
    try:
        return float(receiver.recv())
    except EOFError:
        raise RuntimeError(f"the measuring process of {make_step.__name__} died; its output says why") from None
    finally:
        child.join()


def extra_peak_here_mib(make_step: Callable[..., Step], *arguments: Any, device: torch.device) -> float:
    """`extra_peak_mib` of a CUDA device without a process of its own: its allocator counts exactly."""
    gc.collect()
    torch.cuda.empty_cache()
    step = make_step(*arguments)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del step
    gc.collect()
    return peak / 2**20


def step_peak_mib(make_step: Callable[..., Step], *arguments: Any, device: torch.device) -> float:
    """The extra peak, in a process of its own where the device is the CPU."""
    measure = extra_peak_mib if device.type == "cpu" else extra_peak_here_mib
    return measure(make_step, *arguments, device=device)


def environment(device: torch.device, name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """What a number depends on: machine, threads, versions, command, commit, date.

    name, arguments: of the benchmark, as it was called; of an absolute path only the last part is kept.
    The commit is what COMMIT says, for files that were copied without their history, or git's.
    """
    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "device": str(device),
        "accelerator": accelerator,
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": {name: version(name) for name in PACKAGES if find_spec(name.replace("-", "_"))},
        "command": shlex.join(["python", "-m", f"benchmarks.{name}", *map(_neutral, arguments)]),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def default_device() -> str:
    """CUDA where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _neutral(argument: str) -> str:
    return Path(argument).name if argument.startswith("/") else argument


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _measure_peak(sender: Any, make_step: Callable[..., Step], arguments: tuple[Any, ...], device: str) -> None:
    step = make_step(*arguments)
    small = torch.ones(64, 64, device=device, requires_grad=True)
    (small @ small).sum().backward()  # loads the GEMM library and starts autograd's threads
    if device == "cpu":
        place = torch.device(device)
        reset_peak(place)
        before = peak_memory_gib(place)  # what is resident now
        step()
        sender.send((peak_memory_gib(place) - before) * 2**10)
        return
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() / 2**20
    step()
    torch.cuda.synchronize()
    sender.send(torch.cuda.max_memory_allocated() / 2**20 - before)


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str | None:
    if given := os.environ.get("COMMIT"):
        return given
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() or None
