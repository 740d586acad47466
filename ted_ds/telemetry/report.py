"""Finished runs side by side: a table and their curves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ted_ds.errors import DataError
from ted_ds.telemetry.recorder import read_metrics

COLUMNS = ("run", "method", "steps", "tokens", "perplexity", "seconds", "peak GiB")


def read_summary(folder: Path) -> dict[str, Any]:
    """A run's summary.json; DataError where the run is not finished."""
    path = folder / "summary.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): finish the run in {folder} first") from error


def summary_table(folders: Sequence[Path]) -> str:
    """One line a run, and one for the initial student above the first run that started from it."""
    summaries = [read_summary(folder) for folder in folders]
    # a `ce` run has an initial student of interest only where other methods started from the same one
    shared = {_perplexity(s, "initial_") for s in summaries if s["method"] != "ce"} - {"-"}
    rows: list[tuple[str, ...]] = [COLUMNS]
    for folder, summary in zip(folders, summaries, strict=True):
        initial = _perplexity(summary, "initial_")
        if initial in shared:
            shared.remove(initial)
            rows.append(("initial student", "-", "0", "0", initial, "-", "-"))
        counts = (str(summary["steps"]), f"{summary['tokens']:,}", _perplexity(summary, ""))
        costs = (f"{summary['wall_seconds']:.0f}", f"{summary['peak_memory_gib']:.2f}")
        rows.append((folder.name, summary["method"], *counts, *costs))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(w) if i > 1 else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _perplexity(summary: dict[str, Any], prefix: str) -> str:
    value = summary.get(f"{prefix}validation_perplexity")
    return "-" if value is None else f"{value:.2f}"


def plot_curves(folders: Sequence[Path], path: Path) -> None:
    """Held-out perplexity and each loss term over steps, one line a run, as a PNG."""
    from matplotlib.figure import Figure

    panels = ("validation_perplexity", "pred_loss", "kl_loss", "layer_loss")
    records = [(folder.name, read_metrics(folder)) for folder in folders]
    figure = Figure(figsize=(12, 7), layout="constrained")
    for axes, name in zip(figure.subplots(2, 2).flat, panels, strict=True):
        for i, (run, lines) in enumerate(records):
            points = [(line["step"], line[name]) for line in lines if line.get(name)]
            if points:
                marker = "." if name == panels[0] else None
                axes.plot(*zip(*points, strict=True), color=f"C{i}", marker=marker, label=run)
        axes.set(title=name, xlabel="step", yscale="log" if name == panels[0] else "linear")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.savefig(path, dpi=110)
