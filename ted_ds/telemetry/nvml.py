"""NVIDIA's own counters of this rank's GPU: memory, utilisation, power, energy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

FIELDS = ("gpu_memory_gib", "gpu_utilization_percent", "gpu_power_w", "gpu_energy_j")
"""What a sample holds, in its order; nan where it is not known. Memory is what all processes use; utilisation is the
share of the driver's last sampling period (at most a second) in which a kernel ran; energy since the driver loaded."""


class GpuCounters:
    """The counters of one CUDA device; without NVML, a driver or a counter there is nothing known, and no error."""

    def __init__(self, device: torch.device) -> None:
        self._nvml: Any = None
        try:
            import pynvml

            pynvml.nvmlInit()
        except ImportError:
            return
        except pynvml.NVMLError:
            return
        self._nvml = pynvml
        # by UUID: CUDA_VISIBLE_DEVICES renumbers torch's devices, not NVML's. A MIG slice's finds nothing.
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        self._handle = self._ask(pynvml.nvmlDeviceGetHandleByUUID, uuid)

    def sample(self) -> list[float]:
        """The present values, see `FIELDS`; of energy only differences mean anything."""
        if self._nvml is None or self._handle is None:
            return [math.nan] * len(FIELDS)
        nvml, handle = self._nvml, self._handle
        memory, rates = (
            self._ask(f, handle) for f in (nvml.nvmlDeviceGetMemoryInfo, nvml.nvmlDeviceGetUtilizationRates)
        )
        milliwatts = self._ask(nvml.nvmlDeviceGetPowerUsage, handle)
        millijoules = self._ask(nvml.nvmlDeviceGetTotalEnergyConsumption, handle)
        return [
            math.nan if memory is None else memory.used / 2**30,
            math.nan if rates is None else float(rates.gpu),
            math.nan if milliwatts is None else milliwatts / 1000,
            math.nan if millijoules is None else millijoules / 1000,
        ]

    def _ask(self, call: Callable[..., Any], argument: Any) -> Any:
        """What NVML answers, or None where this card or driver has no answer."""
        try:
            return call(argument)
        except self._nvml.NVMLError:
            return None


def gpu_fields(samples: torch.Tensor, tokens: int) -> dict[str, float | None]:
    """The fields of a line of metrics.jsonl, over all ranks; None where any rank does not know its part.

    samples: [ranks, 4] float64, each rank's `FIELDS`, energy being that of the `tokens` of all ranks. Of memory the
    highest, of utilisation the mean, of power and energy the sum: a sum over some of the GPUs would be no run's.
    """
    memory, utilization, power, energy = samples.unbind(1)
    values = (memory.amax(), utilization.mean(), power.sum(), energy.sum() / tokens * 1e6)
    names = (*FIELDS[:3], "joules_per_million_tokens")
    return {name: None if value.isnan() else float(value) for name, value in zip(names, values, strict=True)}
