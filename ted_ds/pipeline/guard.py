"""Losses and gradients that are not finite: the step is skipped, within a budget, and its cause named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ted_ds.errors import TrainingError
from ted_ds.job.world import World, logger

NEVER = torch.iinfo(torch.int64).max

MICRO_BATCHES = 1 << 20
"""More than a rank has in a step: a step and a micro-batch of it are one integer."""

SHOWN_ROWS = 8

APPLIED = "DeepSpeed has applied it, as it does without ZeRO, and under stage 1 and 2 in float32"


class FiniteGuard:
    """Remembers, on the device and without a host sync, the first micro-batch at which each term was not finite.

    DeepSpeed leaves a step out if the gradients' norm is not finite, under ZeRO-3, and under ZeRO-1 and 2 in
    bfloat16. Elsewhere it is applied, and nothing after it means anything: the budget is 0 there.

    names: of the terms that an engine's module reports first.
    budget: steps that may be left out in all of the run (`train.max_skipped_steps`).
    """

    def __init__(self, engine: Any, names: Sequence[str], world: World, *, budget: int) -> None:
        self._engine, self._names, self._world = engine, names, world
        self._applied = "" if _leaves_out(engine) else APPLIED
        self._budget = 0 if self._applied else budget
        self._never = torch.full((len(names),), NEVER, device=world.device)
        self._first = self._never
        self._skipped = engine.skipped_steps
        self._skipped_at: int | None = None

    def watch(self, step: int, index: int, terms: torch.Tensor) -> None:
        """terms: the [>= len(names)] terms of this rank's micro-batch `index` of `step` (1-based)."""
        finite = torch.isfinite(terms[: len(self._names)])
        self._first = torch.where(finite, self._first, self._first.clamp_max(step * MICRO_BATCHES + index))

    def after_step(self, step: int) -> None:
        """Notes whether DeepSpeed left `step` out: it knows without another sync."""
        if self._skipped_at is None and self._engine.skipped_steps > self._skipped:
            self._skipped_at = step

    def check(self, rows_of: Callable[[int, int], Sequence[int]]) -> None:
        """Logs what was left out since the last check; a collective and a sync.

        rows_of: (0-based step, micro-batch) -> the numbers of this rank's rows in it.
        Raises TrainingError, on every rank alike, if the budget is spent.
        """
        first = self._world.gather(self._first[None]).tolist()  # [ranks][names]
        at = min(map(min, first))
        if at == NEVER and self._skipped_at is None:
            return
        step, index = divmod(at, MICRO_BATCHES)
        if self._skipped_at is not None and (at == NEVER or self._skipped_at < step):
            what = f"gradients not finite at step {self._skipped_at}, where every loss was"
        else:
            rank = next(r for r, row in enumerate(first) if min(row) == at)
            terms = ", ".join(n for n, when in zip(self._names, first[rank], strict=True) if when == at)
            mine = list(rows_of(step - 1, index)) if self._world.rank == rank else []
            rows = self._world.gather_objects(mine)[rank]
            shown = ", ".join(map(str, rows[:SHOWN_ROWS])) + ", ..." * (len(rows) > SHOWN_ROWS)
            what = f"{terms} not finite at step {step} on rank {rank}, training rows {shown}"
        skipped = self._engine.skipped_steps
        if skipped > self._budget or skipped == self._skipped:
            why = self._applied or f"train.max_skipped_steps is {self._budget}"
            raise TrainingError(
                f"{what}; {why}; the last checkpoint is intact: look at those rows, or start in another output_dir "
                "with a lower optimizer.learning_rate, lower alphas of the loss, or a longer optimizer.warmup_steps"
            )
        if self._world.is_main:
            logger.warning("%s: left out, %d of train.max_skipped_steps %d", what, skipped, self._budget)
        self._first, self._skipped, self._skipped_at = self._never, skipped, None


def _leaves_out(engine: Any) -> bool:
    """Whether DeepSpeed looks at the gradients' norm before it applies them (seen in 0.19.8)."""
    stage = engine.zero_optimization_stage()
    return stage == 3 or (stage in (1, 2) and engine.bfloat16_enabled())
