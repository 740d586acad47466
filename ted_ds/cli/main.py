"""`ted-ds COMMAND ...`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module

from ted_ds.cli.common import guarded

COMMANDS = {
    "doctor": "is this machine, or this job on all its ranks, ready: versions, devices, network, memory, disk",
    "bench": "how fast a recipe trains here: tokens/s, MFU, memory over micro-batch sizes and ranks",
    "prepare": "text into packed blocks, ahead of a run",
    "init-student": "Stage 0: cut the initial student from the teacher",
    "learn-filters": "Stage I: learn the teacher's and the student's filters",
    "distill": "all stages to the distilled student, as the launchers do",
    "export": "the last checkpoint's student as a Hugging Face folder, of a run that is not over",
    "evaluate": "perplexity, LAMBADA or a task's metrics of a Hugging Face folder",
    "sweep": "the runs of a grid, for a job array: list them, which are missing, run one",
    "report": "table and curves of finished runs, or of a sweep",
    "quickstart": "the whole pipeline on an embedded corpus",
}
GOALS = {"export": "export", "init-student": "student", "learn-filters": "filters", "distill": "distilled"}


def main() -> None:
    """Entry point of the console script."""
    command, argv = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    if command not in COMMANDS:
        width = max(map(len, COMMANDS))
        print(
            "usage: ted-ds COMMAND ...\n",
            *(f"  {name:{width}}  {what}" for name, what in COMMANDS.items()),
            sep="\n",
        )
        sys.exit(0 if command in ("-h", "--help") else f"\nted-ds: unknown command {command!r}")
    sys.exit(guarded(_command(command), argv))


def _command(name: str) -> Callable[[Sequence[str]], int]:
    if name in GOALS:
        return partial(import_module("ted_ds.cli.pretrain").run_command, program=f"ted-ds {name}", goal=GOALS[name])
    command: Callable[[Sequence[str]], int] = import_module(f"ted_ds.cli.{name}").main
    return command


if __name__ == "__main__":
    main()
