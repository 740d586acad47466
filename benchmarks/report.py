"""What every benchmark leaves: a table on screen, the report as JSON, and a plot beside it as PNG."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.timing import default_device

Draw = Callable[[Figure], None]


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="OUT", help="where the report goes; the plot beside it, as .png")
    parser.add_argument("--device", default=default_device(), choices=["cpu", "cuda"])
    return parser


def publish(report: Mapping[str, Any], tables: Sequence[str], draw: Draw, path: Path | None) -> None:
    """Prints the tables; writes `path` and the PNG beside it where a path is given."""
    print("\n\n".join(tables), flush=True)
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, lambda new: new.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8"))
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    draw(figure)
    _replace(path.with_suffix(".png"), lambda new: figure.savefig(new, dpi=110, format="png"))


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """The rows' values under `columns`, aligned; "-" where a row has none."""
    cells = [list(columns), *([_cell(row.get(name)) for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    return "\n".join(lines)


def bars(axes: Any, values: Mapping[str, float], *, title: str, unit: str, limit: float | None = None) -> None:
    """Horizontal bars, the first on top; a line at `limit`."""
    axes.barh(list(values), list(values.values()), color=[f"C{i}" for i in range(len(values))])
    axes.invert_yaxis()
    axes.set(title=title, xlabel=unit)
    if limit is not None:
        axes.axvline(limit, color="black", linestyle=":")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    new = path.with_name(path.name + ".new")
    write(new)
    new.replace(path)
