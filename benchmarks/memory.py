"""Peak memory of a TED step against the number of pairs, the vocabulary and the length of rows.

`python -m benchmarks.memory --json OUT`: random Llama models of 12 blocks each, activation checkpointing on. A point is
measured in a process of its own that builds the models, so its peak holds everything. What has to grow is counted and
shown beside it: weights with the student's gradients, and the residual [N, F] that each pair keeps for backward. The
rest should be flat in the number of pairs, and in the vocabulary but for chunks of logits; it grows with the tokens.
`flatness_over_pairs` is the largest peak without residuals over the smallest, less 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.report import parser_of, publish, table
from benchmarks.shapes import Shape, Side, parameters_of
from benchmarks.step import own_step, prepared
from benchmarks.timing import environment, extra_peak_mib
from ted_ds.models.layer_map import LayerMap

COLUMNS = ("axis", "pairs", "vocab", "sequence", "peak_mib", "weights_mib", "residuals_mib", "rest_mib")


@dataclass(frozen=True)
class Point:
    """A step's shape and its number of pairs K."""

    shape: Shape
    pairs: int

    @property
    def layer_map(self) -> LayerMap:
        """K pairs, evenly spaced, the last blocks included."""
        depth = self.shape.student.blocks
        return tuple(((k + 1) * depth // self.pairs - 1,) * 2 for k in range(self.pairs))

    @property
    def residuals_mib(self) -> float:
        """K residuals [N, F] of the models' dtype."""
        return self.pairs * self.shape.tokens * self.shape.teacher.width * self._itemsize / 2**20

    @property
    def weights_mib(self) -> float:
        """Both models, the student's gradients, and so for the filters."""
        own, frozen = (
            parameters_of(side, self.shape)["parameters"] for side in (self.shape.student, self.shape.teacher)
        )
        width = self.shape.teacher.width
        filters_s, filters_t = (
            self.pairs * (side.width + 1) * width for side in (self.shape.student, self.shape.teacher)
        )
        return (2 * (own + filters_s) + frozen + filters_t) * self._itemsize / 2**20

    @property
    def _itemsize(self) -> int:
        itemsize: int = getattr(torch, self.shape.dtype).itemsize
        return itemsize


def ted_step(point: Point, device: str) -> Callable[[], None]:
    """Builds the models and runs two steps, when called."""

    def run() -> None:
        step = own_step(prepared(point.shape, torch.device(device), checkpointing=True), "ted", point.layer_map)
        step()
        step()

    return run


def measure(axis: str, point: Point, device: torch.device) -> dict[str, Any]:
    """One point, in a process of its own."""
    peak = extra_peak_mib(ted_step, point, str(device), device=device)
    weights, residuals = point.weights_mib, point.residuals_mib
    return {
        "axis": axis,
        "pairs": point.pairs,
        "vocab": point.shape.vocab,
        "sequence": point.shape.sequence,
        "peak_mib": round(peak, 1),
        "weights_mib": round(weights, 1),
        "residuals_mib": round(residuals, 1),
        "rest_mib": round(peak - weights - residuals, 1),
    }


def flatness(rows: Sequence[dict[str, Any]]) -> float | None:
    """How much the peak without residuals grows over the points along `pairs`, as a share; None for less than two."""
    peaks: list[float] = [row["peak_mib"] - row["residuals_mib"] for row in rows if row["axis"] == "pairs"]
    return max(peaks) / min(peaks) - 1 if len(peaks) > 1 else None


def draw(figure: Figure, rows: Sequence[dict[str, Any]]) -> None:
    """Stacked weights, residuals and rest over each axis."""
    axes_names = list(dict.fromkeys(row["axis"] for row in rows))
    for axes, name in zip(figure.subplots(1, len(axes_names), squeeze=False)[0], axes_names, strict=True):
        points = [row for row in rows if row["axis"] == name]
        values = [row[name] for row in points]
        parts = [[row[f"{part}_mib"] for row in points] for part in ("weights", "rest", "residuals")]
        axes.stackplot(values, parts, labels=("weights, gradients", "the rest", "residuals"), alpha=0.8)
        axes.plot(values, [row["peak_mib"] for row in points], "o-", color="black", label="peak")
        axes.set(title=f"peak memory over {name}", xlabel=name, ylabel="MiB", ylim=(0, None))
        axes.locator_params(axis="x", nbins=4)
    axes.legend()


def points_of(options: argparse.Namespace) -> list[tuple[str, Point]]:
    """The points along each axis, around the first vocabulary and length, and half of the blocks paired."""
    side = Side(
        options.blocks, options.width, 4 * options.width, max(1, options.width // 64), max(1, options.width // 64)
    )
    first = Shape(side, side, options.vocab[0], options.rows, options.sequence[0], options.dtype, tied=False)
    middle = max(1, options.blocks // 2)
    along = {
        "pairs": [Point(first, pairs) for pairs in options.pairs],
        "vocab": [Point(replace(first, vocab=vocab), middle) for vocab in sorted(options.vocab)],
        "sequence": [Point(replace(first, sequence=length), middle) for length in sorted(options.sequence)],
    }
    return [(axis, point) for axis, points in along.items() if len(points) > 1 for point in points]


def options_of(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--pairs", type=int, nargs="+", default=[2, 4, 8, 12])
    parser.add_argument("--vocab", type=int, nargs="+", default=[50257, 8192, 131072], help="the first: other axes'")
    parser.add_argument("--sequence", type=int, nargs="+", default=[512, 256, 1024], help="the first: other axes'")
    parser.add_argument("--blocks", type=int, default=12, help="of either model, at least the number of pairs")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default float32, on CUDA bfloat16")
    options = parser.parse_args(argv)
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    if max(options.pairs) > options.blocks:
        parser.error(f"--pairs {max(options.pairs)} needs as many --blocks, there are {options.blocks}")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints, writes."""
    options = options_of(argv)
    device = torch.device(options.device)
    points = points_of(options)
    rows = [measure(axis, point, device) for axis, point in points]
    flat = flatness(rows)
    report = {
        "benchmark": "memory: peak of a TED step with activation checkpointing, models included",
        "shape": asdict(points[0][1].shape),
        "flatness_over_pairs": flat,
        "points": rows,
        "environment": environment(device, "memory", sys.argv[1:] if argv is None else argv),
    }
    text = "" if flat is None else f"over pairs, residuals aside, the peak grows by {100 * flat:.1f}%"
    publish(report, [table(rows, COLUMNS), text], lambda figure: draw(figure, rows), options.json)


if __name__ == "__main__":
    main()
