"""The loop: it knows steps, records and callbacks, and no mathematics."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ted_ds.data.loader import TrainingRows
from ted_ds.distributed import World
from ted_ds.errors import TrainingError
from ted_ds.telemetry.memory import peak_memory_gib
from ted_ds.telemetry.recorder import Recorder
from ted_ds.train.step import train_step

NEVER = torch.iinfo(torch.int64).max


class FiniteGuard:
    """Remembers, on the device and without a host sync, the first step at which each term was not finite."""

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self._names = names
        self._first = torch.full((len(names),), NEVER, device=device)

    def watch(self, terms: torch.Tensor, step: int) -> None:
        """terms: this rank's [>= len(names)] terms of `step` (1-based)."""
        finite = torch.isfinite(terms[: len(self._names)])
        self._first = torch.where(finite, self._first, self._first.clamp_max(step))

    def check(self, world: World, grad_norm: float | None, step: int) -> None:
        """Raises TrainingError, on every rank alike, where something was not finite; a collective and a sync."""
        first = world.min(self._first).tolist()
        bad = [(at, name) for at, name in zip(first, self._names, strict=True) if at != NEVER]
        if bad:
            at = min(bad)[0]
            names = ", ".join(name for when, name in bad if when == at)
            raise TrainingError(
                f"{names} not finite at step {at}; the last checkpoint is intact: lower optimizer.learning_rate or "
                "the loss's alphas, or lengthen optimizer.warmup_steps, and start again"
            )
        if grad_norm is not None and not math.isfinite(grad_norm):
            raise TrainingError(
                f"the gradient norm is {grad_norm} at step {step} while the losses are finite; the last checkpoint "
                "is intact: lower optimizer.learning_rate, or use float32, and start again"
            )


def run_steps(
    engine: Any,
    rows: TrainingRows,
    world: World,
    recorder: Recorder,
    *,
    names: Sequence[str],
    start: int,
    steps: int,
    tokens_per_step: int,
    log_every: int,
    callbacks: Sequence[tuple[int, Callable[[int], dict[str, float]]]] = (),
    step_inputs: Callable[[int], dict[str, Any]] = lambda step: {},
) -> dict[str, Any]:
    """Trains from step `start` (0-based, steps already done) to `steps`; returns the last record.

    names: of the terms that the engine's module reports first; further terms are the pairs'.
    callbacks: (every, call): after every `every` steps and the last one, `call(steps done)` on every rank;
    what it returns is recorded.
    Raises TrainingError where a loss or the gradient is not finite, at the latest when it would be logged
    or a callback would save it.
    """
    guard = FiniteGuard(names, world.device)
    record: dict[str, Any] = {}
    since, last = time.perf_counter(), start
    for step in range(start, steps):
        terms = train_step(engine, rows.micro_batches(step), world, **step_inputs(step))
        done = step + 1
        guard.watch(terms, done)
        recorder.advance()
        due = [call for every, call in callbacks if _due(done, every, steps)]
        if not due and not _due(done, log_every, steps):
            continue
        grad_norm = _grad_norm(engine)
        values = world.sum(terms).tolist()
        guard.check(world, grad_norm, done)
        seconds = (time.perf_counter() - since) / (done - last)
        record = {"step": done, "tokens": done * tokens_per_step, **dict(zip(names, values, strict=False))}
        if len(values) > len(names):
            record["layer_losses"] = values[len(names) :]
        record |= {
            "lr": float(engine.get_lr()[0]),
            "grad_norm": grad_norm,
            "step_ms": 1000 * seconds,
            "tokens_per_second": tokens_per_step / seconds,
            "mfu": None,
            "peak_memory_gib": peak_memory_gib(world.device),
        }
        for call in due:
            record |= call(done)
        recorder.log(record)
        since, last = time.perf_counter(), done
    return record


def _grad_norm(engine: Any) -> float | None:
    """The last step's global gradient norm before clipping; None under ZeRO-0 in float32, where DeepSpeed has none."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


def _due(done: int, every: int, steps: int) -> bool:
    return done == steps or (every > 0 and done % every == 0)
