"""`ted-ds export --config RECIPE [--published]`: the last checkpoint's student, of a run that is not over."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ted_ds.cli.pretrain import run_command


def main(argv: Sequence[str]) -> int:
    """Exports a plain Hugging Face folder or, with --published, the layout of the paper's authors with filters."""
    parser = argparse.ArgumentParser("ted-ds export", description=main.__doc__, allow_abbrev=False, add_help=False)
    parser.add_argument("--published", action="store_true")
    arguments, rest = parser.parse_known_args(argv)
    return run_command(rest, "ted-ds export", "export-published" if arguments.published else "export")
