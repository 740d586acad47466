"""Whether a better start stays ahead: cuts of a real pretrained model, healed on equal tokens, over seeds.

    python -m benchmarks.healing --model FOLDER --train TEXT --validation TEXT --work FOLDER [--json OUT]

By kd; and by lwd with other pairs or other filters. All by ted_ds's own commands. Runs that are complete in --work are
not run again, so a benchmark that was ended goes on. The rounds of `iterative` take their tokens from its budget.
Shapes are those of SmolLM2-135M (30 blocks of 576), for which it was written: about 10 minutes a run on 2 cores that
do nothing else.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from matplotlib.figure import Figure

from benchmarks.report import parser_of, publish, table
from benchmarks.stage0 import TED_DS, run_command
from benchmarks.timing import environment

SEQUENCE, ROWS = 256, 8
BLOCKS, WIDTH, CALIBRATION = 20, 450, 1024
ROUND_BLOCKS, ROUNDS, ROUND_STEPS = 2, 4, 6
COLUMNS = ("cut", "seeds", "start", "healed", "spread")

UNIFORM, GREEDY, ROTATION = f"{BLOCKS} blocks, uniform", f"{BLOCKS} blocks, greedy", f"width {WIDTH}, rotation"
ITERATIVE = f"{BLOCKS} blocks, iterative"
CUTS: dict[str, dict[str, Any]] = {
    UNIFORM: {"num_blocks": BLOCKS, "blocks": "uniform"},
    GREEDY: {"num_blocks": BLOCKS},
    ROTATION: {"hidden_size": WIDTH},
}
MATCHED_PAIRS, UNIFORM_PAIRS = f"{GREEDY}, lwd, matched pairs", f"{GREEDY}, lwd, uniform pairs"
ROTATED_FILTERS, RANDOM_FILTERS = f"{ROTATION}, lwd, rotated filters", f"{ROTATION}, lwd, random filters"
LAYER_WISE = (MATCHED_PAIRS, UNIFORM_PAIRS, ROTATED_FILTERS, RANDOM_FILTERS)


class Healing:
    """Runs in folders of --work."""

    def __init__(self, options: Any) -> None:
        self._options = options
        self._steps = options.tokens // (SEQUENCE * ROWS)

    def results(self) -> Iterator[dict[str, Any]]:
        """The scores of each cut and seed, as they come."""
        for seed in self._options.seeds:
            for name in [*CUTS, ITERATIVE, *LAYER_WISE]:
                if not self._options.cuts or name in self._options.cuts:
                    yield self._healed(name, seed)

    def _healed(self, name: str, seed: int) -> dict[str, Any]:
        folder = self._options.work / f"{name.replace(' ', '-')}-seed-{seed}"
        steps = self._steps
        if name == ITERATIVE:
            steps -= ROUNDS * ROUND_STEPS
            rounds = {"blocks": "iterative", "round_blocks": ROUND_BLOCKS, "round_steps": ROUND_STEPS}
            start: dict[str, Any] = {"init": {"num_blocks": BLOCKS, "calibration_tokens": CALIBRATION, **rounds}}
        elif name in (MATCHED_PAIRS, UNIFORM_PAIRS):
            cut = json.loads((self._cut(GREEDY).parent / "calibration/blocks.json").read_text())
            start = {"init": {"num_blocks": BLOCKS, "blocks": cut["kept"]}}
        elif name == ROTATED_FILTERS:
            start = {"init": {"calibration_tokens": CALIBRATION, **CUTS[ROTATION]}}
        else:  # the run does not know how this student was cut: lwd's filters at another width start at random
            start = {"model": str(self._cut(ROTATION if name == RANDOM_FILTERS else name))}
        recipe = self._recipe(folder, {"dtype": self._options.dtype, **start}) | {"seed": seed}
        if name in LAYER_WISE:
            recipe["method"] = "lwd"
        if name == UNIFORM_PAIRS:
            recipe["filters"] = {"layer_map": "uniform"}
        train = {"steps": steps, "global_batch_size": ROWS, "micro_batch_size": 4}
        recipe["train"] = train | {"evaluate_every": 0, "save_every": 0}
        recipe["optimizer"] = {"learning_rate": 2e-4, "warmup_steps": 5}
        self._run("distill", folder, recipe)
        summary = json.loads((folder / "summary.json").read_text())
        found = {"cut": name, "seed": seed, "steps": steps, "seconds": summary["wall_seconds"]}
        found |= {"start": summary["initial_validation_loss"], "healed": summary["validation_loss"]}
        if (rounds_file := folder / "rounds/rounds.json").exists():
            found["rounds"] = json.loads(rounds_file.read_text())["rounds"]
        print(json.dumps(found), file=sys.stderr, flush=True)
        return found

    def _cut(self, name: str) -> Path:
        """The initial student, the same for all seeds."""
        folder: Path = self._options.work / name.replace(" ", "-")
        init = {"calibration_tokens": CALIBRATION, **CUTS[name]}
        self._run("init-student", folder, self._recipe(folder, {"dtype": "float32", "init": init}))
        return folder / "initial_student"

    def _recipe(self, folder: Path, student: dict[str, Any]) -> dict[str, Any]:
        options = self._options
        return {
            "method": "kd",
            "output_dir": str(folder),
            "deepspeed": "ds_configs/zero0.json",
            "teacher": {"model": str(options.model), "dtype": options.dtype, "sharding": "replicated"},
            "student": student,
            "data": {
                "train": [str(options.train)],
                "validation": [str(options.validation)],
                "tokenizer": str(options.model),
                "prepared": str(options.work / "data"),
                "sequence_length": SEQUENCE,
            },
            "logging": {"tensorboard": False, "every": 5},
        }

    def _run(self, command: str, folder: Path, recipe: dict[str, Any]) -> None:
        path = self._options.work / f"{folder.name}.yaml"
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        run_command([*TED_DS, command, "--config", str(path)], self._options.device)


def summed_up(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each cut: mean over seeds, and the spread (highest - lowest) of what it was healed to."""
    rows = []
    for name in dict.fromkeys(found["cut"] for found in results):
        own = [found for found in results if found["cut"] == name]
        healed = [found["healed"] for found in own]
        start = statistics.mean(found["start"] for found in own)
        row = {"cut": name, "seeds": len(own), "start": start, "healed": statistics.mean(healed)}
        rows.append(row | {"spread": max(healed) - min(healed)})
    return rows


