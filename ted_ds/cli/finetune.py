"""`deepspeed launchers/finetune.sh --config RECIPE [--section.key=value ...]`."""

from __future__ import annotations

from collections.abc import Sequence

from ted_ds.cli.common import guarded
from ted_ds.cli.pretrain import run_command


def main(argv: Sequence[str]) -> int:
    """Runs a recipe of a task with labelled data; returns the exit code."""
    return guarded(lambda arguments: run_command(arguments, "finetune", "distilled"), argv)
