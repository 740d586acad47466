"""NVIDIA's counters of this rank's GPU: memory, utilisation, power, energy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

FIELDS = ("gpu_memory_gib", "gpu_utilization_percent", "gpu_power_w", "gpu_energy_j")
"""The values of a sample, in this order; nan if one is not known. Memory is that of all processes; utilisation is the
share of the driver's last sampling period (at most a second) in which a kernel ran; energy counts since the driver was
loaded."""


def load_nvml() -> Any:
    """The module pynvml, initialised; None without the package or NVIDIA's driver."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


class GpuCounters:
    """The counters of one CUDA device. Without NVML, a driver or a counter the values are nan; there is no error."""

    def __init__(self, device: torch.device) -> None:
        self._nvml, self._handle = load_nvml(), None
        if self._nvml is not None:
            # by UUID: CUDA_VISIBLE_DEVICES renumbers torch's devices, not NVML's. The UUID of a MIG slice finds nothing
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            self._handle = self._ask(self._nvml.nvmlDeviceGetHandleByUUID, uuid)

    def sample(self) -> list[float]:
        """The present values, see `FIELDS`. Only differences of the energy mean something."""
        if self._handle is None:
            return [math.nan] * len(FIELDS)
        nvml = self._nvml
        queries: list[tuple[Callable[[Any], Any], Callable[[Any], float]]] = [
            (nvml.nvmlDeviceGetMemoryInfo, lambda memory: memory.used / 2**30),
            (nvml.nvmlDeviceGetUtilizationRates, lambda rates: float(rates.gpu)),
            (nvml.nvmlDeviceGetPowerUsage, lambda milliwatts: milliwatts / 1000),
            (nvml.nvmlDeviceGetTotalEnergyConsumption, lambda millijoules: millijoules / 1000),
        ]
        found = [(self._ask(query, self._handle), value) for query, value in queries]
        return [math.nan if answer is None else value(answer) for answer, value in found]

    def _ask(self, query: Callable[[Any], Any], argument: Any) -> Any:
        """NVML's answer, or None if this card or driver has none."""
        try:
            return query(argument)
        except self._nvml.NVMLError:
            return None


def gpu_fields(samples: torch.Tensor, tokens: int) -> dict[str, float | None]:
    """The fields of a line of metrics.jsonl, over all ranks; None if any rank does not know its value.

    samples: [ranks, 4] float64, each rank's `FIELDS`; its energy is what the `tokens` tokens of all ranks took.
    The result: the highest memory, the mean utilisation, the sum of power, the sum of energy per 10^6 tokens.
    """
    memory, utilization, power, energy = samples.unbind(1)
    values = (memory.amax(), utilization.mean(), power.sum(), energy.sum() / tokens * 1e6)
    names = (*FIELDS[:3], "joules_per_million_tokens")
    return {name: None if value.isnan() else float(value) for name, value in zip(names, values, strict=True)}
