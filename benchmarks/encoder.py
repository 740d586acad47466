"""Cuts of a real encoder, fine-tuned on SST-2 or RTE, before and after each method: accuracy on dev over seeds.

    python -m benchmarks.encoder --model FOLDER --train TSV --validation TSV --work FOLDER [--json OUT]

All by ted_ds's own commands: the encoder is fine-tuned, cut, and healed by 100 steps. Runs that are complete in --work
are not run again. Sizes are those of all-MiniLM-L6-v2 (6 blocks of 384), for which it was written: with 20,000 training
rows of SST-2 2 minutes a run on a core, and 5 for the teacher.
"""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch
import yaml
from matplotlib.figure import Figure

from benchmarks.healing import draw_healing, summed_up
from benchmarks.quality import LEARNT, share_cut
from benchmarks.report import parser_of, publish, table
from benchmarks.stage0 import TED_DS, run_command
from benchmarks.timing import environment
from ted_ds.config.choices import METHODS

CUTS: dict[str, dict[str, Any]] = {
    **{f"3 blocks, {policy}": {"num_blocks": 3, "blocks": policy} for policy in ("uniform", "greedy", "influence")},
    "width 288, channels": {"hidden_size": 288},
}
COLUMNS = ("cut", "seeds", "start", "healed", "spread")
ROWS, STEPS = 64, 100
OPTIMIZER = {"learning_rate": 1e-4, "weight_decay": 0.01, "betas": [0.9, 0.999], "schedule": "linear", "final_ratio": 0}


class Encoder:
    """Runs in folders of --work."""

    def __init__(self, options: Any) -> None:
        self._options = options

    def fine_tuned(self) -> Path:
        """The teacher."""
        student = {"pretrained": str(self._options.model), "init_from_pretrained": True, "dropout": None}
        train = {"epochs": self._options.epochs, "evaluate_every": "epoch"}
        return self._run("distill", "teacher", "ce", {"student": student, "train": train}, warmup_steps=30) / "student"

    def cut(self, name: str, teacher: Path) -> Path:
        """The folder of the initial student, the same for all methods and seeds."""
        return self._run("init-student", name, "kd", self._healing(name, teacher), warmup_steps=10)

    def heal(self, name: str, cut: Path, teacher: Path, method: str, seed: int) -> dict[str, Any]:
        """Accuracy in percent before and after."""
        label, recipe = f"{name}, {method}", self._healing(name, teacher)
        if method == "ted":
            recipe["filters"] = {**LEARNT, "steps": STEPS // 2}
        run = f"{label}, seed {seed}"
        share_cut(cut, self._folder(run))
        folder = self._run("distill", run, method, recipe, warmup_steps=10, seed=seed)
        summary = json.loads((folder / "summary.json").read_text())
        scores = {"start": summary["initial_validation_accuracy"], "healed": summary["validation_accuracy"]}
        found = {"cut": label, "seed": seed} | {when: 100 * score for when, score in scores.items()}
        print(json.dumps(found), file=sys.stderr, flush=True)
        return found

    def _healing(self, name: str, teacher: Path) -> dict[str, Any]:
        return {
            "teacher": {"model": str(teacher), "sharding": "replicated", "dtype": "float32"},
            "student": {"init": CUTS[name]},
            "train": {"steps": STEPS, "evaluate_every": 0},
        }

    def _folder(self, name: str) -> Path:
        folder: Path = self._options.work / name.replace(" ", "-").replace(",", "")
        return folder

    def _run(
        self, command: str, name: str, method: str, changes: dict[str, Any], *, warmup_steps: int, seed: int = 0
    ) -> Path:
        options, folder = self._options, self._folder(name)
        recipe: dict[str, Any] = {
            "task": options.task,
            "method": method,
            "seed": seed,
            "output_dir": str(folder),
            "deepspeed": "ds_configs/zero0.json",
            "data": {
                "train": [str(options.train)],
                "validation": [str(options.validation)],
                "tokenizer": str(options.model),
                "prepared": str(options.work / "data"),
                "sequence_length": options.sequence_length,
            },
            "optimizer": OPTIMIZER | {"warmup_steps": warmup_steps},
            "logging": {"tensorboard": False, "every": 20},
            **changes,
        }
        recipe["student"] = {"dtype": "float32", **changes["student"]}
        sizes = {"global_batch_size": ROWS, "micro_batch_size": ROWS, "save_every": 0}
        recipe["train"] = {**sizes, **changes["train"]}
        path = folder.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        run_command([*TED_DS, command, "--config", str(path)], options.device)
        return folder


def main() -> None:
    """See the module."""
    parser = parser_of(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of a pretrained encoder with its tokenizer")
    for name in ("--train", "--validation"):
        parser.add_argument(name, type=Path, required=True, help="rows of the task, as GLUE has them")
    parser.add_argument("--task", default="sst2", choices=["sst2", "rte"])
    parser.add_argument("--epochs", type=float, default=1, help="of the teacher")
    parser.add_argument("--sequence-length", type=int, default=64)
    parser.add_argument("--work", type=Path, required=True, help="where the runs go, and are found again")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cuts", nargs="+", default=list(CUTS), choices=list(CUTS))
    parser.add_argument("--methods", nargs="+", default=["kd"], choices=list(METHODS))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    encoder = Encoder(options)
    teacher = encoder.fine_tuned()
    cuts = {name: encoder.cut(name, teacher) for name in options.cuts}
    cases = list(product(options.seeds, cuts, options.methods))
    results = [encoder.heal(name, cuts[name], teacher, method, seed) for seed, name, method in cases]
    rows = summed_up(results)

    def draw(figure: Figure) -> None:
        draw_healing(figure, rows, results, title="cut (x), and healed (o, by seed)", unit="accuracy, percent")

    report = {
        "environment": environment(torch.device(options.device), "encoder", sys.argv[1:]),
        "rows": rows,
        "runs": results,
    }
    publish(report, [table(rows, COLUMNS)], draw, options.json)


if __name__ == "__main__":
    main()