def draw_healing(
    figure: Figure, rows: list[dict[str, Any]], results: list[dict[str, Any]], *, title: str, unit: str
) -> None:
    """A line for each cut: where it started, and where each seed ended."""
    axes = figure.subplots()
    for i, row in enumerate(rows):
        own = [found["healed"] for found in results if found["cut"] == row["cut"]]
        axes.plot([row["start"]], [i], "x", color="C3")
        axes.plot(own, [i] * len(own), "o", color="C0")
    axes.set_yticks(range(len(rows)), [row["cut"] for row in rows])
    axes.set(title=title, xlabel=unit)


def main() -> None:
    """See the module."""
    parser = parser_of(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of a float32 causal LM with its tokenizer")
    for name in ("--train", "--validation"):
        parser.add_argument(name, type=Path, required=True, help="text")
    parser.add_argument("--work", type=Path, required=True, help="where the runs go, and are found again")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--cuts", nargs="+", help="names of some cuts alone")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    results = list(Healing(options).results())
    rows = summed_up(results)

    def draw(figure: Figure) -> None:
        title = f"cut (x), and healed on {options.tokens:,} tokens (o, by seed)"
        draw_healing(figure, rows, results, title=title, unit="nats a token")

    report = {
        "environment": environment(torch.device(options.device), "healing", sys.argv[1:]),
        "rows": rows,
        "runs": results,
    }
    publish(report, [table(rows, COLUMNS)], draw, options.json)


if __name__ == "__main__":
    main()
