"""`deepspeed: auto` and `teacher.sharding: auto`: the fastest engines that the estimate of memory has room for."""

from __future__ import annotations

import socket
from collections import Counter
from pathlib import Path

import psutil
import torch

from ted_ds.config.choices import Sharding
from ted_ds.config.deepspeed import AUTO
from ted_ds.config.load import read_yaml
from ted_ds.config.schema import RunConfig
from ted_ds.doctor.estimate import Machine, estimate
from ted_ds.doctor.shapes import run_shapes
from ted_ds.job.world import World, logger

TIGHT = {"cuda": 0.85, "cpu": 0.6}
"""Share of the memory above which the estimate's error may decide; on CPUs the C library keeps freed memory."""

ZERO1, ZERO3 = Path("ds_configs/zero1.json"), Path("ds_configs/zero3.json")

FASTEST_FIRST: tuple[tuple[Path, Sharding], ...] = (
    (ZERO1, "replicated"),
    (ZERO3, "replicated"),
    (ZERO1, "zero3"),
    (ZERO3, "zero3"),
)
"""The student's DeepSpeed file and the teacher's sharding. On an H200 a step of 1.5B to 0.7B took 0.167 s with the
first, 0.189 s with the second and 0.227 s with the last (docs/measurements.md)."""


def choose_engines(run: RunConfig, world: World) -> RunConfig:
    """The recipe with what its `auto`s stand for here; a collective. It is estimated from the models' configs alone.

    Takes the last choice, ZeRO-3, if none fits or nothing can be estimated; a run that was begun goes on with what it
    took then, since a checkpoint is of one stage of ZeRO.
    """
    choices = engine_choices(run)
    if len(choices) == 1:
        return choices[0]
    begun = world.on_main(lambda: _begun(run.output_dir / "config.yaml"))
    if kept := [choice for choice in choices if _engines(choice) == begun]:
        return kept[0]
    machine = Machine(world.size, world.device, available_bytes(world), 0.0, idle=0.0)
    chosen = choices[world.on_main(lambda: first_that_fits(choices, machine))]
    logger.info("auto: %s", named(chosen))
    return chosen


def _begun(path: Path) -> tuple[str, str | None] | None:
    """The engines of the run in whose folder `path` is; None if there is none; on one rank."""
    if not path.exists():
        return None
    found = read_yaml(path)
    return str(found.get("deepspeed")), (found.get("teacher") or {}).get("sharding")


def _engines(run: RunConfig) -> tuple[str, str | None]:
    return str(run.deepspeed), None if run.teacher is None else run.teacher.sharding


def named(run: RunConfig) -> str:
    """The recipe's keys that `auto` may stand in."""
    teacher = "" if run.teacher is None else f", teacher.sharding: {run.teacher.sharding}"
    return f"deepspeed: {run.deepspeed}{teacher}"


def engine_choices(run: RunConfig) -> list[RunConfig]:
    """The recipe with each value of its `auto`s, the fastest first; itself alone without one."""
    found: dict[tuple[Path, str], RunConfig] = {}
    for file, sharding in FASTEST_FIRST:
        file = file if run.deepspeed == AUTO else run.deepspeed
        teacher = run.teacher
        if teacher is not None and teacher.sharding == "auto":
            teacher = teacher.model_copy(update={"sharding": sharding})
        own = "" if teacher is None else teacher.sharding
        found.setdefault((file, own), run.model_copy(update={"deepspeed": file, "teacher": teacher}))
    return list(found.values())


def first_that_fits(choices: list[RunConfig], machine: Machine) -> int:
    """Its place, the last one's if none fits or nothing can be estimated; on one rank."""
    limit = TIGHT[machine.device.type] * machine.device_bytes
    try:
        shapes = run_shapes(choices[0])
        fitting = (i for i, run in enumerate(choices) if estimate(run, shapes, machine).total("device") <= limit)
        return next(fitting, len(choices) - 1)
    except Exception as error:  # any error of a model's own code; of a recipe that is wrong the run says it best
        logger.warning("auto: memory is not estimated, ZeRO-3 is taken: %s", str(error).partition("\n")[0])
        return len(choices) - 1


def available_bytes(world: World) -> float:
    """What a rank may use of its device; on CPUs its share of the host's free memory, and what it has already; the
    least of all ranks; a collective.
    """
    if world.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(world.device)
        mine = float(free + torch.cuda.memory_reserved(world.device))
    else:
        here = Counter(world.gather_objects(socket.gethostname()))[socket.gethostname()]
        mine = psutil.virtual_memory().available / here + psutil.Process().memory_info().rss
    return world.min(torch.tensor(mine, dtype=torch.float64)).item()
