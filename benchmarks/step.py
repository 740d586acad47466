"""A step of ce, kd, lwd and ted against loops that a user would write with transformers alone.

`python -m benchmarks.step --json OUT`: time by medians of interleaved repeats and peak memory, models included, of

* `ted` and the other methods as ted_ds runs them, `ted cached` and `ted cached top 64` from a teacher cache,
* `naive ted` and so on: whole logits, `output_hidden_states=True`, torch's own losses,
* `plain`: a forward of the teacher under no_grad and a student's CE step, two calls of transformers,
* `teacher`: that forward alone.

All are forward and backward of one micro-batch without optimizer, on random weights of a named size. The main numbers
are `ted` over `plain`: time_ratio and memory_ratio, and a cached step over `naive ce`, the student alone. On a GPU
whose peak is known, MFU is by counted FLOPs.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

from benchmarks.cached import Recorded, record
from benchmarks.flops import step_flops
from benchmarks.report import bars, parser_of, publish, table
from benchmarks.shapes import SHAPES, Shape, parameters_of, random_batch, random_model
from benchmarks.timing import Step, environment, interleaved_seconds, medians, step_peak_mib
from ted_ds.batch import Batch, BatchCounts
from ted_ds.config.sections import LossConfig
from ted_ds.distill.balance import Balance
from ted_ds.distill.distillation_model import DistillationModel
from ted_ds.models.filters import FilterPlan
from ted_ds.models.layer_map import LayerMap, resolve_layer_map
from ted_ds.models.loading import checkpoint_activations
from ted_ds.tasks.causal_lm import CausalLM
from ted_ds.teacher.frozen import FrozenModel, FrozenModule
from ted_ds.telemetry.flops import peak_flops

METHODS = {
    "ce": LossConfig(kl_alpha=0.0, mse_alpha=0.0, balance="none", layer_fade=0.0),
    "kd": LossConfig(kl_alpha=1.0, mse_alpha=0.0, balance="none", layer_fade=0.0),
    "lwd": LossConfig(kl_alpha=1.0, mse_alpha=1.0, balance="gradient", layer_fade=0.0),
    "ted": LossConfig(kl_alpha=1.0, mse_alpha=1.0, balance="gradient", layer_fade=0.0),
    "ted mse": LossConfig(kl_alpha=1.0, mse_alpha=10.0, layer_loss="mse", balance="none", layer_fade=0.0),
}
CACHED: dict[str, int | None] = {"ted cached": None, "ted cached top 64": 64}
"""Step -> the k of its cache, None for an exact one."""

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


def filter_banks(models: Models, layer_map: LayerMap, *, normalized: bool = True) -> list[nn.ModuleList]:
    """Filters of (student, teacher), to F = the teacher's width, where and of what dtype the models are."""
    widths = (models.student.config.hidden_size, models.teacher.config.hidden_size)
    like = models.student.lm_head.weight
    plans = [
        FilterPlan(tuple(pair[side] for pair in layer_map), widths[side], widths[1], normalized=normalized)
        for side in (0, 1)
    ]
    return [plan.build().to(like.device, like.dtype) for plan in plans]


def own_step(models: Models, method: str, layer_map: LayerMap | None = None) -> Step:
    """One micro-batch of Stage II as ted_ds runs it; layer_map: None is a pair a student block."""
    weights = METHODS[method]
    layer_map = (layer_map or layer_map_of(models)) if weights.mse_alpha else ()
    by_token = weights.layer_loss == "rms_mse"
    banks = filter_banks(models, layer_map, normalized=by_token) if layer_map else [nn.ModuleList()] * 2
    task = CausalLM(models.student.config.vocab_size)
    model = DistillationModel(models.student, banks[0], weights, task=task)
    if method != "ce":
        frozen = FrozenModule(models.teacher, task, banks[1] if method != "lwd" else ())
        balance = Balance.of(weights, len(layer_map), models.batch.input_ids.device)
        model.attach_teacher(FrozenModel(frozen), layer_map, balance=balance)
    counts = BatchCounts.of(models.batch)

    def step() -> None:
        model.zero_grad()
        loss, _ = model(batch=models.batch, counts=counts)
        loss.backward()

    return step


def recorded(models: Models, name: str) -> Recorded:
    """The cache that the step of this name trains from."""
    layer_map = layer_map_of(models)
    task, filters = CausalLM(models.student.config.vocab_size), filter_banks(models, layer_map)[1]
    frozen = FrozenModel(FrozenModule(models.teacher, task, filters))
    dtype = str(models.student.lm_head.weight.dtype).removeprefix("torch.")
    return record(frozen, models.batch, layer_map, dtype, CACHED[name])


