"""Depth and width together: of the shapes within a number of parameters, the one with the least loss on a sample."""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ted_ds.config.student_section import InitConfig
from ted_ds.config.tasks import Kind
from ted_ds.errors import ModelError
from ted_ds.job.world import World, logger
from ted_ds.models.channels import Measurements
from ted_ds.models.cut_plan import find_roles, plan_cut
from ted_ds.models.families import Part, sizes_of
from ted_ds.models.loading import meta_model
from ted_ds.models.pruning import units_that_stay
from ted_ds.models.structure import find_blocks
from ted_ds.pipeline.block_choice import BlockChoice, choices_of_depths
from ted_ds.pipeline.calibration import Calibration
from ted_ds.pipeline.width_hooks import Narrowing
from ted_ds.runs.report import aligned

SHAPES = "shapes.json"

DEPTHS = 5
"""How many depths are tried, from the least that the budget allows at the teacher's width to the teacher's."""

WIDTHS = (7 / 8, 3 / 4, 5 / 8, 1 / 2)
"""Shares of the teacher's width that are tried beside it, if its hidden states can be rotated."""

LEAST_UNITS = 1 / 4
"""Share of the teacher's FFN units below which a shape is not tried."""


@dataclass(frozen=True)
class Shape:
    """A student's sizes; hidden_size and intermediate_size: None as the teacher's.

    Once tried: loss, on the sample, and blocks, the teacher's that stay.
    """

    num_blocks: int
    hidden_size: int | None = None
    intermediate_size: int | None = None
    parameters: int = 0
    loss: float | None = None
    blocks: tuple[int, ...] | None = None

    def cut(self, init: InitConfig) -> InitConfig:
        """`init` with this shape in place of its budget; the blocks need no data."""
        untried = {"blocks": "uniform", "num_blocks": self.num_blocks}
        chosen = untried if self.blocks is None else {"blocks": self.blocks}
        sizes = {"hidden_size": self.hidden_size, "intermediate_size": self.intermediate_size}
        return init.model_copy(update={"parameters": None, **sizes, **chosen})


def shapes_within(teacher: str, init: InitConfig, kind: Kind, trust_remote_code: bool) -> list[Shape]:
    """The shapes to try, by configs alone, those of the most blocks and channels first.

    For each depth and width as many FFN units as the budget allows. Raises ModelError if no shape is within it.
    """
    assert init.parameters is not None
    budget = init.parameters
    whole = meta_model(teacher, kind, trust_remote_code=trust_remote_code)
    sizes, total = sizes_of(whole.config), find_blocks(whole).num_blocks
    widths = _widths(sizes) if find_roles(whole) is not None else [None]

    def count(blocks: int, width: int | None = None, units: int | None = None) -> int:
        init_ = Shape(blocks, width, units).cut(init)
        return plan_cut(teacher, init_, kind, trust_remote_code).student.num_parameters()

    if budget >= (full := count(total)):
        raise ModelError(f"student.init.parameters is {budget:,}, the teacher has {full:,}: give fewer")
    fewest = max(1, bisect_right(range(1, total), budget, key=count))
    shapes = []
    for depth in sorted({round(fewest + (total - fewest) * i / (DEPTHS - 1)) for i in range(DEPTHS)}, reverse=True):
        for width in widths:
            fits = partial(count, depth, width)
            if fits() <= budget:
                shapes.append(Shape(depth, width, None, fits()))
                break  # narrower ones have less of everything
            if (units := _units(fits, sizes.get(Part.UNIT, 0), budget)) is not None:
                shapes.append(Shape(depth, width, units, fits(units)))
    if not shapes:
        raise ModelError(
            f"student.init.parameters is {budget:,}, and no shape that is tried of teacher {teacher} is so small (one "
            f"block of {count(1, widths[-1]):,} is): give more, or student.init.config for a random start"
        )
    return shapes


def _widths(sizes: dict[Part, int]) -> list[int | None]:
    """None: the teacher's. Multiples of 8, and of the number of heads, as some families want it."""
    width, step = sizes[Part.CHANNEL], math.lcm(sizes[Part.HEAD], 8)
    tried = dict.fromkeys(round(share * width / step) * step for share in WIDTHS)
    return [None, *(size for size in tried if 0 < size < width)]


def _units(count: Callable[..., int], most: int, budget: int) -> int | None:
    """The most FFN units within the budget, a multiple of 64 or 8; None: too few. Parameters are linear in them."""
    step = 64 if most >= 1024 else 8
    least = max(step, int(most * LEAST_UNITS) // step * step)
    if 2 * least > most or (fewest := count(least)) > budget:
        return None
    each = (count(2 * least) - fewest) / least
    return least + int((budget - fewest) / each) // step * step


def choose_shape(
    shapes: Sequence[Shape],
    init: InitConfig,
    calibration: Calibration,
    world: World,
    teacher: str,
    kind: Kind,
    trust_remote_code: bool,
) -> tuple[list[Shape], BlockChoice, Measurements]:
    """The shapes with their losses, the best first; its blocks, and what decides on its width; a collective."""
    roles = find_roles(meta_model(teacher, kind, trust_remote_code=trust_remote_code))
    depths = sorted({shape.num_blocks for shape in shapes}, reverse=True)
    choices, measured, tried = choices_of_depths(init, calibration, depths), {}, []
    for depth in depths:
        gone = choices[depth].rounds[-1].left_out
        found = measured[depth] = calibration.measure(roles, gone)
        own = [replace(shape, blocks=choices[depth].kept) for shape in shapes if shape.num_blocks == depth]
        cuts = [shape.cut(init) for shape in own]
        stay = partial(units_that_stay, teacher, cuts, kind, found, trust_remote_code=trust_remote_code)
        narrowings = [
            Narrowing(_basis(found, shape, world.device), units)
            for shape, units in zip(own, world.on_main(stay), strict=True)
        ]
        with calibration.progress(trials=len(own)):
            trials = calibration.trials([gone] * len(own), narrowings, roles)
        tried += [replace(shape, loss=trial.loss) for shape, trial in zip(own, trials, strict=True)]
    ranked = sorted(tried, key=lambda shape: shape.loss or 0.0)
    return ranked, choices[ranked[0].num_blocks], measured[ranked[0].num_blocks]


def _basis(measured: Measurements, shape: Shape, device: torch.device) -> torch.Tensor | None:
    if shape.hidden_size is None or measured.basis is None:
        return None
    return measured.basis[:, : shape.hidden_size].to(device)


def write_shapes(ranked: Sequence[Shape], folder: Path) -> None:
    """Writes shapes.json into `folder`, the best shape first, and logs a table; on one rank."""
    rows = [("blocks", "width", "units", "parameters", "loss")]
    for one in ranked:
        width, units = ("all" if size is None else str(size) for size in (one.hidden_size, one.intermediate_size))
        rows.append((str(one.num_blocks), width, units, f"{one.parameters:,}", f"{one.loss:.4f}"))
    logger.info("shapes within the budget, the best first:\n%s", aligned(rows, left=0))
    content = [asdict(one) for one in ranked]
    (folder / SHAPES).write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_shape(folder: Path) -> Shape:
    """The best one."""
    best: dict[str, Any] = json.loads((folder / SHAPES).read_text(encoding="utf-8"))[0]
    return Shape(**best | {"blocks": tuple(best["blocks"])})
