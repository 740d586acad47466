"""What cuts leave of a real pretrained model before any training: held-out loss and LAMBADA, by ted_ds's own commands.

    python -m benchmarks.stage0 --model FOLDER --train TEXT --validation TEXT --work FOLDER [--lambada FILE]

Each cut is `ted-ds init-student` on the training text, then `ted-ds evaluate`. Cuts that have their row in --work are
not made again. Shares of blocks and widths are those of SmolLM2-135M (30 blocks of 576), for which it was written.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from matplotlib.figure import Figure

from benchmarks.report import bars, parser_of, publish, table
from benchmarks.timing import environment

TED_DS = [sys.executable, "-m", "ted_ds.cli.main"]
SEQUENCE = 256
DEPTHS, WIDTHS = (20, 15), (513, 450, 387)
PARTS = {"6 of 9 heads": {"num_heads": 6}, "768 of 1536 units": {"intermediate_size": 768}}
TOGETHER = {
    "width 450, 6 heads, 1024 units": {"hidden_size": 450, "num_heads": 6, "intermediate_size": 1024},
    "15 blocks, greedy, width 450": {"num_blocks": 15, "hidden_size": 450},
}
COLUMNS = ("cut", "loss", "lambada", "parameters_m", "seconds")


class Cuts:
    """Cuts of a model in folders of --work, and their scores."""

    def __init__(self, options: Any) -> None:
        self._options, self._work = options, options.work
        self.rows: list[dict[str, Any]] = []

    def whole(self) -> None:
        """Scores the model as it is."""
        if not self._found("whole"):
            self._score("whole", self._options.model, None)

    def _found(self, name: str) -> bool:
        """Whether an earlier start has left the row, which is then taken."""
        path = self._row_of(name)
        if path.exists():
            self.rows.append(json.loads(path.read_text(encoding="utf-8")))
        return path.exists()

    def _row_of(self, name: str) -> Path:
        path: Path = self._work / f"{name.replace(' ', '-')}.row.json"
        return path

    def _score(self, name: str, model: Path, seconds: float | None) -> None:
        """Adds a row, keeps it, and prints it."""
        command = [*TED_DS, "evaluate", str(model), "--data", str(self._options.validation), "--batch-size", "8"]
        command += ["--sequence-length", str(SEQUENCE), "--tokenizer", str(self._options.model)]
        command += ["--lambada", str(self._options.lambada)] if self._options.lambada else []
        found = json.loads(run_command(command, self._options.device))
        weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        row = {"cut": name, "loss": found["loss"], "parameters_m": weights / 4e6, "seconds": seconds}
        row["lambada"] = found.get("lambada_accuracy")
        self.rows.append(row)
        self._row_of(name).write_text(json.dumps(row) + "\n", encoding="utf-8")
        print(table([row], COLUMNS), file=sys.stderr, flush=True)

    def cut(self, name: str, init: Mapping[str, Any]) -> Path:
        """Makes a student by the command, and scores it; returns the run's folder."""
        folder: Path = self._work / name.replace(" ", "-")
        if self._found(name):
            return folder
        recipe = {
            "method": "kd",
            "output_dir": str(folder),
            "teacher": {"model": str(self._options.model), "dtype": "float32", "sharding": "replicated"},
            "student": {"dtype": "float32", "init": dict(init)},
            "data": {
                "train": [str(self._options.train)],
                "tokenizer": str(self._options.model),
                "prepared": str(self._work / "data"),
                "sequence_length": SEQUENCE,
            },
        }
        path = self._work / f"{folder.name}.yaml"
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        start = time.monotonic()
        run_command([*TED_DS, "init-student", "--config", str(path)], self._options.device)
        self._score(name, folder / "initial_student", time.monotonic() - start)
        return folder


def measure_width(cuts: Cuts) -> None:
    """Fills the table."""
    for width in WIDTHS:
        cuts.cut(f"width {width}, rotation", {"hidden_size": width})
    for name, sizes in (PARTS | TOGETHER).items():
        cuts.cut(name, sizes)


def measure_depth(cuts: Cuts) -> None:
    """Fills the table."""
    for blocks in DEPTHS:
        for policy in ("uniform", "influence"):
            cuts.cut(f"{blocks} blocks, {policy}", {"num_blocks": blocks, "blocks": policy})
    fewest = min(DEPTHS)
    init = {"num_blocks": fewest, "blocks": "greedy"}
    found = json.loads((cuts.cut(f"{fewest} blocks, greedy", init) / "calibration/blocks.json").read_text())
    order = [block for removed in found["removed"] for block in removed]
    for blocks in DEPTHS:
        if blocks != fewest:  # the first removals of the same search
            total = len(found["influence"])
            kept = sorted(set(range(total)) - set(order[: total - blocks]))
            cuts.cut(f"{blocks} blocks, greedy", {"blocks": kept})


def run_command(command: list[str], device: str) -> str:
    """What a command prints; ends the benchmark if it fails. device: cpu hides the GPU from it."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | hidden)
    if done.returncode:
        raise SystemExit(f"$ {' '.join(command)}\n{done.stderr[-3000:]}")
    return done.stdout


def main() -> None:
    """See the module."""
    parser = parser_of(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of a float32 causal LM with its tokenizer")
    for name in ("--train", "--validation"):
        parser.add_argument(name, type=Path, required=True, help="text")
    parser.add_argument("--lambada", type=Path)
    parser.add_argument("--cuts", nargs="+", default=["width", "depth"], choices=["width", "depth"])
    parser.add_argument("--work", type=Path, required=True, help="where the students go, and are found again")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    cuts = Cuts(options)
    cuts.whole()
    for what in options.cuts:
        {"depth": measure_depth, "width": measure_width}[what](cuts)
    rows = sorted(cuts.rows, key=lambda row: str(row["cut"]))

    def draw(figure: Figure) -> None:
        bars(figure.subplots(), {row["cut"]: row["loss"] for row in rows}, title="held-out loss", unit="nats a token")

    report = {"environment": environment(torch.device(options.device), "stage0", sys.argv[1:]), "rows": rows}
    publish(report, [table(rows, COLUMNS)], draw, options.json)


if __name__ == "__main__":
    main()
