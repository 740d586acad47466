"""DeepSpeed's universal checkpoints: how one that N ranks wrote is read by another number of ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ted_ds.errors import CheckpointError

MERGING = 8
"""Processes at most that convert a checkpoint; each holds some parameters in memory."""


def convert_to_universal(checkpoint: Path, output: Path, world_size: int) -> None:
    """Writes `output`, a universal checkpoint, of the folder `checkpoint`; on one rank.

    world_size: ranks that wrote it. Raises CheckpointError if DeepSpeed cannot convert it.
    """
    workers = str(min(MERGING, len(os.sched_getaffinity(0))))
    options = ["--num_extract_workers", workers, "--num_merge_workers", workers, "--inject_missing_state"]
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    places = ["--input_folder", str(checkpoint), "--output_folder", str(output)]
    # a session of its own: its workers can be ended with it, which they are not by themselves
    with subprocess.Popen(
        [*command, *places, *options],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as converter:
        try:
            _, said = converter.communicate()
        except BaseException:
            os.killpg(converter.pid, signal.SIGKILL)
            raise
    if converter.returncode:
        reason = (said.strip().splitlines() or ["no message"])[-1]
        raise CheckpointError(
            f"DeepSpeed cannot convert checkpoint {checkpoint} for another number of ranks ({reason}): start it with "
            f"{world_size} ranks"
        )
    (output.parent / "latest_universal").unlink(missing_ok=True)  # its own `latest`, which nobody reads


@contextmanager
def loads_universal(engine: Any) -> Iterator[None]:
    """Inside it `engine.load_checkpoint` reads a universal checkpoint; then two faults of DeepSpeed 0.19.8 are mended.

    Every parameter group gets the first group's options (stage3.py,
    load_hp_checkpoint_state_from_checkpoint_dir_stage3),
    and all states share one tensor `step`, on the device that it was saved from: each group's update would move it, and
    fused AdamW refuses one that is not on its parameter's device.
    """
    optimizer: torch.optim.Optimizer = engine.optimizer.optimizer
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    engine._config.load_universal_checkpoint = True  # DeepSpeed reads it of its file, before anyone knows the ranks
    try:
        yield
    finally:
        engine._config.load_universal_checkpoint = False
    for group, decay in zip(optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay
    for parameter, state in optimizer.state.items():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].to(parameter.device, copy=True)
