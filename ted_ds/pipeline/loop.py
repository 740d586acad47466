"""The loop of steps: it knows steps, records, and when a stage evaluates and saves; it knows no mathematics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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


class Hooks:
    """What a stage adds to the loop; each method is called on every rank."""

    def inputs(self, step: int) -> dict[str, Any]:
        """What the module's forward gets beside batch and counts at the 0-based `step`."""
        return {}

    def measured(self) -> dict[str, Any]:
        """What is recorded beside the losses of a step that is done."""
        return {}

    def evaluate(self, step: int) -> dict[str, float]:
        """Scores after `step` steps, which are recorded."""
        return {}

    def save(self, step: int) -> None:
        """Saves all after `step` steps; everything was recorded before."""


@dataclass(frozen=True)
class Steps:
    """From `start` steps that are done to `end`. What is due every so many steps is due at the end too; 0: only there.

    seed: with the step and the micro-batch it decides what dropout draws, so that a resumed run draws the same, on any
    number of ranks. max_skipped: see `FiniteGuard`.
    """

    start: int
    end: int
    log_every: int
    evaluate_every: int = 0
    save_every: int = 0
    seed: int = 0
    max_skipped: int = 0

    def due(self, done: int, every: int) -> bool:
        """Whether what happens every `every` steps happens after `done` of them."""
        return done == self.end or (every > 0 and done % every == 0)


def run_steps(
    engine: Any,
    rows: Rows,
    world: World,
    recorder: Recorder,
    steps: Steps,
    hooks: Hooks,
    *,
    names: Sequence[str],
    meters: Meters | None = None,
) -> None:
    """Trains, records, evaluates and saves; a collective.

    names: of the terms that the engine's module reports first; further terms are the pairs'.
    meters: what is measured and recorded beside the losses; None: all that needs no count of FLOPs.
    Raises TrainingError if more steps than `max_skipped` had a loss or a gradient that is not finite, at the
    latest when it would be logged or saved, and Stopped if `world.stop` was asked to end, after saving.
    """
    meters = meters or Meters(world)
    guard = FiniteGuard(engine, names, world, budget=steps.max_skipped)
    engine.train()  # loaded models come in eval mode: without dropout, and without activation checkpointing
    tokens = sum(rows.tokens(step) for step in range(steps.start))
    with world.stop.postponed(), meters.running():
        agreement = Agreement(world.stop, world.control)
        for step in range(steps.start, steps.end):
            learning_rate = float(engine.get_lr()[0])
            with phase("data"):
                batches = rows.micro_batches(step)
            done = step + 1
            before, watch = partial(_seed, steps.seed, step, world), partial(guard.watch, done)
            inputs = hooks.inputs(step)
            terms = train_step(engine, batches, world, before=before, watch=watch, **inputs)
            tokens += rows.tokens(step)
            meters.add_step(batches, rows.tokens(step), layers=inputs.get("fade", 1.0) > 0)
            guard.after_step(done)
            recorder.advance()
            ends = agreement.reached()
            every = (steps.evaluate_every, steps.save_every, steps.log_every)
            evaluates, saves, logs = (steps.due(done, e) for e in every)
            if not (evaluates or saves or logs or ends):
                continue
            values = world.sum(terms).tolist()
            guard.check(lambda at, index: _row_numbers(rows.micro_batches(at)[index]))
            # a run that only ends here records no line: an undisturbed run has none
            if evaluates or saves or logs:
                record = {"step": done, "tokens": tokens, **_terms(names, values), "lr": learning_rate}
                record |= {"grad_norm": _grad_norm(engine), **_skipped(engine), **hooks.measured(), **meters.read()}
                if evaluates:
                    record |= hooks.evaluate(done)
                    ends = ends or agreement.now()
                world.on_main(partial(recorder.log, record))
            if saves or ends:
                hooks.save(done)
                ends = ends or agreement.now()
            if ends:
                raise Stopped(f"{ends}: saved after step {done} of {steps.end}, the same command goes on from there")
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
