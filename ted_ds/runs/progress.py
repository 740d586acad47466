"""How far a run is, read from its folder: without torch, so that a table of a hundred runs costs nothing."""

from __future__ import annotations

import json
import re
from typing import Any

from ted_ds.config.schema import RunConfig
from ted_ds.errors import CheckpointError


def finished(run: RunConfig) -> dict[str, Any] | None:
    """The run's summary.json where it is complete: summary and student are there and its steps reached; else None.

    Raises CheckpointError where summary.json cannot be read.
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
    # what a recipe in epochs comes to is known with its data alone, and one folder holds one number of epochs
    return summary if run.train.epochs or summary["steps"] >= run.train.steps else None


def saved_step(run: RunConfig) -> int | None:
    """The step of Stage II that another start goes on from, 0 before the first checkpoint; None: never started."""
    latest = run.output_dir / "checkpoints" / "latest"
    named = latest.read_bytes().decode(errors="replace") if latest.exists() else ""
    if tag := re.fullmatch(r"step-(\d+)\s*", named):
        return int(tag[1])
    return 0 if (run.output_dir / "config.yaml").exists() else None
