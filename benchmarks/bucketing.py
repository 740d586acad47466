"""Padding and time of TED steps: rows in buckets of length against random batches padded to their longest.

`python -m benchmarks.bucketing --data train.tsv --tokenizer FOLDER --json OUT`: the padding of a whole epoch of a
GLUE task (RTE unless said otherwise), and the time of forward and backward over a sample of its steps: a
DeBERTa-v3-base-shaped teacher, an xsmall-shaped student, random weights. The sample takes steps at even quantiles of
the tokens that they compute, for either order, and the two are timed in turn.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

from benchmarks.report import bars, parser_of, publish, table
from benchmarks.timing import environment
from ted_ds.batch import Batch, BatchCounts
from ted_ds.config.sections import LossConfig
from ted_ds.config.tasks import TASKS
from ted_ds.data.buckets import BucketedRows
from ted_ds.data.encoded import EncodedRows
from ted_ds.data.encoding import ensure_encoded
from ted_ds.data.loader import row_order
from ted_ds.data.tokenizers import load_tokenizer
from ted_ds.distill.distillation_model import DistillationModel
from ted_ds.models.filters import FilterPlan
from ted_ds.models.layer_map import resolve_layer_map
from ted_ds.tasks.classification import Classification
from ted_ds.teacher.frozen import FrozenModel, FrozenModule

SHAPES = {"base": (768, 12, 3072), "xsmall": (384, 6, 1536)}
"""Width, heads and FFN units of DeBERTa-v3's; both have 12 blocks."""


@dataclass(frozen=True)
class Step:
    """A step's rows and the tokens that each is padded to."""

    rows: np.ndarray
    width: int

    @property
    def computed(self) -> int:
        return len(self.rows) * self.width


