"""Measures a run as it trains: time, throughput, memory, the GPU's counters."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ted_ds.batch import Batch
from ted_ds.job.world import World
from ted_ds.telemetry.flops import BatchFlops, peak_flops
from ted_ds.telemetry.memory import peak_memory_gib, peak_reserved_gib, reset_peak
from ted_ds.telemetry.nvml import FIELDS, GpuCounters, gpu_fields
from ted_ds.telemetry.timeline import Timeline, recording


class Meters:
    """The meters of one loop, over the steps between two lines of metrics.jsonl.

    flops: of a micro-batch; None if they are not known.
    """

    def __init__(self, world: World, flops: BatchFlops | None = None) -> None:
        self._world, self._flops = world, flops
        self._timeline = Timeline(world.device)
        cuda = world.device.type == "cuda"
        self._gpu = GpuCounters(world.device) if cuda else None
        dtype = flops.dtype if flops else None
        self._peak = peak_flops(torch.cuda.get_device_name(world.device), dtype) if cuda and dtype else None

    @contextmanager
    def running(self) -> Iterator[None]:
        """The context of the loop: resets the peaks of memory, and records phases."""
        reset_peak(self._world.device)
        self.restart()
        with recording(self._timeline):
            yield

    def restart(self) -> None:
        """The next steps begin now: the time since `read` (evaluation, checkpoints) does not count."""
        self._steps = self._tokens = 0
        self._work = 0.0
        self._joules = self._gpu.sample()[-1] if self._gpu else 0.0
        self._since = time.perf_counter()

    def add_step(self, batches: Sequence[Batch], tokens: int, *, layers: bool = True) -> None:
        """A step is done: this rank's micro-batches, the real tokens of all ranks, whether it had a layer loss."""
        self._steps += 1
        self._tokens += tokens
        if self._flops is not None:
            without = {} if layers else {"layers": False}
            self._work += sum(self._flops.count(batch.input_ids.shape[1], **without) for batch in batches)

    def read(self) -> dict[str, Any]:
        """The measured fields of metrics.jsonl, over the steps since `restart`; a collective and a sync.

        phase_ms: this rank's mean per step. model_tflops (TFLOP/s of a rank) and mfu: the same on every rank, as their
        micro-batches have one shape. Memory: the highest of any rank since the loop began, evaluation and checkpoints
        included. For the GPU's counters see `gpu_fields`.
        """
        seconds = time.perf_counter() - self._since
        rate = None if self._flops is None else self._work / seconds
        return {
            "step_ms": 1000 * seconds / self._steps,
            "phase_ms": {name: total / self._steps for name, total in self._timeline.read().items()},
            "tokens_per_second": self._tokens / seconds,
            "model_tflops": None if rate is None else rate / 1e12,
            "mfu": None if rate is None or self._peak is None else rate / self._peak,
            **self._memory(),
            **self._counters(),
        }

    def _memory(self) -> dict[str, float]:
        device = self._world.device
        peaks = {"peak_memory_gib": peak_memory_gib(device)}
        if device.type == "cuda":
            peaks["peak_reserved_gib"] = peak_reserved_gib(device)
        highest = -self._world.min(-torch.tensor(list(peaks.values()), dtype=torch.float64))
        return dict(zip(peaks, highest.tolist(), strict=True))

    def _counters(self) -> dict[str, float | None]:
        if self._gpu is None:
            return {}
        *now, joules = self._gpu.sample()
        samples = torch.zeros(self._world.size, len(FIELDS), dtype=torch.float64)
        samples[self._world.rank] = torch.tensor([*now, joules - self._joules])
        return gpu_fields(self._world.sum(samples).cpu(), self._tokens)
