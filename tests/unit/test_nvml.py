"""NVML's counters, from a fake of the module pynvml."""

from __future__ import annotations

import math
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from ted_ds.telemetry.nvml import GpuCounters, gpu_fields

DEVICE = torch.device("cuda", 0)
UUID = "1c2b3d4e-0000-1111-2222-333344445555"


class NVMLError(Exception):
    pass


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine with two cards; torch's device 0 is the second, for CUDA_VISIBLE_DEVICES=1."""
    module: Any = ModuleType("pynvml")
    handles = {"GPU-another": "first card", f"GPU-{UUID}": "second card"}

    def by_uuid(uuid: str) -> str:
        if uuid not in handles:
            raise NVMLError("Not Found")
        return handles[uuid]

    def of_the_second(value: Any) -> Any:
        return lambda handle: value if handle == "second card" else pytest.fail("another card was asked")

    module.NVMLError = NVMLError
    module.nvmlInit = lambda: None
    module.nvmlDeviceGetHandleByUUID = by_uuid
    module.nvmlDeviceGetMemoryInfo = of_the_second(SimpleNamespace(used=3 * 2**29))
    module.nvmlDeviceGetUtilizationRates = of_the_second(SimpleNamespace(gpu=87, memory=12))
    module.nvmlDeviceGetPowerUsage = of_the_second(412_500)
    module.nvmlDeviceGetTotalEnergyConsumption = of_the_second(9_000_250)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=UUID))
    return module


def refuse(*_: Any) -> None:
    raise NVMLError("Not Supported")


def test_the_card_is_found_by_its_uuid(nvml: Any) -> None:
    assert GpuCounters(DEVICE).sample() == [1.5, 87.0, 412.5, 9000.25]


@pytest.mark.parametrize(
    "call",
    [
        "nvmlDeviceGetMemoryInfo",
        "nvmlDeviceGetUtilizationRates",
        "nvmlDeviceGetPowerUsage",
        "nvmlDeviceGetTotalEnergyConsumption",
    ],
)
def test_a_counter_that_the_card_lacks_is_missing_alone(nvml: Any, call: str) -> None:
    names = [name for name in vars(nvml) if name.startswith("nvmlDeviceGet")][1:]
    setattr(nvml, call, refuse)
    sample = GpuCounters(DEVICE).sample()
    assert [math.isnan(value) for value in sample] == [name == call for name in names]


def test_without_library_driver_or_card_nothing_is_known(nvml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml.nvmlDeviceGetHandleByUUID = refuse
    samples = [GpuCounters(DEVICE).sample()]
    nvml.nvmlInit = refuse
    samples.append(GpuCounters(DEVICE).sample())
    monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it fails
    samples.append(GpuCounters(DEVICE).sample())
    assert all(math.isnan(value) for sample in samples for value in sample) and {len(s) for s in samples} == {4}


def test_two_ranks_are_one_line() -> None:
    samples = torch.tensor([[10.0, 90.0, 300.0, 1500.0], [12.0, 60.0, 350.0, 2500.0]], dtype=torch.float64)
    assert gpu_fields(samples, tokens=8000) == {
        "gpu_memory_gib": 12.0,
        "gpu_utilization_percent": 75.0,
        "gpu_power_w": 650.0,
        "joules_per_million_tokens": 500_000.0,
    }


def test_what_one_rank_does_not_know_is_not_known() -> None:
    samples = torch.tensor([[10.0, 90.0, 300.0, math.nan], [math.nan, 60.0, math.nan, 2500.0]], dtype=torch.float64)
    fields = gpu_fields(samples, tokens=8000)
    assert fields == {
        "gpu_memory_gib": None,
        "gpu_utilization_percent": 75.0,
        "gpu_power_w": None,
        "joules_per_million_tokens": None,
    }
