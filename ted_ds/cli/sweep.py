"""`ted-ds sweep GRID.yaml --list | --missing | --index N [--section.key=value ...]`: runs of a job array."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ted_ds.cli.pretrain import run_to
from ted_ds.errors import ConfigError
from ted_ds.runs.report import aligned
from ted_ds.runs.sweep import SweepRun, read_sweep, state, unfinished


def main(argv: Sequence[str]) -> int:
    """Lists a grid's runs, prints which are still to be run, or runs one of them; returns the exit code."""
    parser = argparse.ArgumentParser(
        "ted-ds sweep",
        description=main.__doc__,
        epilog="--section.key=value after these sets a key of every index's recipe.",
        allow_abbrev=False,
    )
    parser.add_argument("grid", type=Path, metavar="GRID.yaml", help="recipe, settings and folder of the runs")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--list", action="store_true", help="a line an index: state, folder, settings")
    action.add_argument(
        "--missing",
        action="store_true",
        help="the indices that are not complete, running ones too, for sbatch --array=, e.g. 0,3-5; none: nothing",
    )
    action.add_argument("--index", type=int, metavar="N", help="runs this index, as `ted-ds distill` runs a recipe")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # launchers add it
    arguments, overrides = parser.parse_known_args(argv)
    sweep = read_sweep(arguments.grid, overrides)
    if arguments.index is not None:
        _run(arguments.grid, sweep, arguments.index)
    elif arguments.list:
        print(_table(sweep))
    elif indices := unfinished(sweep):
        print(indices)
    else:
        print(f"nothing is missing: all {len(sweep)} indices of {arguments.grid} are complete", file=sys.stderr)
    return 0


def _table(sweep: Sequence[SweepRun]) -> str:
    rows = [("index", "state", "folder", "settings")]
    for entry in sweep:
        settings = " ".join(f"{key}={value}" for key, value in entry.settings.items())
        rows.append((str(entry.index), state(entry.run), str(entry.run.output_dir), settings))
    return aligned(rows, left=4)


def _run(path: Path, sweep: Sequence[SweepRun], index: int) -> None:
    if not 0 <= index < len(sweep):
        raise ConfigError(f"{path}: there is no index {index}: it has 0 to {len(sweep) - 1}")
    run_to(sweep[index].run, "distilled")
