"""Reports of `ted-ds bench`: a file for each number of ranks, a table, and plots over sizes and over ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ted_ds.config.schema import RunConfig
from ted_ds.doctor.throughput import Throughput
from ted_ds.job.files import write_atomically
from ted_ds.runs.report import aligned, save_figure

SIZES = ("rows", "micro-batches", "micro-batch ms", "update ms", "step ms", "tokens/s", "a rank", "MFU", "GiB", "comm.")
SCALING = ("ranks", "rows", "tokens/s", "a rank", "efficiency", "MFU", "GiB", "comm.")


def write_report(found: Throughput, run: RunConfig, environment: Mapping[str, Any], folder: Path) -> str:
    """Writes ranks-N.json and ranks-N.png into `folder` and, if the recipe was measured on other numbers of ranks too,
    scaling.png; returns what the command prints.
    """
    folder.mkdir(parents=True, exist_ok=True)
    report = {"environment": dict(environment), "recipe": _comparable(run), **asdict(found)}
    path = folder / f"ranks-{found.ranks}.json"
    write_atomically(path, json.dumps(report, indent=2, allow_nan=False) + "\n")
    _plot_sizes(report, path.with_suffix(".png"))
    text = [_sizes_table(report), _summary(report), f"report: {path}"]
    every = [json.loads(other.read_text(encoding="utf-8")) for other in folder.glob("ranks-*.json")]
    alike = sorted((one for one in every if one["recipe"] == report["recipe"]), key=lambda one: int(one["ranks"]))
    if len(alike) > 1:
        _plot_scaling(alike, folder / "scaling.png")
        text += [scaling_table(alike), f"plot: {folder / 'scaling.png'}"]
    return "\n\n".join(text)


def _comparable(run: RunConfig) -> dict[str, Any]:
    """The recipe without the size that the benchmark looks for."""
    recipe = run.model_dump(mode="json")
    del recipe["train"]["micro_batch_size"]
    return recipe


def _sizes_table(report: Mapping[str, Any]) -> str:
    rows: list[tuple[str, ...]] = [("", *SIZES)]
    rows += [("fastest" if one == report["fastest"] else "", *_cells(one)) for one in report["sizes"]]
    if report["faded"] is not None:
        rows.append(("without the layer loss", *_cells(report["faded"])))
    return aligned(rows, left=1)


def _cells(size: Mapping[str, Any]) -> tuple[str, ...]:
    counts = (str(size["micro_batch_size"]), str(size["micro_batches"]))
    times = (f"{size[name]:.1f}" for name in ("micro_batch_ms", "update_ms", "step_ms"))
    rates = (f"{size[name]:,.0f}" for name in ("tokens_per_second", "a_rank"))
    return (*counts, *times, *rates, *_shared(size))


def _shared(size: Mapping[str, Any]) -> tuple[str, str, str]:
    return _percent(size["mfu"]), f"{size['peak_memory_gib']:.2f}", _percent(size["communication"])


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


def _summary(report: Mapping[str, Any]) -> str:
    size = report["fastest"]["micro_batch_size"]
    return (
        f"fastest: --train.micro_batch_size={size}; {report['ended']}; the recipe's steps take {report['hours']:.3g} h"
    )


def scaling_table(reports: Sequence[Mapping[str, Any]]) -> str:
    """A line for each number of ranks; efficiency: tokens/s of a rank against the smallest number's."""
    first = reports[0]["fastest"]["a_rank"]
    rows: list[tuple[str, ...]] = [SCALING]
    for report in reports:
        size = report["fastest"]
        rates = (f"{size[name]:,.0f}" for name in ("tokens_per_second", "a_rank"))
        efficiency = _percent(size["a_rank"] / first)
        rows.append((str(report["ranks"]), str(size["micro_batch_size"]), *rates, efficiency, *_shared(size)))
    return aligned(rows, left=0)


def _plot_sizes(report: Mapping[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    sizes = [one["micro_batch_size"] for one in report["sizes"]]
    for axes, name, title in ((left, "a_rank", "tokens/s of a rank"), (right, "peak_memory_gib", "peak GiB of a rank")):
        axes.plot(sizes, [one[name] for one in report["sizes"]], marker="o")
        axes.set(title=title, xlabel="rows of a micro-batch", ylim=(0, None))
        axes.grid(alpha=0.3)
    save_figure(figure, path)


def _plot_scaling(reports: Sequence[Mapping[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    ranks = [report["ranks"] for report in reports]
    axes.plot(ranks, [report["fastest"]["tokens_per_second"] for report in reports], marker="o", label="measured")
    axes.plot(ranks, [reports[0]["fastest"]["a_rank"] * n for n in ranks], linestyle=":", label="without any loss")
    axes.set(title="tokens/s", xlabel="ranks", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)
