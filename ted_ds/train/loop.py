"""The loop: it knows steps, records and callbacks, and no mathematics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from ted_ds.batch import Batch
from ted_ds.distributed import World
from ted_ds.errors import TrainingError
from ted_ds.telemetry.meters import Meters
from ted_ds.telemetry.recorder import Recorder
from ted_ds.telemetry.timeline import phase
from ted_ds.train.step import train_step

NEVER = torch.iinfo(torch.int64).max


class Rows(Protocol):
    """The training rows of every optimizer step, a function of (seed, step), dealt to ranks and micro-batches."""

    def micro_batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of the 0-based `step`."""
        ...

    def tokens(self, step: int) -> int:
        """Real tokens of a step over all ranks."""
        ...


class FiniteGuard:
    """Remembers, on the device and without a host sync, the first step at which each term was not finite."""

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self._names = names
        self._first = torch.full((len(names),), NEVER, device=device)

    def watch(self, terms: torch.Tensor, step: int) -> None:
        """terms: this rank's [>= len(names)] terms of `step` (1-based)."""
        finite = torch.isfinite(terms[: len(self._names)])
        self._first = torch.where(finite, self._first, self._first.clamp_max(step))

    def check(self, world: World, skipped_at: int | None) -> None:
        """Raises TrainingError, on every rank alike, where something was not finite; a collective and a sync.

        skipped_at: the first step that DeepSpeed did not apply because a gradient was not finite.
        """
        first = world.min(self._first).tolist()
        bad = [(at, name) for at, name in zip(first, self._names, strict=True) if at != NEVER]
        if skipped_at is not None:
            bad.append((skipped_at, "gradients"))
        if bad:
            at = min(bad)[0]
            names = ", ".join(name for when, name in bad if when == at)
            raise TrainingError(
                f"{names} not finite at step {at}; the last checkpoint is intact: start in another output_dir with a "
                "lower optimizer.learning_rate, lower alphas of the loss, or a longer optimizer.warmup_steps"
            )


def run_steps(
    engine: Any,
    rows: Rows,
    world: World,
    recorder: Recorder,
    *,
    names: Sequence[str],
    start: int,
    steps: int,
    log_every: int,
    seed: int,
    evaluate: tuple[int, Callable[[int], dict[str, float]]] = (0, lambda step: {}),
    save: tuple[int, Callable[[int], None]] = (0, lambda step: None),
    step_inputs: Callable[[int], dict[str, Any]] = lambda step: {},
    meters: Meters | None = None,
) -> dict[str, Any]:
    """Trains from step `start` (0-based, steps already done) to `steps`; returns the last record.

    names: of the terms that the engine's module reports first; further terms are the pairs'.
    evaluate, save: (every, call): after every `every` steps and the last one, `call(steps done)` on every
    rank; what `evaluate` returns is recorded, and everything is recorded before it is saved.
    seed: with the step and the rank it decides what dropout draws, so that a resumed run draws the same.
    meters: what is measured and recorded beside the losses; None: all that needs no count of FLOPs.
    Raises TrainingError where a loss or a gradient is not finite, at the latest when it would be logged
    or saved.
    """
    meters = meters or Meters(world)
    guard = FiniteGuard(names, world.device)
    record: dict[str, Any] = {}
    engine.train()  # loaded models come in eval mode: without dropout, and without activation checkpointing
    skipped_before, skipped_at = engine.skipped_steps, None
    tokens = sum(rows.tokens(step) for step in range(start))
    with meters.running():
        for step in range(start, steps):
            torch.manual_seed(int(np.random.SeedSequence([seed, step, world.rank]).generate_state(1)[0]))
            learning_rate = float(engine.get_lr()[0])
            with phase("data"):
                batches = rows.micro_batches(step)
            terms = train_step(engine, batches, world, **step_inputs(step))
            done = step + 1
            tokens += rows.tokens(step)
            meters.add_step(batches, rows.tokens(step))
            guard.watch(terms, done)
            if skipped_at is None and engine.skipped_steps > skipped_before:
                skipped_at = done
            recorder.advance()
            evaluates, saves, logs = (_due(done, every, steps) for every in (evaluate[0], save[0], log_every))
            if not (evaluates or saves or logs):
                continue
            values = world.sum(terms).tolist()
            guard.check(world, skipped_at)
            record = {"step": done, "tokens": tokens, **dict(zip(names, values, strict=False))}
            if len(values) > len(names):
                record["layer_losses"] = values[len(names) :]
            record |= {"lr": learning_rate, "grad_norm": _grad_norm(engine), **meters.read()}
            if evaluates:
                record |= evaluate[1](done)
            recorder.log(record)
            if saves:
                save[1](done)
            meters.restart()
    return record


def _grad_norm(engine: Any) -> float | None:
    """The last step's global gradient norm before clipping; None under ZeRO-0 in float32, where DeepSpeed has none."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


def _due(done: int, every: int, steps: int) -> bool:
    return done == steps or (every > 0 and done % every == 0)
