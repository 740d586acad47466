"""Cuts of a real encoder, fine-tuned on SST-2, before and after kd: accuracy on dev over seeds.

    python -m benchmarks.encoder --model FOLDER --train TSV --validation TSV --work FOLDER [--json OUT]

All by ted_ds's own commands: the encoder is fine-tuned for an epoch, cut, and healed by 100 steps. Runs that are
complete in --work are not run again. Sizes are those of all-MiniLM-L6-v2 (6 blocks of 384), for which it was written:
with 20,000 training rows 2 minutes a run on a core, and 5 for the teacher.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from matplotlib.figure import Figure

from benchmarks.healing import draw_healing, summed_up
from benchmarks.report import parser_of, publish, table
from benchmarks.stage0 import TED_DS, run_command
from benchmarks.timing import environment

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
        train = {"epochs": 1, "evaluate_every": "epoch"}
        return self._run("distill", "teacher", "ce", None, student, train, warmup_steps=30) / "student"

    def cut(self, name: str, teacher: Path) -> Path:
        """The initial student, the same for all seeds."""
        train = {"steps": STEPS, "evaluate_every": 0}
        folder = self._run("init-student", name, "kd", teacher, {"init": CUTS[name]}, train, warmup_steps=10)
        return folder / "initial_student"

    def heal(self, name: str, student: Path, teacher: Path, seed: int) -> dict[str, Any]:
        """Accuracy in percent before and after."""
        train, run = {"steps": STEPS, "evaluate_every": 0}, f"{name}, seed {seed}"
        folder = self._run("distill", run, "kd", teacher, {"model": str(student)}, train, warmup_steps=10, seed=seed)
        summary = json.loads((folder / "summary.json").read_text())
        scores = {"start": summary["initial_validation_accuracy"], "healed": summary["validation_accuracy"]}
        found = {"cut": name, "seed": seed} | {when: 100 * score for when, score in scores.items()}
        print(json.dumps(found), file=sys.stderr, flush=True)
        return found

    def _run(
        self,
        command: str,
        name: str,
        method: str,
        teacher: Path | None,
        student: dict[str, Any],
        train: dict[str, Any],
        *,
        warmup_steps: int,
        seed: int = 0,
    ) -> Path:
        options = self._options
        folder: Path = options.work / name.replace(" ", "-").replace(",", "")
        recipe: dict[str, Any] = {
            "task": "sst2",
            "method": method,
            "seed": seed,
            "output_dir": str(folder),
            "deepspeed": "ds_configs/zero0.json",
            "student": {"dtype": "float32", **student},
            "data": {
                "train": [str(options.train)],
                "validation": [str(options.validation)],
                "tokenizer": str(options.model),
                "prepared": str(options.work / "data"),
                "sequence_length": 64,
            },
            "optimizer": OPTIMIZER | {"warmup_steps": warmup_steps},
            "train": {"global_batch_size": ROWS, "micro_batch_size": ROWS, "save_every": 0, **train},
            "logging": {"tensorboard": False, "every": 20},
        }
        if teacher is not None:
            recipe["teacher"] = {"model": str(teacher), "sharding": "replicated", "dtype": "float32"}
        path = folder.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        run_command([*TED_DS, command, "--config", str(path)], self._options.device)
        return folder


def main() -> None:
    """See the module."""
    parser = parser_of(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of a pretrained encoder with its tokenizer")
    for name in ("--train", "--validation"):
        parser.add_argument(name, type=Path, required=True, help="SST-2, as GLUE has it")
    parser.add_argument("--work", type=Path, required=True, help="where the runs go, and are found again")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cuts", nargs="+", default=list(CUTS), choices=list(CUTS))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    encoder = Encoder(options)
    teacher = encoder.fine_tuned()
    students = {name: encoder.cut(name, teacher) for name in options.cuts}
    results = [encoder.heal(name, students[name], teacher, seed) for seed in options.seeds for name in students]
    rows = summed_up(results)

    def draw(figure: Figure) -> None:
        draw_healing(figure, rows, results, title="cut (x), and healed by kd (o, by seed)", unit="accuracy, percent")

    report = {
        "environment": environment(torch.device(options.device), "encoder", sys.argv[1:]),
        "rows": rows,
        "runs": results,
    }
    publish(report, [table(rows, COLUMNS)], draw, options.json)


if __name__ == "__main__":
    main()
