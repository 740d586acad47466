"""Checks that one process makes by itself: versions, devices, memory, tools, disks, limits."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from torch.utils.cpp_extension import get_cxx_compiler

from ted_ds.doctor.finding import GIB, Finding, Status, gib
from ted_ds.job.files import write_atomically
from ted_ds.job.versions import commit
from ted_ds.telemetry.nvml import GpuCounters, load_nvml

SHOWN = ("torch", "deepspeed", "transformers")
"""The packages that have lines of their own."""

SHARED_MEMORY, CGROUPS = Path("/dev/shm"), Path("/sys/fs/cgroup")
LEAST_SHARED_MEMORY = GIB
"""Bytes of /dev/shm. NCCL takes about 10 MiB for each other rank of the node, gloo and data workers more."""

LEAST_FILES = 4096
"""Enough for 512 ranks: two sockets to each other rank, some more on rank 0, and NCCL's own."""

PROBE_BYTES, SLOW_PROBE_S = 1 << 20, 1.0


def machine() -> list[Finding]:
    """Everything that needs neither a recipe nor another rank."""
    return [*versions(), *devices(), host_memory(), backend(), compiler(), shared_memory(), open_files()]


def versions() -> list[Finding]:
    """Python and packages against the ranges that the installed ted_ds asks for; the code's commit."""
    try:
        wanted = metadata.metadata("ted_ds")["Requires-Python"]
        required = [Requirement(line) for line in metadata.requires("ted_ds") or ()]
    except metadata.PackageNotFoundError:
        advice = "run `pip install -e .` in its folder"
        return [Finding("warn", "ted_ds", f"commit {commit()}, not installed: versions cannot be judged", advice)]
    ranges = {r.name: r.specifier for r in required if r.marker is None or r.marker.evaluate({"extra": ""})}
    found = {name: _package(name, ranges[name]) for name in ranges}
    others = [finding for name, finding in found.items() if name not in SHOWN]
    lines = [_package("python", SpecifierSet(wanted or "")), *(found[name] for name in SHOWN if name in found)]
    if torch.cuda.is_available():
        lines.append(_package("triton", SpecifierSet()))
    bad = [finding for finding in others if finding.status != "ok"]
    lines += bad or [Finding("ok", "packages", f"the other {len(others)} that ted_ds needs are there")]
    return [*lines, Finding("ok", "ted_ds", f"{metadata.version('ted_ds')}, commit {commit() or 'unknown'}")]


def _package(name: str, wanted: SpecifierSet) -> Finding:
    remedy = "use such a Python" if name == "python" else f'run `pip install "{name}{wanted}"`'
    try:
        version = platform.python_version() if name == "python" else metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding("FAIL", name, "is not installed", remedy)
    if wanted.contains(version, prereleases=True):
        return Finding("ok", canonicalize_name(name), version)
    return Finding("FAIL", canonicalize_name(name), f"{version} is not {wanted}", remedy)


def devices() -> list[Finding]:
    """Every GPU that this process may use, or the CPU."""
    if not torch.cuda.is_available():
        if torch.version.cuda is not None and _driver() is not None:
            advice = "install a driver for it, or see to CUDA_VISIBLE_DEVICES and the job's --gres"
            return [Finding("FAIL", "device", f"torch for CUDA {torch.version.cuda} finds no GPU", advice)]
        return [Finding("ok", "device", "CPU, no GPU: bfloat16 and float32 work, for small models")]
    driver = f"driver {_driver() or 'unknown'}, CUDA {torch.version.cuda}"
    return [_gpu(index, driver) for index in range(torch.cuda.device_count())]


def _gpu(index: int, driver: str) -> Finding:
    """One GPU. Triton's kernels and bfloat16 want compute capability 8.0."""
    card = torch.cuda.get_device_properties(index)
    name = f"{card.name}, {gib(card.total_memory)}, compute capability {card.major}.{card.minor}, {driver}"
    if card.major < 8:
        advice = "set student.dtype and teacher.dtype to float32"
        return Finding("warn", f"cuda:{index}", f"{name}, no bfloat16", advice)
    used = GpuCounters(torch.device("cuda", index)).sample()[0]
    if used > 0.1 * card.total_memory / GIB:  # False for nan: NVML has no answer
        busy = f"{name}, {used:.1f} GiB of it in use already"
        return Finding("warn", f"cuda:{index}", busy, "see with nvidia-smi whether another job has it")
    return Finding("ok", f"cuda:{index}", f"{name}, bfloat16")


def _driver() -> str | None:
    """The version of NVIDIA's driver; None without one."""
    nvml = load_nvml()
    return None if nvml is None else str(nvml.nvmlSystemGetDriverVersion())