def cached_step(models: Models, name: str, cache: Recorded) -> Step:
    """`own_step` of ted with the teacher out of a cache, whose reading goes on during the student's forward."""
    like, blocks = models.student.lm_head.weight, tuple(s for s, _ in cache.layer_map)
    width, target = models.student.config.hidden_size, cache.teacher.target_width
    bank = FilterPlan(blocks, width, target, normalized=True).build()
    weights = METHODS["ted"].model_copy(update={"kl_top_k": CACHED[name]})
    task = CausalLM(models.student.config.vocab_size)
    model = DistillationModel(models.student, bank.to(like.device, like.dtype), weights, task=task)
    balance = Balance.of(weights, len(blocks), like.device)
    model.attach_teacher(cache.teacher, cache.layer_map, balance=balance)
    counts = BatchCounts.of(models.batch)

    def step() -> None:
        cache.teacher.expect([cache.batch])
        model.zero_grad()
        loss, _ = model(batch=cache.batch, counts=counts)
        loss.backward()

    return step


def naive_step(models: Models, method: str) -> Step:
    """The paper's losses as a loop around transformers: everything is kept until the losses are taken."""
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
    """The step of a name: a method, `naive METHOD`, `plain`, `teacher`, or one of `CACHED`."""
    if name == "plain":
        return plain_step(models)
    if name == "teacher":
        return teacher_step(models)
    if name in CACHED:
        return cached_step(models, name, recorded(models, name))
    method = name.removeprefix("naive ")
    return own_step(models, method) if method == name else naive_step(models, method)


def build_and_run(name: str, shape: Shape, device: str, checkpointing: bool) -> Callable[[], None]:
    """For the peak: the models are built inside what is measured, and freed with it. A cache is there before."""
    place = torch.device(device)
    cache = recorded(prepared(shape, place, checkpointing=False), name) if name in CACHED else None
    gc.collect()

    def run() -> None:
        teacher = cache is None and name.removeprefix("naive ") != "ce"
        models = prepared(shape, place, checkpointing=checkpointing, teacher=teacher)
        step = make_step(models, name) if cache is None else cached_step(models, name, cache)
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
    dtype = getattr(torch, shape.dtype)
    peak = peak_flops(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None
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
    cached = CACHED if "ted" in methods else ()
    return ["plain", "teacher", *methods, *cached, *(f"naive {method}" for method in methods)]


COMPARED = {
    "time_ratio": (("ted",), ("plain",)),
    "time_ratio_to_teacher_and_ce": (("ted",), ("teacher", "ce")),
    **{f"time_ratio_{name.replace(' ', '_')}_to_ce": ((name,), ("naive ce",)) for name in CACHED},
}
"""Ratio -> the steps whose seconds are added above and below."""


def time_ratios(shape: Shape, device: torch.device, names: Sequence[str], repeats: int) -> dict[str, float]:
    """The ratios that these steps give, each from a run of its own steps alone, in turn: neighbours share a moment."""
    models = prepared(shape, device, checkpointing=False)
    ratios = {}
    for ratio, (above, below) in COMPARED.items():
        if {*above, *below} <= set(names):
            steps = {name: make_step(models, name) for name in (*above, *below)}
            seconds = medians(interleaved_seconds(steps, repeats, device))
            ratios[ratio] = sum(seconds[name] for name in above) / sum(seconds[name] for name in below)
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
    parser.add_argument("--repeats", type=int, default=7)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = options_of(argv)
    device = torch.device(options.device)
    size = options.size or ("1.5b" if device.type == "cuda" else "cpu")
    shape = SHAPES[size]
    names = ["plain", "ted"] if options.gate else names_of(options.methods)
    modes = {"off": [False], "on": [True], "both": [False, True]}["off" if options.gate else options.checkpointing]
    rows = [row for mode in modes for row in measure(names, shape, device, checkpointing=mode, repeats=options.repeats)]
    peaks = {row["step"]: row["peak_mib"] for row in rows[: len(names)]}
    report = {
        "benchmark": "step: one micro-batch, forward and backward, against transformers alone",
        "size": size,
        "shape": asdict(shape) | {side: parameters_of(getattr(shape, side), shape) for side in ("teacher", "student")},
        "repeats": options.repeats,
        **time_ratios(shape, device, names, options.repeats),
        **({"memory_ratio": peaks["ted"] / peaks["plain"]} if "ted" in names else {}),
        "steps": rows,
        "environment": environment(device, "step", sys.argv[1:] if argv is None else argv),
    }
    ratios = [f"{name}: {value:.3f}" for name, value in report.items() if "_ratio" in name]
    publish(report, [table(rows, COLUMNS), *ratios], lambda figure: draw(figure, rows), options.json)


if __name__ == "__main__":
    main()
