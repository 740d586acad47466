"""The loop: it knows steps, records and callbacks, and no mathematics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from ted_ds.batch import Batch
from ted_ds.data.loader import Rows
from ted_ds.errors import Stopped
from ted_ds.job.stop import Agreement
from ted_ds.job.world import World
from ted_ds.pipeline.guard import FiniteGuard
from ted_ds.pipeline.step import train_step
from ted_ds.telemetry.meters import Meters
from ted_ds.telemetry.recorder import Recorder
from ted_ds.telemetry.timeline import phase


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
    max_skipped: int,
    evaluate: tuple[int, Callable[[int], dict[str, float]]] = (0, lambda step: {}),
    save: tuple[int, Callable[[int], None]] = (0, lambda step: None),
    step_inputs: Callable[[int], dict[str, Any]] = lambda step: {},
    meters: Meters | None = None,
) -> None:
    """Trains from step `start` (0-based, steps already done) to `steps`.

    names: of the terms that the engine's module reports first; further terms are the pairs'.
    evaluate, save: (every, call): after every `every` steps and the last one, `call(steps done)` on every
    rank; what `evaluate` returns is recorded, and everything is recorded before it is saved.
    seed: with the step and the micro-batch it decides what dropout draws, so that a resumed run draws the same,
    on any number of ranks.
    max_skipped: see `FiniteGuard`.
    meters: what is measured and recorded beside the losses; None: all that needs no count of FLOPs.
    Raises TrainingError where more steps than `max_skipped` had a loss or a gradient that is not finite, at the
    latest when it would be logged or saved, and Stopped where `world.stop` was asked to end, after saving.
    """
    meters = meters or Meters(world)
    guard = FiniteGuard(engine, names, world, budget=max_skipped)
    engine.train()  # loaded models come in eval mode: without dropout, and without activation checkpointing
    tokens = sum(rows.tokens(step) for step in range(start))
    with world.stop.postponed(), meters.running():
        agreement = Agreement(world.stop, world.control)
        for step in range(start, steps):
            learning_rate = float(engine.get_lr()[0])
            with phase("data"):
                batches = rows.micro_batches(step)
            done = step + 1
            terms = train_step(
                engine,
                batches,
                world,
                before=partial(_seed, seed, step, world),
                watch=partial(guard.watch, done),
                **step_inputs(step),
            )
            tokens += rows.tokens(step)
            meters.add_step(batches, rows.tokens(step))
            guard.after_step(done)
            recorder.advance()
            ends = agreement.reached()
            evaluates, saves, logs = (_due(done, every, steps) for every in (evaluate[0], save[0], log_every))
            if not (evaluates or saves or logs or ends):
                continue
            values = world.sum(terms).tolist()
            guard.check(lambda at, index: _row_numbers(rows.micro_batches(at)[index]))
            if evaluates or saves or logs:  # where the run ends is no reason for a line that others do not have
                record = {"step": done, "tokens": tokens, **_terms(names, values), "lr": learning_rate}
                record |= {"grad_norm": _grad_norm(engine), **_skipped(engine), **meters.read()}
                if evaluates:
                    record |= evaluate[1](done)
                    ends = ends or agreement.now()
                world.on_main(partial(recorder.log, record))
            if saves or ends:
                save[1](done)
                ends = ends or agreement.now()
            if ends:
                raise Stopped(f"{ends}: saved after step {done} of {steps}, the same command goes on from there")
            meters.restart()
        agreement.close()


def _seed(seed: int, step: int, world: World, index: int) -> None:
    """Dropout is a function of (seed, step, micro-batch of the global batch): nothing of it needs to be saved."""
    numbers = np.random.SeedSequence([seed, step, index * world.size + world.rank]).generate_state(1)
    torch.manual_seed(int(numbers[0]))


def _terms(names: Sequence[str], values: list[float]) -> dict[str, Any]:
    """The named terms, and those of the pairs after them."""
    pairs = values[len(names) :]
    return dict(zip(names, values, strict=False)) | ({"layer_losses": pairs} if pairs else {})


def _skipped(engine: Any) -> dict[str, int]:
    return {"skipped_steps": engine.skipped_steps} if engine.skipped_steps else {}


def _row_numbers(batch: Batch) -> list[int]:
    assert batch.rows is not None
    return batch.rows.tolist()


def _grad_norm(engine: Any) -> float | None:
    """The last step's global gradient norm before clipping; None under ZeRO-0 in float32, where DeepSpeed has none."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


def _due(done: int, every: int, steps: int) -> bool:
    return done == steps or (every > 0 and done % every == 0)
