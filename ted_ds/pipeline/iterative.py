"""Depth in rounds: some blocks go, a short distillation heals what is left, more go (arXiv 2511.05085)."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from ted_ds.config.schema import RunConfig
from ted_ds.config.student_section import InitConfig
from ted_ds.job.files import write_atomically
from ted_ds.job.world import World, logger
from ted_ds.models.loading import meta_model
from ted_ds.models.structure import find_blocks
from ted_ds.pipeline.block_choice import read_choice
from ted_ds.pipeline.stage0 import CALIBRATION
from ted_ds.runs.report import aligned

ROUNDS = "rounds"
"""In a run's folder: a whole run for each healing, with a table and a plot over them."""


@dataclass(frozen=True)
class Round:
    """removed: numbers of the model that the first round began with. cut, healed: scores of held-out data."""

    blocks: int
    removed: tuple[int, ...]
    tokens: int
    cut: float
    healed: float


def heal_in_rounds(
    run: RunConfig, world: World, run_round: Callable[[RunConfig, World], dict[str, Any] | None]
) -> tuple[RunConfig, tuple[int, ...] | None]:
    """Runs the rounds of a recipe whose blocks are `iterative`, as far as they are not done; a collective.

    Returns the recipe whose student is cut out of what they left, and the teacher's number of each block of this; None
    if they did not begin with the teacher.
    """
    init = run.student.init
    assert init is not None and init.num_blocks is not None and run.teacher is not None
    trusted = run.student.trust_remote_code if init.model else run.teacher.trust_remote_code
    begun = meta_model(init.model or run.teacher.model, run.spec.kind, trust_remote_code=trusted)
    numbers = tuple(range(find_blocks(begun).num_blocks))
    depths = range(len(numbers) - init.round_blocks, init.num_blocks, -init.round_blocks)
    source, rounds = init.model, []
    for number, depth in enumerate(depths, 1):
        folder = run.output_dir / ROUNDS / f"{number:02d}"
        logger.info("round %d of %d: %d blocks -> %s", number, len(depths), depth, folder)
        summary = run_round(_recipe(run, folder, number, depth, source, trusted), world)
        gc.collect()  # engines and modules refer to each other: the next model must not find them in memory
        kept = world.on_main(partial(read_choice, folder / CALIBRATION))
        removed = tuple(block for i, block in enumerate(numbers) if i not in kept)
        numbers, source = tuple(numbers[i] for i in kept), str(folder / "student")
        assert summary is not None
        rounds.append(Round(depth, removed, summary["tokens"], *_scores(run, summary)))
    if rounds:
        world.on_main(lambda: _report(run, rounds))
    last = init.model_copy(update={"model": source, "blocks": "greedy"})
    last_recipe = _with_init(run, last, trusted if rounds else run.student.trust_remote_code)
    return last_recipe, numbers if init.model is None else None


def _recipe(run: RunConfig, folder: Path, number: int, depth: int, source: str | None, trusted: bool) -> RunConfig:
    """A round: `source` cut to `depth` blocks, and distilled by the recipe's logit losses, in another order of rows."""
    init = run.student.init
    assert init is not None and run.teacher is not None
    method = "ce" if run.method == "ce" else "kd"
    cut = InitConfig(model=source, num_blocks=depth, calibration_tokens=init.calibration_tokens)
    changes = {
        "method": method,
        "output_dir": folder,
        "seed": run.seed + number,
        "loss": run.loss.model_copy(update={"mse_alpha": 0.0}),
        # a cache of another method lacks what this one records, or has more
        "teacher": run.teacher if run.method == method else run.teacher.model_copy(update={"cache": None}),
        "data": run.data.model_copy(update={"prepared": run.prepared_folder}),
        "train": run.train.model_copy(update={"steps": init.round_steps, "epochs": None, "evaluate_every": 0}),
        "optimizer": run.optimizer.model_copy(
            update={"warmup_steps": min(run.optimizer.warmup_steps, init.round_steps // 10)}
        ),
    }
    return _with_init(run.model_copy(update=changes), cut, trusted if source else run.student.trust_remote_code)


def _with_init(run: RunConfig, init: InitConfig, trusted: bool) -> RunConfig:
    student = run.student.model_copy(update={"init": init, "trust_remote_code": trusted})
    return run.model_copy(update={"student": student})


def _scores(run: RunConfig, summary: dict[str, Any]) -> tuple[float, float]:
    name = _score(run)
    return summary[f"initial_{name}"], summary[name]


def _score(run: RunConfig) -> str:
    return f"validation_{run.spec.best or 'loss'}"


def _report(run: RunConfig, rounds: list[Round]) -> None:
    """rounds.json, rounds.png and a table on screen; on one rank."""
    folder, score = run.output_dir / ROUNDS, _score(run)
    rows = [("blocks", "without", "tokens", "after the cut", "healed")]
    for one in rounds:
        without = " ".join(map(str, one.removed))
        rows.append((str(one.blocks), without, f"{one.tokens:,}", f"{one.cut:.4f}", f"{one.healed:.4f}"))
    logger.info("rounds of healing, %s:\n%s", score, aligned(rows, left=2))
    content = {"score": score, "rounds": [asdict(one) for one in rounds]}
    write_atomically(folder / "rounds.json", json.dumps(content, indent=2) + "\n")
    _plot(rounds, score, folder / "rounds.png")


def _plot(rounds: list[Round], score: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    blocks = [one.blocks for one in rounds]
    axes.plot(blocks, [one.cut for one in rounds], "x", color="C3", label="after the cut")
    axes.plot(blocks, [one.healed for one in rounds], "o", color="C0", label="healed")
    for before, after in pairwise(rounds):
        axes.plot([before.blocks, after.blocks], [before.healed, after.cut], color="0.7", zorder=0)
    axes.vlines(blocks, [one.cut for one in rounds], [one.healed for one in rounds], color="0.7", zorder=0)
    axes.invert_xaxis()
    axes.set(xlabel="blocks", ylabel=score)
    axes.legend()
    figure.savefig(path, dpi=120)
