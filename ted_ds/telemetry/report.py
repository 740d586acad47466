"""Finished runs side by side: a table and their curves."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ted_ds.config.tasks import TASKS
from ted_ds.errors import DataError
from ted_ds.telemetry.recorder import read_metrics

BEFORE, AFTER = ("run", "method", "steps", "tokens"), ("seconds", "peak GiB")


NO_SCORES = ("task", "method", "steps", "tokens", "wall_seconds", "stage1_seconds", "peak_memory_gib", "best_step")


def read_summary(folder: Path) -> dict[str, Any]:
    """A run's summary.json; DataError where the run is not finished."""
    path = folder / "summary.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): finish the run in {folder} first") from error


def summary_table(folders: Sequence[Path]) -> str:
    """One line a run, with a column for each score; one for the initial student above the first run from it."""
    summaries = [read_summary(folder) for folder in folders]
    names = list(dict.fromkeys(name for summary in summaries for name in _scores(summary)))
    # a `ce` run has an initial student of interest only where other methods started from the same one
    shared = {_cells(s, names, "initial_") for s in summaries if s["method"] != "ce"} - {("-",) * len(names)}
    rows: list[tuple[str, ...]] = [(*BEFORE, *map(_column, names), *AFTER)]
    for folder, summary in zip(folders, summaries, strict=True):
        initial = _cells(summary, names, "initial_")
        if initial in shared:
            shared.remove(initial)
            rows.append(("initial student", "-", "0", "0", *initial, "-", "-"))
        counts = (str(summary["steps"]), f"{summary['tokens']:,}")
        costs = (f"{summary['wall_seconds']:.0f}", f"{summary['peak_memory_gib']:.2f}")
        rows.append((folder.name, summary["method"], *counts, *_cells(summary, names, ""), *costs))
    return _aligned(rows, left=2)


def spread_table(folders: Sequence[Path]) -> str:
    """A line a task, method and score: over its runs (seeds, say) the mean, the standard deviation and the range."""
    summaries = [read_summary(folder) for folder in folders]
    names = list(dict.fromkeys(name for summary in summaries for name in _scores(summary)))
    rows: list[tuple[str, ...]] = [("task", "method", "runs", "score", "mean", "sd", "lowest", "highest")]
    for task, method in dict.fromkeys((summary["task"], summary["method"]) for summary in summaries):
        for name in names:
            values = [s[name] for s in summaries if (s["task"], s["method"]) == (task, method) and name in s]
            if values:
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                numbers = (statistics.mean(values), spread, min(values), max(values))
                rows.append((task, method, str(len(values)), _column(name), *(f"{value:.4f}" for value in numbers)))
    return _aligned(rows, left=2)


def _aligned(rows: Sequence[Sequence[str]], *, left: int) -> str:
    """Rows of cells as text, all but the first `left` columns flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def _column(name: str) -> str:
    return "perplexity" if name == "validation_perplexity" else name.removeprefix("validation_")


def _scores(summary: dict[str, Any]) -> list[str]:
    """The names of a run's scores: of a text's the perplexity alone, of a task's all that its held-out sets have."""
    if "validation_perplexity" in summary:
        return ["validation_perplexity"]
    return [
        name
        for name in summary
        if name not in NO_SCORES and not name.startswith(("initial_", "final_")) and not name.endswith("_thresh")
    ]


def _cells(summary: dict[str, Any], names: Sequence[str], prefix: str) -> tuple[str, ...]:
    values = [summary.get(prefix + name) for name in names]
    return tuple("-" if v is None else f"{v:.2f}" if abs(v) >= 1.5 else f"{v:.4f}" for v in values)


def plot_curves(folders: Sequence[Path], path: Path) -> None:
    """A held-out score (perplexity for text) and each loss term over steps, one line a run, as a PNG."""
    from matplotlib.figure import Figure

    records = [(folder.name, read_metrics(folder)) for folder in folders]
    tasks = [TASKS[read_summary(folder)["task"]] for folder in folders]
    score = next((f"validation_{task.best}" for task in tasks if task.best), "validation_perplexity")
    panels = (score, "pred_loss", "kl_loss", "layer_loss")
    figure = Figure(figsize=(12, 7), layout="constrained")
    for axes, name in zip(figure.subplots(2, 2).flat, panels, strict=True):
        for i, (run, lines) in enumerate(records):
            points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            if points:
                marker = "." if name == panels[0] else None
                axes.plot(*zip(*points, strict=True), color=f"C{i}", marker=marker, label=run)
        axes.set(title=name, xlabel="step", yscale="log" if name == "validation_perplexity" else "linear")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.savefig(path, dpi=110)
