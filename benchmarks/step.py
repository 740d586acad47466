"""A step of ce, kd, lwd and ted against loops that a user would write with transformers alone.

`python -m benchmarks.step --json OUT`: time by medians of interleaved repeats and peak memory, models included, of

* `ted` and the other methods as ted_ds runs them,
* `naive ted` and so on: whole logits, `output_hidden_states=True`, torch's own losses,
* `plain`: a forward of the teacher under no_grad and a student's CE step, two calls of transformers,
* `teacher`: that forward alone.

All are forward and backward of one micro-batch without optimizer, on random weights of a named size. The main numbers
are `ted` over `plain`: time_ratio and memory_ratio. On a GPU whose peak is known, MFU is by counted FLOPs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

from benchmarks.flops import peak_flops, step_flops
from benchmarks.report import bars, parser_of, publish, table
from benchmarks.shapes import SHAPES, Shape, parameters_of, random_batch, random_model
from benchmarks.timing import Step, environment, interleaved_seconds, medians, step_peak_mib
from ted_ds.batch import Batch, BatchCounts
from ted_ds.distill.frozen import FrozenModel, FrozenModule
from ted_ds.distill.objective import DistillationModel
from ted_ds.engine.loading import checkpoint_activations
from ted_ds.models.filters import FilterPlan
from ted_ds.models.layer_map import LayerMap, resolve_layer_map
from ted_ds.tasks.base import LossWeights
from ted_ds.tasks.causal_lm import CausalLM

METHODS = {
    "ce": LossWeights(0.0, 0.0),
    "kd": LossWeights(1.0, 0.0),
    "lwd": LossWeights(1.0, 10.0),
    "ted": LossWeights(1.0, 10.0),
}
COLUMNS = ("step", "checkpointing", "seconds", "tokens_per_s", "peak_mib", "mfu")


class Models(NamedTuple):
    """What a step runs on; teacher: None where the step has no use for one."""

    teacher: Any
    student: Any
    batch: Batch


def prepared(shape: Shape, device: torch.device, *, checkpointing: bool, teacher: bool = True) -> Models:
    """Random models of a shape, the teacher frozen, and a micro-batch."""
    student = random_model(shape.student, shape, device).train()
    if checkpointing:
        checkpoint_activations(student)
    frozen = random_model(shape.teacher, shape, device).eval().requires_grad_(False) if teacher else None
    return Models(frozen, student, random_batch(shape, device))


def layer_map_of(models: Models) -> LayerMap:
    return resolve_layer_map("uniform", len(models.student.model.layers), len(models.teacher.model.layers))


def filter_banks(models: Models, layer_map: LayerMap) -> list[nn.ModuleList]:
    """Filters of (student, teacher), to F = the teacher's width, where and of what dtype the models are."""
    widths = (models.student.config.hidden_size, models.teacher.config.hidden_size)
    like = models.student.lm_head.weight
    plans = [FilterPlan(tuple(pair[side] for pair in layer_map), widths[side], widths[1]) for side in (0, 1)]
    return [plan.build().to(like.device, like.dtype) for plan in plans]


def own_step(models: Models, method: str, layer_map: LayerMap | None = None) -> Step:
    """One micro-batch of Stage II as ted_ds runs it; layer_map: None is a pair a student block."""
    weights = METHODS[method]
    layer_map = (layer_map or layer_map_of(models)) if weights.mse_alpha else ()
    banks = filter_banks(models, layer_map) if layer_map else [nn.ModuleList()] * 2
    task = CausalLM(models.student.config.vocab_size)
    model = DistillationModel(models.student, banks[0], weights, task=task)
    if method != "ce":
        frozen = FrozenModule(models.teacher, task, banks[1] if method == "ted" else ())
        squares = torch.ones(len(layer_map), device=models.batch.input_ids.device) if layer_map else None
        model.attach_teacher(FrozenModel(frozen), layer_map, squares)
    counts = BatchCounts.of(models.batch)

    def step() -> None:
        model.zero_grad()
        loss, _ = model(batch=models.batch, counts=counts)
        loss.backward()

    return step


def naive_step(models: Models, method: str) -> Step:
    """The same losses as a loop around transformers: everything is kept until the losses are taken."""
    weights, batch = METHODS[method], models.batch
    states = weights.mse_alpha > 0
    layer_map = layer_map_of(models) if states else ()
    banks = filter_banks(models, layer_map) if states else [nn.ModuleList()] * 2
    linears: list[list[Any]] = [
        list(bank) if keep else [] for bank, keep in zip(banks, (states, method == "ted"), strict=True)
    ]
    for filter_ in linears[1]:
        filter_.requires_grad_(False)
    targets, ids = batch.targets.flatten(), batch.input_ids
    mask = targets >= 0

    def step() -> None:
        for module in (models.student, *linears[0]):
            module.zero_grad()
        if method != "ce":
            with torch.no_grad():
                out_t = models.teacher(ids, output_hidden_states=states, use_cache=False)
        out_s = models.student(ids, output_hidden_states=states, use_cache=False)
        logits = out_s.logits.flatten(0, 1).float()
        loss = F.cross_entropy(logits, targets)
        if weights.kl_alpha:
            heat = weights.temperature
            log_q = F.log_softmax(logits[mask] / heat, dim=-1)
            p = F.softmax(out_t.logits.flatten(0, 1)[mask].float() / heat, dim=-1)
            loss = loss + weights.kl_alpha * heat**2 * F.kl_div(log_q, p, reduction="batchmean")
        if states:
            each = []
            for k, (s, t) in enumerate(layer_map):
                target = out_t.hidden_states[t + 1]
                with torch.no_grad():
                    target = linears[1][k](target) if linears[1] else target
                each.append(F.mse_loss(linears[0][k](out_s.hidden_states[s + 1]).float(), target.float()))
            loss = loss + weights.mse_alpha * torch.stack(each).mean()
        loss.backward()

    return step


