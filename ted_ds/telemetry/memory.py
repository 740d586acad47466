"""Measures the peak memory of this process."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak(device: torch.device) -> None:
    """Resets the peaks."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # some containers do not allow it: the peak is then that of the whole process
            CLEAR_REFS.write_text("5")  # sets VmHWM to what is resident now


def peak_memory_gib(device: torch.device) -> float:
    """GiB at the peak since `reset_peak`: allocated on the device on CUDA, resident memory of the process on CPUs."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    lines = STATUS.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**20  # KiB


def peak_reserved_gib(device: torch.device) -> float:
    """GiB at the peak since `reset_peak` that torch's allocator held on CUDA, unused parts of its blocks included."""
    return torch.cuda.max_memory_reserved(device) / 2**30
