"""`ted-ds bench --config RECIPE.yaml [--steps N] [--section.key=value ...]`: how fast a recipe trains here."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from datetime import timedelta
from pathlib import Path

from ted_ds.cli.common import guarded
from ted_ds.config.load import load_config
from ted_ds.config.schema import RunConfig

FOLDER = "bench"


def main(argv: Sequence[str]) -> int:
    """Tokens/s, MFU, phases and memory of a recipe's Stage II, over micro-batch sizes until memory ends.

    Prints a table, and writes it into OUTPUT_DIR/bench. On many ranks: `deepspeed launchers/bench.sh --config ..`, or
    launchers/slurm/benchmark.sbatch over several numbers of nodes. Returns the exit code.
    """
    return guarded(_bench, argv)


def _bench(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("ted-ds bench", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("--config", type=Path, required=True, help="the recipe, YAML")
    parser.add_argument("--steps", type=int, default=5, help="steps that are measured, of each kind (default 5)")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # launchers add it
    arguments, overrides = parser.parse_known_args(argv)
    if arguments.steps < 1:
        parser.error(f"--steps {arguments.steps} measures nothing: give 1 or more")
    run = load_config(arguments.config, overrides)
    with redirect_stdout(sys.stderr):  # what libraries print
        text = _measured(run, arguments.steps)
    if text:
        print(text, flush=True)
    return 0


def _measured(run: RunConfig, steps: int) -> str:
    from ted_ds.doctor.engines import choose_engines
    from ted_ds.doctor.throughput import measure_throughput
    from ted_ds.doctor.throughput_report import write_report
    from ted_ds.job.versions import commit, versions
    from ted_ds.job.world import init_world, lost_ranks_named, shut_down

    world = init_world(timedelta(minutes=run.train.timeout_minutes))
    folder = run.output_dir / FOLDER
    with lost_ranks_named(world):
        run = choose_engines(run, world)
        found = measure_throughput(run, world, folder / f"work-{world.size}", steps)
        environment = versions() | {"commit": commit(), "python": platform.python_version()}
        text = world.on_main(lambda: write_report(found, run, environment, folder))
        shut_down(world)
    return text if world.is_main else ""
