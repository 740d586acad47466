"""Writes a run's metrics.jsonl, TensorBoard files and progress bar, on rank 0, and reads metrics.jsonl."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from tqdm import tqdm

from ted_ds.errors import CheckpointError

METRICS = "metrics.jsonl"


class Recorder:
    """Writes a run's metrics on the rank that opens it; on the others it does nothing.

    folder: where metrics.jsonl and tensorboard/ go.
    """

    def __init__(self, folder: Path, *, title: str, steps: int, tensorboard: bool) -> None:
        self._folder, self._title, self._steps, self._tensorboard = folder, title, steps, tensorboard
        self._metrics: TextIO | None = None
        self._board: Any = None

    def open(self, start_step: int, kept_bytes: int) -> None:
        """Continues after the first `kept_bytes` of metrics.jsonl, which were there when `start_step` steps were done.

        Later lines, of a run that died after its last checkpoint, are dropped.
        Raises CheckpointError if the file is shorter.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / METRICS
        path.touch()
        if (there := path.stat().st_size) < kept_bytes:
            raise CheckpointError(
                f"{path} has {there} bytes, {kept_bytes} when step {start_step} was saved: put the file back, or "
                f"delete {self._folder} to start over"
            )
        os.truncate(path, kept_bytes)
        self._metrics = path.open("a", encoding="utf-8", buffering=1)
        if self._tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            first = start_step + 1 if kept_bytes else 0  # step 0's evaluation has a point too
            self._board = SummaryWriter(str(self._folder / "tensorboard"), purge_step=first)
        self._bar = tqdm(
            total=self._steps,
            initial=start_step,
            desc=self._title,
            unit="step",
            dynamic_ncols=True,
            smoothing=0.1,
            mininterval=0.2 if sys.stderr.isatty() else 10.0,  # seconds: a log file is not a terminal
        )

    def sync(self) -> int:
        """Flushes everything to the disk; returns the size of metrics.jsonl in bytes, 0 on the other ranks."""
        if self._metrics is None:
            return 0
        os.fsync(self._metrics.fileno())
        if self._board is not None:
            self._board.flush()
        return os.fstat(self._metrics.fileno()).st_size

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._metrics is not None:
            self._metrics.close()
            self._bar.close()
            if self._board is not None:
                self._board.close()

    def advance(self) -> None:
        """One step is done."""
        if self._metrics is not None:
            self._bar.update()

    def log(self, metrics: dict[str, Any]) -> None:
        """Writes a line of metrics.jsonl and a point of every TensorBoard curve. `metrics` has `step`.

        A field that is a dict has a curve for each part: `phase_ms/data`. Values that are not finite become null.
        """
        if self._metrics is None:
            return
        finite = json.loads(json.dumps(metrics), parse_constant=lambda name: None)
        self._metrics.write(json.dumps(finite, allow_nan=False) + "\n")
        parts = {key: value for key, value in metrics.items() if isinstance(value, dict)}
        flat = metrics | {f"{key}/{name}": value for key, part in parts.items() for name, value in part.items()}
        scalars = {key: value for key, value in flat.items() if isinstance(value, float)}
        if self._board is not None:
            for key, value in scalars.items():
                self._board.add_scalar(key, value, metrics["step"])
        shown = ("loss", "pred_loss", "kl_loss", "layer_loss", "validation_perplexity", "tokens_per_second")
        self._bar.set_postfix({key: f"{scalars[key]:.4g}" for key in shown if key in scalars}, refresh=False)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, oldest first, without the torn last line of a killed run."""
    path = folder / METRICS
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
