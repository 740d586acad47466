"""`ted-ds quickstart`: the whole pipeline on the documentation and source of Python's standard library.

A teacher is trained from scratch, its blocks are halved, and ce, kd, lwd and ted train the same student
with the same budget, each by `deepspeed launchers/pretrain.sh`, two ranks under ZeRO-3.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ted_ds.config.shipped import shipped_folder
from ted_ds.errors import TrainingError

METHODS = ("ce", "kd", "lwd", "ted")


def main(argv: Sequence[str]) -> int:
    """Runs it all, or what is missing of it, and ends with a table and a PNG; returns the exit code."""
    parser = argparse.ArgumentParser("ted-ds quickstart", description=__doc__, allow_abbrev=False)
    parser.add_argument("--folder", type=Path, default=Path("runs/quickstart"), help="default: runs/quickstart")
    parser.add_argument("--ranks", type=int, default=2, help="processes (default 2)")
    arguments, overrides = parser.parse_known_args(argv)
    folder: Path = arguments.folder
    started = time.monotonic()

    from ted_ds.data.stdlib_corpus import write_stdlib_corpus

    if not (folder / "corpus").exists():
        print(f"corpus: {write_stdlib_corpus(folder / 'corpus')}", flush=True)
    data = [
        f"--data.train=[{folder}/corpus/train.jsonl]",
        f"--data.validation=[{folder}/corpus/validation.jsonl]",
        f"--data.tokenizer={folder}/tokenizer",
        f"--data.prepared={folder}/data",
    ]
    runs = [folder / "teacher", *(folder / method for method in METHODS)]
    for run in runs:
        recipe, method = ("quickstart_teacher", "ce") if run.name == "teacher" else ("quickstart", run.name)
        chosen = [f"--method={method}", f"--output_dir={run}", *data]
        if recipe == "quickstart":
            chosen.append(f"--teacher.model={folder}/teacher/student")
            chosen += _blocks_of(folder / METHODS[0]) if run.name != METHODS[0] else []
        _pretrain(arguments.ranks, shipped_folder() / f"launchers/recipes/{recipe}.yaml", [*chosen, *overrides])

    from ted_ds.runs.report import plot_curves, summary_table

    plot_curves(runs, folder / "report.png")
    table = summary_table(runs)
    (folder / "report.txt").write_text(table + "\n", encoding="utf-8")
    print(f"\n{table}\n\ncurves: {folder}/report.png   students: {folder}/METHOD/student")
    print(f"all of it took {time.monotonic() - started:.0f} s")
    return 0


def _blocks_of(run: Path) -> list[str]:
    """The override that takes over what a run's teacher found in its sample; none if its blocks were given."""
    from ted_ds.pipeline.block_choice import CHOICE, read_choice
    from ted_ds.pipeline.stage0 import CALIBRATION

    found = run / CALIBRATION
    return [f"--student.init.blocks={list(read_choice(found))}"] if (found / CHOICE).exists() else []


def _pretrain(ranks: int, recipe: Path, overrides: Sequence[str]) -> None:
    from torch.distributed.elastic.utils.distributed import get_free_port

    launcher = Path(sys.executable).with_name("deepspeed")
    # deepspeed's own port, 29500, may be another job's on this machine
    options = ["--num_gpus", str(ranks), "--master_port", str(get_free_port()), "--log_level", "error"]
    command = [str(launcher), *options, str(shipped_folder() / "launchers/pretrain.sh"), "--config", str(recipe)]
    print("$ deepspeed", *command[1:], *overrides, flush=True)
    code = subprocess.run([*command, *overrides]).returncode
    if code:
        raise TrainingError(f"{recipe.name} ended with exit code {code}; its messages are above")
