"""`ted-ds report RUN... [--spread] [--png FILE]`, `ted-ds report --sweep GRID.yaml [--csv FILE] [--png FILE]`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ted_ds.runs.report import (
    plot_curves,
    plot_sweep,
    spread_table,
    summary_table,
    sweep_groups,
    sweep_table,
    write_sweep_csv,
)
from ted_ds.runs.sweep import read_sweep, unfinished


def main(argv: Sequence[str]) -> int:
    """Prints a table of runs, or of a sweep's groups of seeds, and draws them; returns the exit code."""
    parser = argparse.ArgumentParser("ted-ds report", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="output folders of finished runs")
    parser.add_argument("--spread", action="store_true", help="a line a method: mean and spread of its runs")
    parser.add_argument(
        "--sweep", type=Path, metavar="GRID.yaml", help="all runs of a grid, and --section.key=value as `sweep` had it"
    )
    parser.add_argument("--csv", type=Path, help="where to write a sweep's groups with all scores")
    parser.add_argument("--png", type=Path, help="where to draw the runs' curves, or a sweep's groups")
    arguments, overrides = parser.parse_known_args(argv)
    if bool(arguments.runs) == bool(arguments.sweep):
        parser.error("give RUN..., or --sweep GRID.yaml")
    if arguments.sweep:
        if arguments.spread:
            parser.error("--spread is for RUN..., --sweep has the spread anyway")
        _report_sweep(arguments, overrides)
        return 0
    if arguments.csv or overrides:
        parser.error(f"{'--csv' if arguments.csv else overrides[0]} is for --sweep")
    print((spread_table if arguments.spread else summary_table)(arguments.runs))
    if arguments.png:
        plot_curves(arguments.runs, arguments.png)
        print(f"curves: {arguments.png}")
    return 0


def _report_sweep(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    sweep = read_sweep(arguments.sweep, overrides)
    groups = sweep_groups(sweep)
    print(sweep_table(groups))
    if indices := unfinished(sweep):
        print(f"unfinished indices, not in the means: {indices}")
    if arguments.csv:
        write_sweep_csv(groups, arguments.csv)
        print(f"scores: {arguments.csv}")
    if arguments.png:
        plot_sweep(groups, arguments.png)
        print(f"groups: {arguments.png}")
