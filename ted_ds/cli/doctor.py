"""`ted-ds doctor [--config RECIPE.yaml [--section.key=value ...]]`: whether a machine or job is ready for a run."""

from __future__ import annotations

import argparse
import os
import platform
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from datetime import timedelta
from pathlib import Path

from ted_ds.config.load import load_config
from ted_ds.config.schema import RunConfig
from ted_ds.doctor.finding import Finding
from ted_ds.errors import ConfigError, RankLost, TedError
from ted_ds.job.slurm import slurm_environment
from ted_ds.job.versions import commit, versions


def main(argv: Sequence[str]) -> int:
    """Prints a line a check: ok, warn or FAIL, what was found, what to change.

    Started by a launcher on many ranks, rank 0 prints, also what other ranks found and it did not. Leaves nothing on
    disk. Returns 0, or 2 if anything FAILs.
    """
    parser = argparse.ArgumentParser("ted-ds doctor", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("--config", type=Path, help="the recipe that shall run here")
    parser.add_argument("--wait", type=float, default=120.0, help="seconds that a rank may keep the others waiting")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # launchers add it
    arguments, overrides = parser.parse_known_args(argv)
    if overrides and arguments.config is None:
        raise ConfigError(f"ted-ds doctor: {overrides[0]} changes a recipe: name it by --config")
    with redirect_stdout(sys.stderr):  # what libraries print
        return _examine(arguments, overrides)


def _examine(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    from ted_ds.doctor.machine import machine
    from ted_ds.doctor.recipe import data_files, folders, models

    environment = {**os.environ, **slurm_environment(os.environ)}
    speaks = environment.get("RANK", "0") == "0"
    run, own = _recipe(arguments.config, overrides)
    own = [*machine(), *own, *folders(run), *([*data_files(run), *models(run)] if run is not None else [])]
    if speaks:
        _print(own)
    found = _among_ranks(environment, timedelta(seconds=arguments.wait), own, run)
    if speaks:
        _print(found)
    return 2 if any(finding.status == "FAIL" for finding in [*own, *found]) else 0


def _recipe(path: Path | None, overrides: Sequence[str]) -> tuple[RunConfig | None, list[Finding]]:
    if path is None:
        return None, []
    try:
        return load_config(path, overrides), [Finding("ok", "recipe", f"{path} is valid")]
    except ConfigError as error:
        return None, [Finding("FAIL", "recipe", line) for line in str(error).splitlines()]


def _among_ranks(
    environment: Mapping[str, str], wait: timedelta, own: list[Finding], run: RunConfig | None
) -> list[Finding]:
    """What the ranks find together, and on rank 0 whether the recipe fits.

    If some ranks do not come, rank 0 has that among its findings, and the others raise TedError.
    """
    from ted_ds.doctor.ranks import examine_ranks, whole_job
    from ted_ds.doctor.recipe import fit, share_of
    from ted_ds.job.world import init_world, lost_ranks_named, shut_down

    started = time.monotonic()
    try:
        world = init_world(wait)
    except (RuntimeError, RankLost) as error:  # torch's of devices, ours of the rendezvous
        rank, size = environment.get("RANK", "0"), environment.get("WORLD_SIZE", "1")
        address = f"{environment.get('MASTER_ADDR')}:{environment.get('MASTER_PORT')}"
        seconds, reason = time.monotonic() - started, str(error.__cause__ or error).partition("\n")[0]
        what = f"{socket.gethostname()} waited {seconds:.0f} s for {size} ranks to meet at {address} ({reason})"
        advice = "see whether all ranks were started, and whether each node reaches that address"
        if rank != "0":
            raise TedError(f"{what}: {advice}") from error
        return [Finding("FAIL", "ranks", what, advice)]
    with lost_ranks_named(world):
        code = versions() | {"python": platform.python_version(), "commit": str(commit())}
        found, facts = examine_ranks(world, own, code, None if run is None else run.output_dir)
        found += whole_job(environment, world.size)
        if world.is_main and run is not None:
            found += fit(run, share_of(facts, world.device))
        world.barrier()
        shut_down(world)
    return found


def _print(findings: Sequence[Finding]) -> None:
    print(*findings, sep="\n", file=sys.__stdout__, flush=True)
