"""Which of the teacher's blocks a shallower student keeps, if a sample of the training data decides."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from ted_ds.config.student_section import InitConfig
from ted_ds.job.world import logger
from ted_ds.models.layer_map import keep_blocks
from ted_ds.pipeline.calibration import Calibration, Trial
from ted_ds.runs.report import aligned

CHOICE, PLOT = "blocks.json", "blocks.png"

CANDIDATES = 8
"""How many blocks `greedy` tries to leave out in a round: those of the least influence."""


@dataclass(frozen=True)
class BlockChoice:
    """rounds: the teacher whole, and after each removal."""

    policy: str
    rows: int
    rounds: tuple[Trial, ...]

    @property
    def kept(self) -> tuple[int, ...]:
        """The teacher's blocks that stay, in order."""
        return tuple(block for block in range(len(self.rounds[0].influence)) if block not in self.rounds[-1].left_out)

    @property
    def removed(self) -> list[tuple[int, ...]]:
        """The blocks that each round but the first left out."""
        return [tuple(sorted(after.left_out - before.left_out)) for before, after in pairwise(self.rounds)]


def choose_blocks(init: InitConfig, calibration: Calibration) -> BlockChoice:
    """The blocks of `init`; a collective. Data decide if its policy says so, and show what it costs in any case.

    Raises ModelError if the teacher has fewer blocks than the student is to keep.
    """
    total, keep = calibration.num_blocks, init.num_blocks
    if not init.chooses_blocks or keep is None or keep >= total:
        kept = keep_blocks(init.blocks, keep, total)
        gone = [block for block in range(total) if block not in kept]
        with calibration.progress(trials=2 if gone else 1):
            rounds = calibration.trials([(), gone] if gone else [()])
    elif init.blocks == "influence":
        with calibration.progress(trials=2):
            rounds = by_influence(calibration, keep)
    else:
        with calibration.progress(trials=_greedy_trials(total, keep)):
            rounds = greedily(calibration, keep)
    policy = init.blocks if isinstance(init.blocks, str) else "number"
    return BlockChoice(policy, calibration.num_rows, tuple(rounds))


def choices_of_depths(init: InitConfig, calibration: Calibration, depths: Sequence[int]) -> dict[int, BlockChoice]:
    """By number of blocks: which of them stay; a collective. One search serves them all."""
    total, fewest = calibration.num_blocks, min(depths)
    if init.blocks == "influence":
        with calibration.progress(trials=1 + len(depths)):
            (whole,) = calibration.trials([()])
            trials = calibration.trials([_least(whole, total - depth) for depth in depths])
        # at the teacher's depth nothing was removed
        rounds = {depth: [whole, trial][: 1 + (depth < total)] for depth, trial in zip(depths, trials, strict=True)}
    else:
        with calibration.progress(trials=_greedy_trials(total, fewest)):
            search = greedily(calibration, fewest)
        rounds = {depth: search[: total - depth + 1] for depth in depths}
    return {depth: BlockChoice(str(init.blocks), calibration.num_rows, tuple(rounds[depth])) for depth in depths}


def _greedy_trials(total: int, keep: int) -> int:
    return 1 + sum(min(CANDIDATES, there) for there in range(keep + 1, total + 1))


def by_influence(calibration: Calibration, keep: int) -> list[Trial]:
    """Leaves out all blocks but the `keep` of the most influence, at once (ShortGPT, arXiv 2403.03853)."""
    (whole,) = calibration.trials([()])
    return [whole, *calibration.trials([_least(whole, calibration.num_blocks - keep)])]


def greedily(calibration: Calibration, keep: int) -> list[Trial]:
    """Leaves out, again and again, the block without which the task's loss is least, until `keep` are left.

    Each round tries the `CANDIDATES` blocks of the least influence on what reaches them by then.
    """
    rounds = calibration.trials([()])
    while calibration.num_blocks - len(rounds[-1].left_out) > keep:
        last = rounds[-1]
        tried = calibration.trials([{*last.left_out, block} for block in _least(last, CANDIDATES)])
        rounds.append(min(tried, key=lambda trial: trial.loss))
    return rounds


def _least(trial: Trial, count: int) -> list[int]:
    """The blocks of the least influence that are still there."""
    there = [block for block in range(len(trial.influence)) if block not in trial.left_out]
    return sorted(there, key=lambda block: trial.influence[block])[:count]


def write_choice(choice: BlockChoice, folder: Path) -> None:
    """Writes blocks.json and a plot into `folder`, and logs a table; on one rank."""
    logger.info("the blocks that go, by %s on %d rows:\n%s", choice.policy, choice.rows, _table(choice))
    losses = [trial.loss for trial in choice.rounds]
    content = {
        "policy": choice.policy,
        "rows": choice.rows,
        "kept": choice.kept,
        "removed": choice.removed,
        "losses": losses,
        "influence": choice.rounds[0].influence,
    }
    (folder / CHOICE).write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    _plot(choice, folder / PLOT)


def read_choice(folder: Path) -> tuple[int, ...]:
    """The blocks that are kept."""
    return tuple(json.loads((folder / CHOICE).read_text(encoding="utf-8"))["kept"])


def _table(choice: BlockChoice) -> str:
    rows = [("without block", "influence", "loss"), ("none", "", f"{choice.rounds[0].loss:.4f}")]
    for blocks, (before, after) in zip(choice.removed, pairwise(choice.rounds), strict=True):
        influence = " ".join(f"{before.influence[block]:.4f}" for block in blocks)
        rows.append((" ".join(map(str, blocks)), influence, f"{after.loss:.4f}"))
    return aligned(rows, left=1)


def _plot(choice: BlockChoice, path: Path) -> None:
    from matplotlib.figure import Figure

    influence, kept = choice.rounds[0].influence, choice.kept
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.bar(
        range(len(influence)), influence, color=["C0" if block in kept else "C3" for block in range(len(influence))]
    )
    left.set(xlabel="block (red: left out)", ylabel="influence, 1 - cosine", yscale="log")
    gone = [len(trial.left_out) for trial in choice.rounds]
    right.plot(gone, [trial.loss for trial in choice.rounds], marker="o")
    right.set(xlabel="blocks left out", ylabel="loss of the sample")
    figure.savefig(path, dpi=120)
