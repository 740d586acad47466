"""Peak memory of this process."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak(device: torch.device) -> None:
    """Starts the peaks anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # a kernel or container without it: the peak is since the process began
            CLEAR_REFS.write_text("5")  # sets VmHWM to what is resident now


def peak_memory_gib(device: torch.device) -> float:
    """Peak since `reset_peak`: allocated device memory on CUDA, resident memory of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    lines = STATUS.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**20  # KiB


def peak_reserved_gib(device: torch.device) -> float:
    """Peak since `reset_peak` of what torch's allocator held on CUDA, unused parts of its blocks included."""
    return torch.cuda.max_memory_reserved(device) / 2**30
