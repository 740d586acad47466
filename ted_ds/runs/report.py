"""Compares runs: a table and curves of finished runs, and the mean and spread of a sweep's runs over their seeds."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ted_ds.config.load import read_yaml
from ted_ds.config.tasks import TASKS
from ted_ds.errors import DataError
from ted_ds.runs.progress import finished
from ted_ds.runs.sweep import SweepRun
from ted_ds.telemetry.recorder import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SPREAD = ("mean", "sd", "lowest", "highest")
PERPLEXITY, SEED = "validation_perplexity", "seed"

NO_SCORES = ("task", "method", "steps", "tokens", "wall_seconds", "stage1_seconds", "peak_memory_gib", "best_step")


def read_summary(folder: Path) -> dict[str, Any]:
    """A run's summary.json. Raises DataError if the run is not finished."""
    path = folder / "summary.json"
    try:
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): finish the run in {folder} first") from error
    return summary


def summary_table(folders: Sequence[Path]) -> str:
    """A line for each run with all its scores, and a line for each initial student above the first run from it."""
    summaries = [read_summary(folder) for folder in folders]
    names = _all(_scores(summary) for summary in summaries)
    # the initial student of a `ce` run is shown only if runs of other methods started from the same one
    shared = {_cells(s, names, "initial_") for s in summaries if s["method"] != "ce"} - {("-",) * len(names)}
    rows = [("run", "method", "steps", "tokens", *map(_column, names), "seconds", "peak GiB")]
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
    """Runs that differ only in their seed: their task and settings, dotted key -> value as text.

    finished: the summary of each complete run. unfinished: the number of the others.
    """

    task: str
    settings: Mapping[str, str]
    finished: list[dict[str, Any]] = field(default_factory=list)
    unfinished: int = 0

    def values(self, score: str) -> list[float]:
        """The score of each finished run that has it; nan for null, which stands for a value that was not finite."""
        found = (summary[score] for summary in self.finished if score in summary)
        return [math.nan if value is None else value for value in found]

    def spread(self, score: str) -> tuple[float | None, float | None, float | None, float | None]:
        """Mean, sample standard deviation (None for one value), lowest, highest; None if there are no values.

        All are nan if one value is not finite: a run that failed must not look like a run that was left out.
        """
        values = self.values(score)
        if not values:
            return None, None, None, None
        if not all(map(math.isfinite, values)):
            return math.nan, math.nan, math.nan, math.nan
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return statistics.mean(values), deviation, min(values), max(values)

    def cells(self, score: str) -> Iterator[str]:
        """The spread as text."""
        return ("-" if number is None else f"{number:.4f}" for number in self.spread(score))


def spread_table(folders: Sequence[Path]) -> str:
    """A line for each task, method and score: mean, standard deviation and range over the runs (of several seeds)."""
    summaries = [read_summary(folder) for folder in folders]
    groups: dict[tuple[str, str], Group] = {}
    for s in summaries:
        groups.setdefault((s["task"], s["method"]), Group(s["task"], {"method": s["method"]})).finished.append(s)
    rows: list[tuple[str, ...]] = [("task", "method", "runs", "score", *SPREAD)]
    names = _all(_scores(summary) for summary in summaries)
    for (task, method), group in groups.items():
        for name in names:
            if values := group.values(name):
                rows.append((task, method, str(len(values)), _column(name), *group.cells(name)))
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
    tasks = [group.task for group in groups.values()]
    return sorted(groups.values(), key=lambda group: tasks.index(group.task))


def sweep_table(groups: Sequence[Group]) -> str:
    """A line for each group: its runs, and mean, standard deviation and range of its task's main score.

    The columns of settings are those that vary within a task. Runs `2/3`: one of three is not finished. `*` marks the
    best mean of each task.
    """
    keys, best = _varying(groups), _best(groups)
    rows = [("task", *keys, "runs", "score", *SPREAD, "")]
    for group in groups:
        score, done = main_score(group.task), len(group.finished)
        runs = f"{done}/{done + group.unfinished}" if group.unfinished else str(done)
        settings = (group.settings.get(key, "-") for key in keys)
        rows.append((group.task, *settings, runs, _column(score), *group.cells(score), "*" * (group in best)))
    return aligned(rows, left=1 + len(keys))


def write_sweep_csv(groups: Sequence[Group], path: Path) -> None:
    """A line for each group, with every setting of the grid but `seed`, and the spread of every score.

    Scores have the names of summary.json. A cell is empty if the group has no such setting, none of its runs has the
    score, or it is the deviation of a single run. Raises DataError if `path` cannot be written.
    """
    keys = _all(group.settings for group in groups)
    main = [main_score(group.task) for group in groups]
    names = _all([main, *(_all_scores(summary) for group in groups for summary in group.finished)])
    best = _best(groups)

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            columns = (f"{name}_{what}" for name in names for what in SPREAD)
            table.writerow(["task", *keys, "runs", "unfinished", "best", *columns])
            for group in groups:
                numbers = [number for name in names for number in group.spread(name)]
                settings = [group.settings.get(key) for key in keys]
                counts = [len(group.finished), group.unfinished, int(group in best)]
                table.writerow([group.task, *settings, *counts, *numbers])

    _put(path, write)


def main_score(task: str) -> str:
    """The name, in summary.json, of the score by which runs of the task compare: the perplexity of text."""
    return f"validation_{TASKS[task].best}" if TASKS[task].best else PERPLEXITY


