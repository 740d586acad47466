"""What the commands share: recipe arguments, and errors without a stack trace."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from ted_ds.config.load import load_config
from ted_ds.config.schema import RunConfig
from ted_ds.errors import ConfigError, TedError


def recipe_from(argv: Sequence[str], program: str) -> RunConfig:
    """The validated recipe of `--config FILE [--section.key=value ...]`; nothing heavy is imported yet."""
    parser = argparse.ArgumentParser(program, description="Runs a recipe.", allow_abbrev=False)
    parser.add_argument("--config", type=Path, required=True, help="the recipe, YAML")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # launchers add it
    arguments, overrides = parser.parse_known_args(argv)
    return load_config(arguments.config, overrides)


def printed(work: Callable[[], dict[str, Any] | None]) -> None:
    """Prints the result of `work`, if there is one, as JSON, alone on stdout: what libraries print goes to stderr.

    JSON has no nan: work refuses what is not finite.
    """
    with redirect_stdout(sys.stderr):
        result = work()
    if result is not None:
        print(json.dumps(result, indent=2, allow_nan=False))


def guarded(command: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Runs a command; a TedError becomes one line on stderr and its own exit code.

    A wrong recipe is wrong on every rank, so rank 0 alone says so.
    """
    try:
        return command(argv)
    except TedError as error:
        rank = os.environ.get("RANK", "0")
        if rank == "0" or not (isinstance(error, ConfigError) or error.said_by_main):
            print(f"ted_ds: {'' if rank == '0' else f'rank {rank}: '}{error}", file=sys.stderr, flush=True)
        torch = sys.modules.get("torch")
        if torch is not None and torch.distributed.is_initialized():
            # at exit the threads of a process group that is still there may abort the interpreter
            sys.stdout.flush()
            os._exit(error.exit_code)
        return error.exit_code
