"""What each method makes of a real pretrained model, over seeds, and what each part of the layer loss brings.

    python -m benchmarks.quality --setting A --model FOLDER --train TEXT --validation TEXT --work FOLDER [--json OUT]

Every run is `ted-ds distill` from one cut, `ted-ds init-student`'s, which all runs of a setting share. Runs that are
complete in --work are not run again, so a benchmark that was ended goes on; after --seconds no run is begun, and the
report has what there is. --jobs runs go on side by side on one GPU.

A method is tried at each of --rates with the first seed; the rate that was best there is run with the other seeds, and
the table has those. Settings are shapes of SmolLM2-135M (30 blocks of 576), but for D, which fits any model.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml
from matplotlib.figure import Figure

from benchmarks.report import parser_of, publish, table
from benchmarks.stage0 import SEQUENCE, TED_DS, run_command
from benchmarks.timing import environment

ROWS, MOST_CALIBRATED = 8, 4096
COLUMNS = ("method", "rate", "seeds", "loss", "spread", "lowest", "highest", "against_kd", "lambada")

SETTINGS: dict[str, dict[str, Any]] = {
    "A": {"num_blocks": 20},
    "B": {"hidden_size": 450},
    "C": {"num_blocks": 15, "hidden_size": 450},
    "D": {
        "config": {
            "model_type": "llama",
            "hidden_size": 96,
            "intermediate_size": 288,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "max_position_embeddings": SEQUENCE,
            "tie_word_embeddings": True,
        }
    },
}
"""Setting -> student.init. D: another width from a random start, for the quickstart's teacher."""

LONGER = "kd, 1.1 of the tokens"
FORMER = {"loss": {"layer_loss": "normalized_mse"}}
LEARNT = {"learn": "always"}
METHODS: dict[str, dict[str, Any]] = {
    "ce": {"method": "ce"},
    "kd": {"method": "kd"},
    "lwd": {"method": "lwd"},
    "ted": {"method": "ted", "filters": LEARNT},
    "lwd, normalized MSE": {"method": "lwd", **FORMER},
    "ted, normalized MSE": {"method": "ted", "filters": LEARNT, **FORMER},
    LONGER: {"method": "kd"},
    "lwd, cosine": {"method": "lwd", "loss": {"layer_loss": "cosine"}},
    "lwd, all pairs": {"method": "lwd", "filters": {"skip_last": 0}},
    "lwd, no fading": {"method": "lwd", "loss": {"layer_fade": 0}},
    "lwd, constant weight": {"method": "lwd", "loss": {"balance": "none"}},
    "lwd, share 0.3": {"method": "lwd", "loss": {"mse_alpha": 0.3}},
    "lwd, share 3": {"method": "lwd", "loss": {"mse_alpha": 3}},
    "lwd, fading over 0.25": {"method": "lwd", "loss": {"layer_fade": 0.25}},
    "lwd, fading over all": {"method": "lwd", "loss": {"layer_fade": 1}},
    "ted, filters not learnt": {"method": "ted", "filters": {**LEARNT, "steps": 1, "learning_rate": 1e-12}},
}
"""Method -> what its recipe changes. Normalized MSE: over all pairs with a constant weight of 10."""