def _by_task(groups: Sequence[Group]) -> dict[str, list[Group]]:
    return {task: list(own) for task, own in groupby(groups, lambda group: group.task)}


def _best(groups: Sequence[Group]) -> list[Group]:
    """The group of each task with the best mean: the lowest perplexity, the highest of other scores; never nan."""
    best = []
    for task, own in _by_task(groups).items():
        score = main_score(task)
        means = [
            (mean, group) for group in own if (mean := group.spread(score)[0]) is not None and not math.isnan(mean)
        ]
        if means:
            best.append((min if score == PERPLEXITY else max)(means, key=lambda pair: pair[0])[1])
    return best


def _varying(groups: Sequence[Group]) -> list[str]:
    """The settings that have several values, or one and none, within a task; `method` first."""
    keys = _all([["method"], *(group.settings for group in groups)])
    tasks = _by_task(groups).values()
    return [key for key in keys if any(len({group.settings.get(key) for group in own}) > 1 for own in tasks)]


def aligned(rows: Sequence[Sequence[str]], *, left: int) -> str:
    """Rows of cells as text, the first `left` columns aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _all(names: Iterable[Iterable[str]]) -> list[str]:
    """Each name once, in the order of first occurrence."""
    return list(dict.fromkeys(chain.from_iterable(names)))


def _column(name: str) -> str:
    return name.removeprefix("validation_")


def _scores(summary: dict[str, Any]) -> list[str]:
    """The names of a run's scores: only the perplexity of text, all held-out scores of other tasks."""
    return [PERPLEXITY] if PERPLEXITY in summary else _all_scores(summary)


def _all_scores(summary: dict[str, Any]) -> list[str]:
    """The names of all scores on held-out data."""
    others = [name for name in summary if not name.startswith(("initial_", "final_")) and not name.endswith("_thresh")]
    return [name for name in others if name not in NO_SCORES]


def _cells(summary: dict[str, Any], names: Sequence[str], prefix: str) -> tuple[str, ...]:
    values = [summary.get(prefix + name) for name in names]
    return tuple("-" if v is None else f"{v:.2f}" if abs(v) >= 1.5 else f"{v:.4f}" for v in values)


def _teacher_of(folder: Path) -> Path | None:
    """The folder of a run's teacher, by its recipe."""
    path = folder / "config.yaml"
    teacher = read_yaml(path).get("teacher") if path.exists() else None
    return Path(teacher["model"]).resolve() if teacher else None


def plot_curves(folders: Sequence[Path], path: Path) -> None:
    """A PNG of a held-out score (perplexity for text) and each loss term over steps, with a line for each run.

    A run whose student is the teacher of another of `folders` is one dashed line, where it ended: its own curve would
    leave no room for the others. Raises DataError if `path` cannot be written.
    """
    from matplotlib.figure import Figure

    records = [(folder, read_metrics(folder)) for folder in folders]
    teachers = {_teacher_of(folder) for folder in folders}
    score = main_score(read_summary(folders[0])["task"])
    figure = Figure(figsize=(12, 7), layout="constrained")
    panels = zip(figure.subplots(2, 2).flat, (score, "pred_loss", "kl_loss", "layer_loss"), strict=True)
    for axes, name in panels:
        seen: list[float] = []
        for i, (folder, lines) in enumerate(records):
            points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            values = [value for _, value in points]
            if (folder / "student").resolve() in teachers:
                if name == score and values:
                    axes.axhline(values[-1], color=f"C{i}", linestyle="--", label=f"{folder.name}, at its end")
            elif any(values):  # a method without the term has zeros
                seen += values
                marker = "." if name == score else None
                axes.plot(*zip(*points, strict=True), color=f"C{i}", marker=marker, label=folder.name)
        wide = name == PERPLEXITY and seen and max(seen) > 10 * min(seen)
        axes.set(title=name, xlabel="step", yscale="log" if wide else "linear")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    save_figure(figure, path)


def plot_sweep(groups: Sequence[Group], path: Path) -> None:
    """A PNG with a panel for each task: each group's mean with its standard deviation, and each run as a point.

    Raises DataError if `path` cannot be written.
    """
    from matplotlib.figure import Figure

    keys, tasks = _varying(groups), _by_task(groups)
    heights = [1 + 0.4 * len(own) for own in tasks.values()]  # inches
    figure = Figure(figsize=(8, sum(heights)), layout="constrained")
    panels = zip(figure.subplots(len(tasks), squeeze=False, height_ratios=heights).flat, tasks.items(), strict=True)
    for axes, (task, own) in panels:
        score = main_score(task)
        for row, group in enumerate(own):
            mean, deviation, *_ = group.spread(score)
            if mean is not None:
                axes.errorbar(mean, row, xerr=deviation, fmt="o", capsize=4, color="C0")
                values = group.values(score)
                axes.plot(values, [row] * len(values), ".", color="C1", zorder=3)  # above the mean
        labels = [", ".join(f"{key}={group.settings[key]}" for key in keys if key in group.settings) for group in own]
        axes.set(title=task, xlabel=_column(score), ylim=(len(own) - 0.5, -0.5))  # the first group on top
        axes.set_yticks(range(len(own)), labels)
        axes.grid(alpha=0.3, axis="x")
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    _put(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))


def _put(path: Path, write: Callable[[Path], None]) -> None:
    """Writes a file under a temporary name and renames it. Raises DataError if that is not possible."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        temporary.replace(path)
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror}): choose another place") from error