def teacher_step(models: Models) -> Step:
    """Teacher forward under no_grad."""

    def step() -> None:
        with torch.no_grad():
            models.teacher(models.batch.input_ids, use_cache=False)

    return step


def plain_step(models: Models) -> Step:
    """Teacher forward under no_grad, then student forward with labels and backward."""
    teacher, ids = teacher_step(models), models.batch.input_ids

    def step() -> None:
        teacher()
        models.student.zero_grad()
        models.student(ids, labels=ids, use_cache=False).loss.backward()

    return step


def make_step(models: Models, name: str) -> Step:
    """The step of a name: a method, `naive METHOD`, `plain` or `teacher`. Another way to run one is a name here."""
    if name == "plain":
        return plain_step(models)
    if name == "teacher":
        return teacher_step(models)
    method = name.removeprefix("naive ")
    return own_step(models, method) if method == name else naive_step(models, method)


def build_and_run(name: str, shape: Shape, device: str, checkpointing: bool) -> Callable[[], None]:
    """For the peak: the models are built inside what is measured, and freed with it."""

    def run() -> None:
        teacher = name.removeprefix("naive ") != "ce"
        step = make_step(prepared(shape, torch.device(device), checkpointing=checkpointing, teacher=teacher), name)
        step()
        step()

    return run


def measure(
    names: Sequence[str], shape: Shape, device: torch.device, *, checkpointing: bool, repeats: int
) -> list[dict[str, Any]]:
    """A row a step; all of them are timed in turn, on the same models (their hooks do nothing outside their pass)."""
    peaks = {
        name: step_peak_mib(build_and_run, name, shape, str(device), checkpointing, device=device) for name in names
    }
    models = prepared(shape, device, checkpointing=checkpointing)
    seconds = medians(interleaved_seconds({name: make_step(models, name) for name in names}, repeats, device))
    peak = peak_flops(torch.cuda.get_device_name(device) if device.type == "cuda" else None, shape.dtype)
    return [
        {
            "step": name,
            "checkpointing": checkpointing,
            "seconds": seconds[name],
            "tokens_per_s": shape.tokens / seconds[name],
            "peak_mib": round(peaks[name], 1),
            "mfu": peak and step_flops(name.removeprefix("naive "), shape) / seconds[name] / peak,
        }
        for name in names
    ]


def names_of(methods: Sequence[str]) -> list[str]:
    """What is measured for these methods."""
    return ["plain", "teacher", *methods, *(f"naive {method}" for method in methods)]


def main_numbers(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """`ted` over `plain`, and over the parts that it cannot do without: teacher forward + ted_ds' own CE step."""
    by_name = {row["step"]: row for row in rows}
    ted, plain = by_name["ted"], by_name["plain"]
    ratios = {
        "time_ratio": ted["seconds"] / plain["seconds"],
        "memory_ratio": ted["peak_mib"] / plain["peak_mib"],
    }
    if "ce" in by_name:
        parts = by_name["teacher"]["seconds"] + by_name["ce"]["seconds"]
        ratios["time_ratio_to_teacher_and_ce"] = ted["seconds"] / parts
    return ratios


def draw(figure: Figure, rows: Sequence[dict[str, Any]]) -> None:
    labelled = {f"{row['step']}{' +ckpt' * row['checkpointing']}": row for row in rows}
    left, right = figure.subplots(1, 2)
    bars(left, {name: row["seconds"] for name, row in labelled.items()}, title="time of a step", unit="s")
    bars(right, {name: row["peak_mib"] for name, row in labelled.items()}, title="peak memory", unit="MiB")


def options_of(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--size", choices=SHAPES, help="default: cpu, or 1.5b on CUDA")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--checkpointing", choices=["off", "on", "both"], default="both", help="of the student's blocks"
    )
    parser.add_argument("--gate", action="store_true", help="only what `make bench-check` compares: ted and plain")
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = options_of(argv)
    device = torch.device(options.device)
    size = options.size or ("1.5b" if device.type == "cuda" else "cpu")
    shape = SHAPES[size]
    names = ["plain", "ted"] if options.gate else names_of(options.methods)
    modes = {"off": [False], "on": [True], "both": [False, True]}["off" if options.gate else options.checkpointing]
    rows = [row for mode in modes for row in measure(names, shape, device, checkpointing=mode, repeats=options.repeats)]
    first = rows[: len(names)]
    report = {
        "benchmark": "step: one micro-batch, forward and backward, against transformers alone",
        "size": size,
        "shape": asdict(shape) | {side: parameters_of(getattr(shape, side), shape) for side in ("teacher", "student")},
        "repeats": options.repeats,
        **(main_numbers(first) if "ted" in names else {}),
        "steps": rows,
        "environment": environment(device, "step", sys.argv[1:] if argv is None else argv),
    }
    ratios = [f"{name}: {value:.3f}" for name, value in report.items() if "_ratio" in name]
    publish(report, [table(rows, COLUMNS), *ratios], lambda figure: draw(figure, rows), options.json)


if __name__ == "__main__":
    main()
