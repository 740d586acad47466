"""The record of a run: metrics.jsonl, TensorBoard and one progress bar, all on rank 0."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm


class Recorder:
    """Writes a run's metrics; on ranks other than 0 (`enabled` False) it does nothing.

    folder: gets metrics.jsonl and tensorboard/. start_step: steps already done; lines and points of later
    steps, left by a run that died after its last checkpoint, are dropped.
    """

    def __init__(
        self, folder: Path, *, title: str, steps: int, start_step: int, tensorboard: bool, enabled: bool
    ) -> None:
        self._enabled = enabled
        self._board = None
        if not enabled:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= start_step]
        path.write_text("".join(kept), encoding="utf-8")
        self._metrics = path.open("a", encoding="utf-8", buffering=1)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)
        self._bar = tqdm(
            total=steps,
            initial=start_step,
            desc=title,
            unit="step",
            dynamic_ncols=True,
            smoothing=0.1,
            mininterval=0.2 if sys.stderr.isatty() else 10.0,  # seconds: a log file is not a terminal
        )

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._enabled:
            self._metrics.close()
            self._bar.close()
            if self._board is not None:
                self._board.close()

    def advance(self) -> None:
        """One step is done."""
        if self._enabled:
            self._bar.update()

    def log(self, metrics: dict[str, Any]) -> None:
        """One line of metrics.jsonl, one point in every TensorBoard curve; `metrics` has `step`.

        Of a field that is a dict, every part has a curve: `phase_ms/data`.
        """
        if not self._enabled:
            return
        self._metrics.write(json.dumps(metrics) + "\n")
        parts = {key: value for key, value in metrics.items() if isinstance(value, dict)}
        flat = metrics | {f"{key}/{name}": value for key, part in parts.items() for name, value in part.items()}
        scalars = {key: value for key, value in flat.items() if isinstance(value, float)}
        if self._board is not None:
            for key, value in scalars.items():
                self._board.add_scalar(key, value, metrics["step"])
        shown = ("loss", "pred_loss", "kl_loss", "layer_loss", "validation_perplexity", "tokens_per_second")
        self._bar.set_postfix({key: f"{scalars[key]:.4g}" for key in shown if key in scalars}, refresh=False)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl, oldest first."""
    return [json.loads(line) for line in _lines(folder / "metrics.jsonl")]


def _lines(path: Path) -> list[str]:
    """The whole lines of a log; the torn last one of a killed run is not one."""
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