def bucketed_steps(rows: EncodedRows, size: int) -> list[Step]:
    """An epoch as ted_ds trains on it."""
    loader = BucketedRows(rows, seed=0, global_batch_size=size, micro_batch_size=size, rank=0, world_size=1)
    return [Step(loader.step_rows(step), loader.width(step)) for step in range(len(rows) // size)]


def random_steps(rows: EncodedRows, size: int) -> list[Step]:
    """An epoch in random batches, each padded to its longest row (dynamic padding)."""
    order = row_order(len(rows), 0, 0)[: len(rows) // size * size].reshape(-1, size)
    return [Step(batch, int(rows.lengths[batch].max())) for batch in order]


def padding_share(steps: list[Step], rows: EncodedRows) -> float:
    real = sum(int(rows.lengths[step.rows].sum()) for step in steps)
    return 1.0 - real / sum(step.computed for step in steps)


def sampled(steps: list[Step], count: int) -> list[Step]:
    """Steps at even quantiles of the tokens that they compute."""
    ordered = sorted(steps, key=lambda step: step.computed)
    return [ordered[int((i + 0.5) * len(ordered) / count)] for i in range(count)]


def build(labels: tuple[str, ...], blocks: int, output_dim: int, device: str) -> DistillationModel:
    """A TED step's module: teacher and student of DeBERTa-v3's shapes, a pair a block."""
    torch.manual_seed(0)
    models = []
    for width, heads, units in SHAPES.values():
        sizes: dict[str, Any] = dict(
            vocab_size=128100,
            hidden_size=width,
            num_attention_heads=heads,
            intermediate_size=units,
            num_hidden_layers=blocks,
            relative_attention=True,
            position_buckets=256,
            pos_att_type=["p2c", "c2p"],
            share_att_key=True,
            norm_rel_ebd="layer_norm",
            position_biased_input=False,
            type_vocab_size=0,
            num_labels=len(labels),
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        classifier = DebertaV2ForSequenceClassification(DebertaV2Config(**sizes))
        models.append(torch.nn.Module.to(classifier, device))
    teacher, student = models[0].eval().requires_grad_(False), models[1]
    layer_map = resolve_layer_map("uniform", blocks, blocks)
    places = tuple(range(blocks))
    banks = [FilterPlan(places, SHAPES[name][0], output_dim).build().to(device) for name in ("base", "xsmall")]
    task = Classification(labels)
    model = DistillationModel(
        student,
        banks[1],
        LossConfig(kl_alpha=20.0, mse_alpha=50.0, layer_loss="mse", balance="none", layer_fade=0.0),
        task=task,
    )
    model.attach_teacher(FrozenModel(FrozenModule(teacher, task, banks[0])), layer_map)
    return model


def seconds_of(model: DistillationModel, batch: Batch) -> float:
    counts = BatchCounts.of(batch)
    start = time.perf_counter()
    loss, _ = model(batch=batch, counts=counts)
    loss.backward()
    float(loss.detach())  # waits for the device
    model.zero_grad()
    return time.perf_counter() - start


def measure(
    rows: EncodedRows, labels: tuple[str, ...], options: argparse.Namespace, arguments: Sequence[str]
) -> dict[str, Any]:
    epochs = {"bucketed": bucketed_steps(rows, options.batch_size), "random": random_steps(rows, options.batch_size)}
    samples = {name: sampled(steps, options.steps) for name, steps in epochs.items()}
    model = build(labels, options.blocks, options.output_dim, options.device)
    seconds: dict[str, list[float]] = {name: [] for name in epochs}
    for i in range(-1, options.steps):  # the first is a warm-up
        for name, sample in samples.items():
            step = sample[max(i, 0)]
            took = seconds_of(model, rows.batch(step.rows, step.width).to(torch.device(options.device)))
            if i >= 0:
                seconds[name].append(took)
    totals = {name: sum(values) for name, values in seconds.items()}
    return {
        "benchmark": "bucketing: rows of like length against random batches padded to their longest",
        "task": options.task,
        "rows": len(rows),
        "batch_size": options.batch_size,
        "max_length": options.max_length,
        "padding_share": {name: round(padding_share(steps, rows), 4) for name, steps in epochs.items()},
        "computed_tokens_an_epoch": {name: sum(step.computed for step in steps) for name, steps in epochs.items()},
        "sampled_widths": {name: [step.width for step in sample] for name, sample in samples.items()},
        "seconds": {name: [round(value, 2) for value in values] for name, values in seconds.items()},
        "time_ratio_bucketed_to_random": round(totals["bucketed"] / totals["random"], 3),
        "environment": environment(torch.device(options.device), "bucketing", arguments),
    }


def tables(report: dict[str, Any]) -> list[str]:
    """A line an order; the ratio of times."""
    rows = [
        {
            "order": name,
            "padding_share": share,
            "computed_tokens": report["computed_tokens_an_epoch"][name],
            "seconds": sum(report["seconds"][name]),
        }
        for name, share in report["padding_share"].items()
    ]
    return [table(rows, list(rows[0])), f"time, bucketed to random: {report['time_ratio_bucketed_to_random']}"]


def draw(figure: Figure, report: dict[str, Any]) -> None:
    """Padding of an epoch; time of the sampled steps."""
    left, right = figure.subplots(1, 2)
    bars(left, report["padding_share"], title="padding of an epoch", unit="share of the computed tokens")
    seconds = {name: sum(values) for name, values in report["seconds"].items()}
    bars(right, seconds, title="forward and backward, sampled steps", unit="s")


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints, writes."""
    parser = parser_of(__doc__)
    parser.add_argument("--data", nargs="+", required=True, metavar="FILES")
    parser.add_argument("--tokenizer", required=True, help="a folder or hub id")
    parser.add_argument("--task", default="rte", choices=[n for n, t in TASKS.items() if t.kind == "classification"])
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=6, help="sampled of an epoch")
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--output-dim", type=int, default=768)
    options = parser.parse_args(argv)
    spec = TASKS[options.task]
    with tempfile.TemporaryDirectory() as folder:
        rows = ensure_encoded(
            options.data,
            spec,
            load_tokenizer(options.tokenizer),
            Path(folder) / "rows",
            max_length=options.max_length,
            stride=0,
            training=True,
        )
        report = measure(rows, spec.labels, options, sys.argv[1:] if argv is None else argv)
    publish(report, tables(report), lambda figure: draw(figure, report), options.json)


if __name__ == "__main__":
    main()
