"""What is done to a rank's process before it starts, so that a test can meet it at a certain moment."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

SAVED_EVERY = 3

SLOW_S = 0.7
"""Long enough to be met, and no longer."""


def _slowed(call: Any, what: str, *args: Any, **kwargs: Any) -> Any:
    os.write(2, f"{what}\n".encode())
    time.sleep(SLOW_S)
    return call(*args, **kwargs)


def slow_evaluation(rank: int) -> None:
    """Says `evaluating` and takes its time."""
    from ted_ds.tasks import text

    text.held_out_perplexity = partial(_slowed, text.held_out_perplexity, "evaluating")  # type: ignore[assignment]


def slow_saving(rank: int) -> None:
    """Says `saving` as each file is brought to the disk, and takes its time."""
    from ted_ds.pipeline import checkpoints as store

    store._to_disk = partial(_slowed, store._to_disk, "saving")  # type: ignore[assignment]


def _at_step(step: int, rank: int, action: Any, this: int) -> None:
    from ted_ds.data.loader import TrainingRows

    rows = TrainingRows.micro_batches

    def micro_batches(self: Any, at: int) -> Any:
        if at == step and this == rank:
            os.write(2, f"rank {rank} is at step {step}\n".encode())
            action()
        return rows(self, at)

    TrainingRows.micro_batches = micro_batches  # type: ignore[method-assign]


def _raise() -> None:
    raise ZeroDivisionError("a bug")


def _refuse() -> None:
    from ted_ds.errors import DataError

    raise DataError("row 7 is no text: mend it")


def errs(rank: int) -> None:
    """Rank 1 ends at step 3 by a mistake of the user's, which the others do not see."""
    _at_step(3, 1, _refuse, rank)


def hangs(rank: int) -> None:
    """Rank 1 waits in Python at step 3, for ever."""
    _at_step(3, 1, partial(time.sleep, 1e6), rank)


def has_a_bug(rank: int) -> None:
    """Rank 1 raises at step 3 what no one expects."""
    _at_step(3, 1, _raise, rank)


def dies_after_a_best(rank: int) -> None:
    """Every rank is killed once a best student is kept at a step that no checkpoint follows at once."""
    from ted_ds.pipeline.best import BestStudent

    keep = BestStudent.keep

    def kept(self: Any, student: Any, step: int, scores: Any) -> None:
        keep(self, student, step, scores)
        if step % SAVED_EVERY:
            os.kill(os.getpid(), signal.SIGKILL)

    BestStudent.keep = kept  # type: ignore[method-assign]


def bad_rows(rank: int) -> None:
    """Losses of steps 3 and 5 (0-based) are nan on rank 1."""
    import torch

    from ted_ds.distill.distillation_model import DistillationModel

    steps = iter(range(1 << 20))
    forward = DistillationModel.forward

    def spoilt(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = forward(self, *args, **kwargs)
        if self.training and rank == 1 and next(steps) // 2 in (3, 5):  # two micro-batches a step
            loss, terms = found
            return loss * torch.nan, terms * torch.nan
        return found

    DistillationModel.forward = spoilt  # type: ignore[method-assign]


def waits_for(path: Path, rank: int) -> None:
    """Rank 0 waits at step 3 until a file is there."""
    _at_step(3, 0, lambda: _until(path), rank)


def _until(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)
