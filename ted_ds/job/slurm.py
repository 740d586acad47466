"""Turns SLURM's variables of a task of `srun` into those that torch's launchers set: one task is one rank."""

from __future__ import annotations

import re
from collections.abc import Mapping


def slurm_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, LOCAL_SIZE, MASTER_ADDR, MASTER_PORT of a task of `srun`.

    The result leaves out variables that `environ` has already. It is empty outside of a step (a batch script has
    SLURM_PROCID too, but no SLURM_STEP_*), under another launcher, which sets WORLD_SIZE, and in a step of one task
    without RANK, which may be an interactive shell with several commands at once.

    The ranks meet on the step's first node, at a port that is computed from the job's id, as two jobs may share a node,
    and lies below Linux's range of automatic ports. LOCAL_RANK is 0 if a task sees a single GPU (--gpus-per-task=1).
    LOCAL_SIZE is DeepSpeed's name of LOCAL_WORLD_SIZE.

    Source: "OUTPUT ENVIRONMENT VARIABLES" of srun(1).
    """
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS", "0"))
    if "WORLD_SIZE" in environ or tasks == 0 or (tasks == 1 and "RANK" not in environ):
        return {}
    here = _tasks_per_node(environ["SLURM_STEP_TASKS_PER_NODE"])[int(environ["SLURM_NODEID"])]
    gpus = environ.get("CUDA_VISIBLE_DEVICES", "")
    sees_one = gpus != "" and "," not in gpus
    found = {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": "0" if sees_one else environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(here),
        "LOCAL_SIZE": str(here),
        "MASTER_ADDR": _first_host(environ["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(20000 + int(environ["SLURM_JOB_ID"]) % 12000),
    }
    return {name: value for name, value in found.items() if name not in environ}


def _tasks_per_node(counts: str) -> list[int]:
    """The number of tasks of each node: [2, 2, 2, 1] of `2(x3),1`."""
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
    return [int(count) for count, times in parts for _ in range(int(times or 1))]


def _first_host(nodes: str) -> str:
    """The first node of a list: gpu003 of `gpu[003-010,12],x1`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0] if first else nodes)