class Study:
    """Runs in folders of --work."""

    def __init__(self, options: Any) -> None:
        self._options, self._work = options, Path(options.work) / options.setting
        self._deadline = time.monotonic() + options.seconds
        self.failed = 0

    def results(self, methods: Iterable[str]) -> list[dict[str, Any]]:
        """The scores of all runs: first those of the first seed at each rate, then the others."""
        first, *others = self._options.seeds
        start = self._start()
        with ThreadPoolExecutor(self._options.jobs) as pool:

            def run(cases: list[tuple[str, float, int]]) -> list[dict[str, Any]]:
                return [found for found in pool.map(lambda case: self._tried(start, *case), cases) if found]

            found = run([(method, rate, first) for method in methods for rate in self._options.rates])
            best = {row["method"]: row["rate"] for row in sorted(found, key=lambda row: row["loss"], reverse=True)}
            return found + run(
                [(method, best[method], seed) for seed in others for method in methods if method in best]
            )

    def _start(self) -> Path:
        """The cut that every run begins with."""
        folder: Path = self._work / "start"
        if (folder / "initial_student").exists():
            return folder
        self._ted_ds("init-student", folder, self._recipe(folder, "kd", self._options.rates[0], self._options.seeds[0]))
        return folder

    def _tried(self, start: Path, method: str, rate: float, seed: int) -> dict[str, Any] | None:
        """None for a run that failed, which is said, or was not begun; the others go on."""
        try:
            return self._run(start, method, rate, seed)
        except SystemExit as error:
            print(error, file=sys.stderr, flush=True)
            self.failed += 1
            return None

    def _run(self, start: Path, method: str, rate: float, seed: int) -> dict[str, Any] | None:
        folder = self._work / f"{method.replace(',', '').replace(' ', '-')}-{rate:g}-{seed}"
        share_cut(start, folder)
        path, recipe = folder.parent / f"{folder.name}.yaml", self._recipe(folder, method, rate, seed)
        if path.exists() and yaml.safe_load(path.read_text(encoding="utf-8")) != recipe:
            raise SystemExit(f"{path} is of other options: give another --work")
        if not (folder / "summary.json").exists():
            if time.monotonic() > self._deadline:
                return None
            self._ted_ds("distill", folder, recipe)
        summary = json.loads((folder / "summary.json").read_text())
        found = {"method": method, "rate": rate, "seed": seed, "loss": summary["validation_loss"]}
        found |= {"start": summary["initial_validation_loss"], "steps": summary["steps"]}
        found |= {"seconds": summary["wall_seconds"], "stage1_seconds": summary["stage1_seconds"]}
        if self._options.lambada and seed == self._options.seeds[-1] and method in tuple(METHODS)[:6]:
            found["lambada"] = self._lambada(folder / "student")
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        print(json.dumps(found), file=sys.stderr, flush=True)
        return found

    def _lambada(self, student: Path) -> float:
        options = self._options
        said = run_command(
            [*TED_DS, "evaluate", str(student), "--lambada", str(options.lambada), "--tokenizer", str(options.model)],
            options.device,
        )
        accuracy: float = json.loads(said)["lambada_accuracy"]
        return accuracy

    def _recipe(self, folder: Path, method: str, rate: float, seed: int) -> dict[str, Any]:
        options = self._options
        steps = options.tokens // (SEQUENCE * ROWS)
        if method == LONGER:
            steps = round(1.1 * steps)
        init = SETTINGS[options.setting]
        if "config" not in init:
            init = {**init, "calibration_tokens": min(MOST_CALIBRATED, options.tokens)}
        recipe: dict[str, Any] = {
            "output_dir": str(folder),
            "seed": seed,
            "deepspeed": "ds_configs/zero0.json",
            "teacher": {"model": str(options.model), "dtype": options.dtype, "sharding": "replicated"},
            "student": {"dtype": options.dtype, "init": init},
            "filters": {},
            "data": {
                "train": [str(options.train)],
                "validation": [str(options.validation)],
                "tokenizer": str(options.tokenizer or options.model),
                "prepared": str(self._work / "data"),
                "sequence_length": SEQUENCE,
            },
            "optimizer": {"learning_rate": rate, "warmup_steps": max(1, steps // 20)},
            "train": {"steps": steps, "global_batch_size": ROWS, "micro_batch_size": options.micro_batch_size}
            | {"evaluate_every": 0, "save_every": 0},
            "logging": {"tensorboard": False, "every": 5},
        }
        changes = METHODS[method]
        if changes["method"] == "ted":
            recipe["filters"] = {"steps": max(1, steps // 4), "token_fraction": 0.25}
        for key, value in changes.items():
            recipe[key] = {**recipe.get(key, {}), **value} if isinstance(value, dict) else value
        return recipe

    def _ted_ds(self, command: str, folder: Path, recipe: dict[str, Any]) -> None:
        self._work.mkdir(parents=True, exist_ok=True)
        path = self._work / f"{folder.name}.yaml"
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        run_command([*TED_DS, command, "--config", str(path)], self._options.device)


def share_cut(start: Path, folder: Path) -> None:
    """Gives a run's folder the initial student of another run of the same student.init."""
    for name in ("initial_student", "calibration"):
        if (start / name).exists() and not (folder / name).exists():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to((start / name).resolve())


def summed_up(results: list[dict[str, Any]], first_seed: int) -> list[dict[str, Any]]:
    """A row for each method and rate. Of the best rate: mean over the seeds after the first, standard deviation, and
    the mean difference from kd of the same seeds; of the others, the first seed's.
    """
    rows = []
    others = [found for found in results if found["seed"] != first_seed]
    kd = {found["seed"]: found["loss"] for found in others if found["method"] == "kd"}
    for method, rate in dict.fromkeys((found["method"], found["rate"]) for found in results):
        same = [found for found in results if (found["method"], found["rate"]) == (method, rate)]
        own = [found for found in same if found in others] or same
        losses = [found["loss"] for found in own]
        row = {"method": method, "rate": rate, "seeds": len(own), "loss": statistics.mean(losses)}
        row |= {"lowest": min(losses), "highest": max(losses)}
        row["spread"] = statistics.stdev(losses) if len(losses) > 1 else None
        against = [found["loss"] - kd[found["seed"]] for found in own if found["seed"] in kd]
        row["against_kd"] = statistics.mean(against) if against else None
        row["lambada"] = next((found["lambada"] for found in own if "lambada" in found), None)
        rows.append(row)
    return sorted(rows, key=lambda row: (row["seeds"] == 1, row["loss"]))


def draw_study(figure: Figure, rows: list[dict[str, Any]], results: list[dict[str, Any]], title: str) -> None:
    """A line for each method at its best rate: a point a seed."""
    axes = figure.subplots()
    shown = [row for row in rows if row["seeds"] > 1] or rows
    for i, row in enumerate(shown):
        own = [r["loss"] for r in results if (r["method"], r["rate"]) == (row["method"], row["rate"])]
        axes.plot(own, [i] * len(own), "o", color="C1" if row["method"] == "kd" else "C0")
        axes.plot([row["loss"]], [i], "|", color="black", markersize=14)
    axes.set_yticks(range(len(shown)), [row["method"] for row in shown])
    axes.set(title=title, xlabel="held-out loss, nats a token")


def main() -> None:
    """See the module."""
    parser = parser_of(__doc__)
    parser.add_argument("--setting", required=True, choices=SETTINGS)
    parser.add_argument(
        "--model", type=Path, required=True, help="the teacher's folder, a causal LM with its tokenizer"
    )
    for name in ("--train", "--validation"):
        parser.add_argument(name, type=Path, required=True, help="text")
    parser.add_argument("--tokenizer", type=Path, help="default: the model's")
    parser.add_argument("--lambada", type=Path, help="for the students of the last seed")
    parser.add_argument("--work", type=Path, required=True, help="where the runs go, and are found again")
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3], help="the first chooses rates")
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-4, 5e-4, 1e-3])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--micro-batch-size", type=int, default=ROWS)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=math.inf, help="after these no run is begun")
    options = parser.parse_args()
    study = Study(options)
    results = study.results(options.methods)
    rows = summed_up(results, options.seeds[0])

    def draw(figure: Figure) -> None:
        draw_study(figure, rows, results, f"{options.setting}: {SETTINGS[options.setting]}, {options.tokens:,} tokens")

    report = {
        "environment": environment(torch.device(options.device), "quality", sys.argv[1:]),
        "rows": rows,
        "runs": results,
    }
    publish(report, [table(rows, COLUMNS)], draw, options.json)
    if study.failed:
        raise SystemExit(f"{study.failed} runs failed, see above: the same command tries them again")


if __name__ == "__main__":
    main()