def host_memory() -> Finding:
    """The memory that all processes of this job on this machine share."""
    total, free = host_limit(), psutil.virtual_memory().available
    what = f"{gib(total)} for this job, {gib(free)} free on the machine"
    if free < 0.1 * total:
        return Finding("warn", "host memory", what, "see with top what fills it, or ask for another node")
    return Finding("ok", "host memory", what)


def host_limit() -> int:
    """Bytes: the machine's memory, or the limit of the job's control groups (SLURM's --mem, a container's limit)."""
    limits = [int(psutil.virtual_memory().total)]
    path = CGROUPS / _own_cgroup()
    for folder in (path, *path.parents):
        if folder.is_relative_to(CGROUPS):
            for name in ("memory.max", "memory/memory.limit_in_bytes"):  # version 2, version 1
                text = (folder / name).read_text().strip() if (folder / name).is_file() else "max"
                limits += [int(text)] if text.isdigit() else []
    return min(limits)


def _own_cgroup() -> str:
    """The path of this process in the tree of cgroups version 2, "" if it is not known."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line[3:].lstrip("/") for line in lines if line.startswith("0::")), "")


def backend() -> Finding:
    """The library by which the ranks communicate."""
    if torch.cuda.is_available():
        return Finding("ok", "communication", f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")
    return Finding("ok", "communication", f"gloo of torch {torch.__version__}")


def compiler() -> Finding:
    """DeepSpeed compiles an op at the first start: always on CPUs, on GPUs if the optimizer is offloaded."""
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.defpath])
    compiler = get_cxx_compiler()
    tools = {"ninja": shutil.which("ninja") or shutil.which("ninja", path=beside), compiler: shutil.which(compiler)}
    missing = [name for name, path in tools.items() if path is None]
    if not missing:
        return Finding("ok", "compiler", ", ".join(map(str, tools.values())))
    advice = "run `pip install ninja`" if missing == ["ninja"] else "install g++, or load your cluster's module of gcc"
    status: Status = "warn" if torch.cuda.is_available() else "FAIL"
    return Finding(status, "compiler", f"{' and '.join(missing)} not found, DeepSpeed compiles by it", advice)


def shared_memory() -> Finding:
    """The size of /dev/shm, through which the ranks of a node exchange data."""
    try:
        size = shutil.disk_usage(SHARED_MEMORY).total
    except OSError as error:
        return Finding("warn", "shared memory", str(error), f"mount a tmpfs on {SHARED_MEMORY}")
    if size < LEAST_SHARED_MEMORY:
        advice = "give the container more, e.g. `docker run --shm-size=8g` or `--ipc=host`"
        return Finding("warn", "shared memory", f"{SHARED_MEMORY} has {gib(size)}", advice)
    return Finding("ok", "shared memory", f"{SHARED_MEMORY} has {gib(size)}")


def open_files() -> Finding:
    """File descriptors, for sockets, data files, checkpoints. A run raises its soft limit to the hard one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= hard < LEAST_FILES:
        return Finding(
            "warn", "limits", f"{hard} open files", f"have `ulimit -Hn` raised to {LEAST_FILES}, for many ranks"
        )
    return Finding("ok", "limits", f"{'unlimited' if hard < 0 else hard} open files")


def writable(check: str, folder: Path) -> Finding:
    """Whether a file can be written, flushed to disk and renamed where `folder` is or will be."""
    started = time.perf_counter()
    try:
        with probe_file(folder, PROBE_BYTES) as path:
            free = shutil.disk_usage(path.parent).free
    except OSError as error:
        advice = "give another folder, make room, or see to the permissions"
        return Finding("FAIL", check, f"{folder}: {error.strerror or error}", advice)
    seconds = time.perf_counter() - started
    what = f"{path.parent} has {gib(free)} free, 1 MiB is written, flushed and renamed in {1000 * seconds:.0f} ms"
    if seconds > SLOW_PROBE_S:
        advice = "a busy or slow file system makes every checkpoint slow: give another folder"
        return Finding("warn", check, what, advice)
    return Finding("ok", check, what)


@contextmanager
def probe_file(folder: Path, size: int) -> Iterator[Path]:
    """A new file of `size` bytes where `folder` is or will be, written as a run writes, and removed in the end."""
    path = existing(folder) / f".ted-ds-doctor-{uuid.uuid4().hex}"
    try:
        write_atomically(path, "0" * size)
        yield path
    finally:
        for left in path.parent.glob(f"{path.name}*"):
            left.unlink()


def existing(folder: Path) -> Path:
    """The folder, or the nearest folder above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
