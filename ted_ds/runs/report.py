"""Finished runs side by side: a table and their curves; a sweep's runs: mean and spread over their seeds."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ted_ds.config.tasks import TASKS
from ted_ds.errors import DataError
from ted_ds.runs.progress import finished
from ted_ds.runs.sweep import SweepRun
from ted_ds.telemetry.recorder import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BEFORE, AFTER = ("run", "method", "steps", "tokens"), ("seconds", "peak GiB")
SPREAD = ("mean", "sd", "lowest", "highest")
PERPLEXITY, SEED = "validation_perplexity", "seed"

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
    return aligned(rows, left=2)


@dataclass
class Group:
    """Runs that are alike but for their seed: their task and settings, dotted key -> value as text.

    finished: the summary of each complete run. unfinished: how many are not.
    """

    task: str
    settings: Mapping[str, str]
    finished: list[dict[str, Any]] = field(default_factory=list)
    unfinished: int = 0

    def values(self, score: str) -> list[float]:
        """The score of each finished run that has it; null, of what was not finite, is nan."""
        found = (summary[score] for summary in self.finished if score in summary)
        return [math.nan if value is None else value for value in found]


def spread_table(folders: Sequence[Path]) -> str:
    """A line a task, method and score: over its runs (seeds, say) the mean, the standard deviation and the range."""
    summaries = [read_summary(folder) for folder in folders]
    groups: dict[tuple[str, str], Group] = {}
    for s in summaries:
        groups.setdefault((s["task"], s["method"]), Group(s["task"], {"method": s["method"]})).finished.append(s)
    names = list(dict.fromkeys(name for summary in summaries for name in _scores(summary)))
    rows: list[tuple[str, ...]] = [("task", "method", "runs", "score", *SPREAD)]
    for group in groups.values():
        for name in names:
            if values := group.values(name):
                rows.append((group.task, *group.settings.values(), str(len(values)), _column(name), *_cells_of(values)))
    return aligned(rows, left=2)


def sweep_groups(sweep: Sequence[SweepRun]) -> list[Group]:
    """A sweep's runs in groups that share all settings but `seed`: task by task, in the order of first indices."""
    groups: dict[tuple[tuple[str, str], ...], Group] = {}
    for entry in sweep:
        settings = {key: value for key, value in entry.settings.items() if key != SEED}
        group = groups.setdefault(tuple(settings.items()), Group(entry.run.task, settings))
        if (summary := finished(entry.run)) is None:
            group.unfinished += 1
        else:
            group.finished.append(summary)
    tasks = list(dict.fromkeys(group.task for group in groups.values()))
    return sorted(groups.values(), key=lambda group: tasks.index(group.task))


def sweep_table(groups: Sequence[Group]) -> str:
    """A line a group: its runs, and of its task's main score the mean, the standard deviation and the range.

    The columns of settings are those that vary within a task. `2/3` runs: one of three is not finished. The best
    mean of each task is marked by `*`.
    """
    keys, best = _varying(groups), _best(groups)
    rows = [("task", *keys, "runs", "score", *SPREAD, "")]
    for group in groups:
        score, done = main_score(group.task), len(group.finished)
        runs = f"{done}/{done + group.unfinished}" if group.unfinished else str(done)
        settings = (group.settings.get(key, "-") for key in keys)
        mark = "*" if group in best else ""
        rows.append((group.task, *settings, runs, _column(score), *_cells_of(group.values(score)), mark))
    return aligned(rows, left=1 + len(keys))


def write_sweep_csv(groups: Sequence[Group], path: Path) -> None:
    """A line a group, with every setting of the grid but `seed`, and mean, sd, lowest and highest of every score.

    Scores have the names of summary.json. Empty cells: a setting that the group has not, a score that none of its
    runs has, the sd of a single run. Raises DataError where `path` cannot be written.
    """
    keys = dict.fromkeys(key for group in groups for key in group.settings)
    main = dict.fromkeys(main_score(group.task) for group in groups)
    names = main | dict.fromkeys(n for g in groups for summary in g.finished for n in _all_scores(summary))
    columns = [f"{name}_{what}" for name in names for what in SPREAD]
    best = _best(groups)

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["task", *keys, "runs", "unfinished", "best", *columns])
            for group in groups:
                numbers = [number for name in names for number in _spread(group.values(name))]
                settings = [group.settings.get(key) for key in keys]
                counts = [len(group.finished), group.unfinished, int(group in best)]
                table.writerow([group.task, *settings, *counts, *numbers])

    _put(path, write)


def main_score(task: str) -> str:
    """The name, in summary.json, of the score by which runs of the task compare: the perplexity of text."""
    return f"validation_{TASKS[task].best}" if TASKS[task].best else PERPLEXITY


def _best(groups: Sequence[Group]) -> list[Group]:
    """Of each task the group with the best mean: the lowest perplexity, the highest of other scores; never nan."""
    best: dict[str, tuple[float, Group]] = {}
    for group in groups:
        score = main_score(group.task)
        mean = _spread(group.values(score))[0]
        if mean is None or math.isnan(mean):
            continue
        worth = -mean if score == PERPLEXITY else mean
        if group.task not in best or worth > best[group.task][0]:
            best[group.task] = (worth, group)
    return [group for _, group in best.values()]


