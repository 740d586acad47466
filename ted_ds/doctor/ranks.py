"""Checks that need all ranks: where each one runs, how fast they communicate, whether they see the same."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from ted_ds.doctor.finding import Finding
from ted_ds.doctor.machine import host_limit, probe_file
from ted_ds.job.world import World

LARGE_BYTES = {"cuda": 64 << 20, "cpu": 16 << 20}
SLOW_GB_S = {"cuda": 1.0, "cpu": 0.05}
"""GB/s. Below it, a step waits for the network longer than it computes."""

SMALL_REPEATS, LARGE_REPEATS = 20, 5


@dataclass(frozen=True)
class Facts:
    """What a rank tells the others about itself.

    gpu, gpu_bytes: UUID and free bytes of its GPU, "" and 0 on CPUs. host_bytes: memory that all ranks of its node
    share. cores: those that it may run on. probe: the file that rank 0 wrote and all ranks look for; None on others.
    """

    rank: int
    host: str
    device: str
    gpu: str
    gpu_bytes: int
    host_bytes: int
    cores: frozenset[int]
    threads: int
    versions: dict[str, str]
    findings: tuple[Finding, ...]
    probe: Path | None


def examine_ranks(
    world: World, findings: Iterable[Finding], versions: dict[str, str], shared: Path | None
) -> tuple[list[Finding], list[Facts]]:
    """The checks between ranks, and the facts of every rank; a collective.

    findings: this rank's own. shared: the folder that all nodes must see; None: it is not checked.
    """
    with ExitStack() as stack:
        probe = None
        if shared is not None and world.is_main:
            with suppress(OSError):
                probe = stack.enter_context(probe_file(shared, size=0))
        facts = world.gather_objects(_facts(world, findings, versions, probe))
        seen = world.gather_objects(facts[0].probe is not None and facts[0].probe.exists())
    found = [*differing(facts), table(facts), cores(facts)]
    if world.size > 1:
        found += [same_versions(facts), *all_reduce(world)]
        found += [same_folder(shared, facts, seen)] if shared is not None else []
    return found, facts


def _facts(world: World, findings: Iterable[Finding], versions: dict[str, str], probe: Path | None) -> Facts:
    on_gpu = world.device.type == "cuda"
    return Facts(
        rank=world.rank,
        host=socket.gethostname(),
        device=str(world.device),
        gpu=str(torch.cuda.get_device_properties(world.device).uuid) if on_gpu else "",
        gpu_bytes=torch.cuda.mem_get_info(world.device)[0] if on_gpu else 0,
        host_bytes=host_limit(),
        cores=frozenset(os.sched_getaffinity(0)),
        threads=torch.get_num_threads(),
        versions=versions,
        findings=tuple(findings),
        probe=probe,
    )


def differing(facts: list[Facts]) -> list[Finding]:
    """What other ranks found and rank 0 did not: one finding for all ranks that found the same."""
    known = set(facts[0].findings)
    ranks: dict[Finding, list[Facts]] = {}
    for fact in facts[1:]:
        for finding in fact.findings:
            if finding not in known and (finding.status != "ok" or finding.check not in MEASURED):
                ranks.setdefault(finding, []).append(fact)
    return [Finding(f.status, f.check, f"{_named(who)}: {f.what}", f.advice) for f, who in ranks.items()]


MEASURED = ("host memory", "output_dir", "data.prepared", "working folder")
"""Checks whose figures change all the time. Of other ranks these are shown only if they are not ok."""


def _named(who: list[Facts]) -> str:
    hosts = ", ".join(dict.fromkeys(fact.host for fact in who))
    return f"rank{'s' * (len(who) > 1)} {', '.join(str(fact.rank) for fact in who)} ({hosts})"


def table(facts: list[Facts]) -> Finding:
    """Host and device of each rank. Two ranks on one GPU cannot communicate by NCCL."""
    hosts = _by_host(facts)
    gpus = [fact.gpu for fact in facts if fact.gpu]
    rows = [f"{host} {' '.join(f'{f.rank}={f.device}' for f in own)}" for host, own in hosts.items()]
    what = f"{len(facts)} on {_counted(len(hosts), 'node')}: {'; '.join(rows)}"
    if len(set(gpus)) < len(gpus):
        advice = "start as many ranks a node as it has GPUs; with srun leave --gpus-per-task and --gpu-bind out"
        return Finding("FAIL", "ranks", f"{what}, two of them on one GPU", advice)
    return Finding("ok", "ranks", what)


def whole_job(environment: Mapping[str, str], world_size: int) -> list[Finding]:
    """A warning if this is one process of a SLURM job of several tasks, e.g. in the shell of the batch script."""
    tasks = int(environment.get("SLURM_NTASKS", "1"))
    if world_size > 1 or tasks == 1:
        return []
    advice = "start it by srun to try all of them"
    return [Finding("warn", "ranks", f"one process, SLURM gave the job {tasks} tasks", advice)]


def cores(facts: list[Facts]) -> Finding:
    """Cores and threads of each node. A rank with a GPU needs one core, and another one for its copies and data."""
    said = []
    for host, own in _by_host(facts).items():
        available, threads = len(frozenset().union(*(f.cores for f in own))), own[0].threads
        what = f"{host}: {_counted(len(own), 'rank')} on {_counted(available, 'core')}, OMP_NUM_THREADS {threads}"
        if not own[0].gpu and len(own) * threads > available:
            advice = f"set OMP_NUM_THREADS to {max(1, available // len(own))}, start fewer ranks, or ask for more cores"
            return Finding("warn", "cores", what, advice)
        if own[0].gpu and available < 2 * len(own):
            return Finding("warn", "cores", what, "give each rank two or more, by SLURM's --cpus-per-task")
        said.append(what)
    return Finding("ok", "cores", "; ".join(said))


def same_versions(facts: list[Facts]) -> Finding:
    """Ranks with other versions or another commit may compute different numbers, or wait forever."""
    for name, first in facts[0].versions.items():
        for own in (fact.versions[name] for fact in facts if fact.versions[name] != first):
            others = [fact for fact in facts if fact.versions[name] == own]
            what = f"{_named(others)} has {name} {own}, rank 0 {first}"
            return Finding("FAIL", "same versions", what, "start all ranks from one environment and one checkout")
    return Finding("ok", "same versions", "on all ranks")


def same_folder(folder: Path, facts: list[Facts], seen: list[bool]) -> Finding:
    """Whether every rank sees the file that rank 0 has just written."""
    if facts[0].probe is None:
        return Finding("FAIL", "shared folder", f"rank 0 cannot write to {folder}", "give another output_dir")
    blind = [fact for fact, sees in zip(facts, seen, strict=True) if not sees]
    if blind:
        what = f"{_named(blind)} does not see what rank 0 wrote into {facts[0].probe.parent}"
        return Finding("FAIL", "shared folder", what, "give an output_dir on a file system that all nodes share")
    return Finding("ok", "shared folder", f"all ranks see {facts[0].probe.parent}")


def all_reduce(world: World) -> list[Finding]:
    """Latency of a small all-reduce, bandwidth of a large one, whose sum is checked; a collective.

    The bandwidth is the busbw of nccl-tests: 2 (n - 1) / n bytes cross a link for each byte of the tensor, in GB/s.
    """
    kind = world.device.type
    large = torch.full((LARGE_BYTES[kind] // 4,), world.rank + 1.0, device=world.device)
    torch.distributed.all_reduce(large)
    expected = world.size * (world.size + 1) / 2
    if not bool((large == expected).all()):
        what = f"a sum over ranks is {float(large.min())} to {float(large.max())}, not {expected}"
        return [Finding("FAIL", "all-reduce", what, "look for a broken link or driver: set NCCL_DEBUG=INFO")]
    small = torch.zeros(1, device=world.device)
    latency = max(world.gather_objects(_seconds(small, SMALL_REPEATS)))
    seconds = max(world.gather_objects(_seconds(large.zero_(), LARGE_REPEATS)))
    bandwidth = 2 * (world.size - 1) / world.size * LARGE_BYTES[kind] / seconds / 1e9
    what = f"{LARGE_BYTES[kind] >> 20} MiB in {1000 * seconds:.1f} ms, {bandwidth:.2f} GB/s; "
    what += f"4 bytes in {1e6 * latency:.0f} us"
    if bandwidth < SLOW_GB_S[kind]:
        variable = "NCCL_SOCKET_IFNAME" if kind == "cuda" else "GLOO_SOCKET_IFNAME"
        advice = f"name the fast network in {variable}; NCCL_DEBUG=INFO says which one NCCL took"
        return [Finding("warn", "all-reduce", what, advice)]
    return [Finding("ok", "all-reduce", what)]


def _seconds(values: torch.Tensor, repeats: int) -> float:
    """The median time of an all-reduce; the first one does not count."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        torch.distributed.all_reduce(values)
        if values.is_cuda:
            torch.cuda.synchronize(values.device)
        times.append(time.perf_counter() - started)
    return median(times[1:])


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _by_host(facts: list[Facts]) -> dict[str, list[Facts]]:
    hosts: dict[str, list[Facts]] = {}
    for fact in facts:
        hosts.setdefault(fact.host, []).append(fact)
    return hosts
