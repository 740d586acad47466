"""Reads a run's progress from its folder, without torch, so that a table of a hundred runs costs little."""

from __future__ import annotations

import json
import re
from typing import Any

from ted_ds.config.schema import RunConfig
from ted_ds.errors import CheckpointError


def finished(run: RunConfig) -> dict[str, Any] | None:
    """The run's summary.json if it is complete: summary and student exist and it has its steps; else None.

    Raises CheckpointError if summary.json cannot be read.
    """
    path = run.output_dir / "summary.json"
    if not path.exists() or not (run.output_dir / "student").exists():
        return None
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): delete it and start the run again, which writes it anew"
        ) from error
    # the steps of a recipe in epochs depend on its data; a folder is of one number of epochs
    return summary if run.train.epochs or summary["steps"] >= run.train.steps else None


def saved_step(run: RunConfig) -> int | None:
    """The step of Stage II from which the next start continues, 0 before the first checkpoint; None: never started."""
    latest = run.output_dir / "checkpoints" / "latest"
    named = latest.read_bytes().decode(errors="replace") if latest.exists() else ""
    if tag := re.fullmatch(r"step-(\d+)\s*", named):
        return int(tag[1])
    return 0 if (run.output_dir / "config.yaml").exists() else None