def _varying(groups: Sequence[Group]) -> list[str]:
    """The settings that have several values, or one and none, within a task; `method` first."""
    values: dict[tuple[str, str], set[str | None]] = {}
    keys = dict.fromkeys(("method", *(key for group in groups for key in group.settings)))
    for group in groups:
        for key in keys:
            values.setdefault((group.task, key), set()).add(group.settings.get(key))
    return [key for key in keys if any(len(v) > 1 for (_, other), v in values.items() if other == key)]


def _spread(values: Sequence[float]) -> tuple[float | None, float | None, float | None, float | None]:
    """Mean, sample standard deviation (None of a single value), lowest, highest; None of no values.

    All are nan where a value is not finite: a run that failed is not to look like one that was left out.
    """
    if not values:
        return None, None, None, None
    if not all(map(math.isfinite, values)):
        return math.nan, math.nan, math.nan, math.nan
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None, min(values), max(values)


def _cells_of(values: Sequence[float]) -> tuple[str, ...]:
    return tuple("-" if number is None else f"{number:.4f}" for number in _spread(values))


def aligned(rows: Sequence[Sequence[str]], *, left: int) -> str:
    """Rows of cells as text, all but the first `left` columns flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _column(name: str) -> str:
    return name.removeprefix("validation_")


def _scores(summary: dict[str, Any]) -> list[str]:
    """The names of a run's scores: of a text's the perplexity alone, of a task's all that its held-out sets have."""
    return [PERPLEXITY] if PERPLEXITY in summary else _all_scores(summary)


def _all_scores(summary: dict[str, Any]) -> list[str]:
    """The names of all scores on held-out data."""
    return [
        name
        for name in summary
        if name not in NO_SCORES and not name.startswith(("initial_", "final_")) and not name.endswith("_thresh")
    ]


def _cells(summary: dict[str, Any], names: Sequence[str], prefix: str) -> tuple[str, ...]:
    values = [summary.get(prefix + name) for name in names]
    return tuple("-" if v is None else f"{v:.2f}" if abs(v) >= 1.5 else f"{v:.4f}" for v in values)


def plot_curves(folders: Sequence[Path], path: Path) -> None:
    """A held-out score (perplexity for text) and each loss term over steps, one line a run, as a PNG.

    Raises DataError where `path` cannot be written.
    """
    from matplotlib.figure import Figure

    records = [(folder.name, read_metrics(folder)) for folder in folders]
    score = main_score(read_summary(folders[0])["task"])
    panels = (score, "pred_loss", "kl_loss", "layer_loss")
    figure = Figure(figsize=(12, 7), layout="constrained")
    for axes, name in zip(figure.subplots(2, 2).flat, panels, strict=True):
        for i, (run, lines) in enumerate(records):
            points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            if points:
                marker = "." if name == panels[0] else None
                axes.plot(*zip(*points, strict=True), color=f"C{i}", marker=marker, label=run)
        axes.set(title=name, xlabel="step", yscale="log" if name == PERPLEXITY else "linear")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    _put(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))


def plot_sweep(groups: Sequence[Group], path: Path) -> None:
    """A panel a task: of each group the mean with its standard deviation, and each run as a point, as a PNG.

    Raises DataError where `path` cannot be written.
    """
    from matplotlib.figure import Figure

    keys, tasks = _varying(groups), list(dict.fromkeys(group.task for group in groups))
    panels = [[group for group in groups if group.task == task] for task in tasks]
    heights = [1 + 0.4 * len(panel) for panel in panels]  # inches
    figure = Figure(figsize=(8, sum(heights)), layout="constrained")
    for axes, panel in zip(
        figure.subplots(len(panels), squeeze=False, height_ratios=heights).flat, panels, strict=True
    ):
        _draw(axes, panel, keys)
    _put(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))


def _draw(axes: Axes, groups: Sequence[Group], keys: Sequence[str]) -> None:
    """One task's groups, the first one on top."""
    score = main_score(groups[0].task)
    for row, group in enumerate(groups):
        values = group.values(score)
        mean, deviation, *_ = _spread(values)
        if mean is not None:
            axes.errorbar(mean, row, xerr=deviation, fmt="o", capsize=4, color="C0")
            axes.plot(values, [row] * len(values), ".", color="C1", zorder=3)  # above the mean
    labels = [", ".join(f"{key}={group.settings[key]}" for key in keys if key in group.settings) for group in groups]
    axes.set(title=groups[0].task, xlabel=_column(score), ylim=(len(groups) - 0.5, -0.5))
    axes.set_yticks(range(len(groups)), labels)
    axes.grid(alpha=0.3, axis="x")


def _put(path: Path, write: Callable[[Path], None]) -> None:
    """Writes a file under a temporary name and renames it; DataError where that cannot be."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        temporary.replace(path)
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror}): choose another place") from error
