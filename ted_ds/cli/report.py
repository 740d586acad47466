"""`ted-ds report RUN... [--spread] [--png FILE]`: finished runs side by side."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ted_ds.telemetry.report import plot_curves, spread_table, summary_table


def main(argv: Sequence[str]) -> int:
    """Prints a table of the runs, and draws their curves; returns the exit code."""
    parser = argparse.ArgumentParser("ted-ds report", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folders of finished runs")
    parser.add_argument("--spread", action="store_true", help="a line a method: mean and spread of its runs")
    parser.add_argument("--png", type=Path, help="where to draw the curves")
    arguments = parser.parse_args(argv)
    print((spread_table if arguments.spread else summary_table)(arguments.runs))
    if arguments.png:
        plot_curves(arguments.runs, arguments.png)
        print(f"curves: {arguments.png}")
    return 0
