"""A streamed TED step against what a user would otherwise run: teacher forward + student CE step.

`python -m benchmarks.step --json OUT`: medians of interleaved repeats and their ratio, and the peak memory
of either side in a process of its own, models included. Both sides are forward and backward without
optimizer; the plain side is two calls of transformers, the teacher's under no_grad. Weights are random.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.timing import environment, extra_peak_mib, interleaved_seconds, medians, write_report
from ted_ds.batch import IGNORED, Batch, BatchCounts
from ted_ds.distill.frozen import FrozenModel, FrozenModule
from ted_ds.distill.objective import DistillationModel
from ted_ds.models.filters import FilterPlan
from ted_ds.models.layer_map import resolve_layer_map
from ted_ds.tasks.base import LossWeights
from ted_ds.tasks.causal_lm import CausalLM

SIZES = ("teacher_blocks", "student_blocks", "width", "vocab", "rows", "sequence")


def build_models(sizes: dict[str, int], device: str) -> tuple[LlamaForCausalLM, LlamaForCausalLM, torch.Tensor]:
    """(teacher, student, token ids [rows, sequence])."""
    torch.manual_seed(0)
    models = []
    for blocks in (sizes["teacher_blocks"], sizes["student_blocks"]):
        width = sizes["width"]
        config = LlamaConfig(
            vocab_size=sizes["vocab"],
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=blocks,
            num_attention_heads=width // 64,
            max_position_embeddings=sizes["sequence"],
        )
        models.append(LlamaForCausalLM(config).to(device))
    ids = torch.randint(sizes["vocab"], (sizes["rows"], sizes["sequence"]), device=device)
    return models[0].eval().requires_grad_(False), models[1], ids


def plain_step(teacher: LlamaForCausalLM, student: LlamaForCausalLM, ids: torch.Tensor) -> Callable[[], None]:
    """Teacher forward under no_grad, then student forward with labels and backward."""

    def step() -> None:
        with torch.no_grad():
            teacher(ids, use_cache=False)
        student.zero_grad()
        student(ids, labels=ids, use_cache=False).loss.backward()

    return step


def streamed_step(teacher: LlamaForCausalLM, student: LlamaForCausalLM, ids: torch.Tensor) -> Callable[[], None]:
    """One micro-batch of Stage II: ted with a pair a student block, F = width, and KL."""
    layer_map = resolve_layer_map("uniform", len(student.model.layers), len(teacher.model.layers))
    width = student.config.hidden_size
    sides = [FilterPlan(tuple(pair[i] for pair in layer_map), width, width).build().to(ids.device) for i in (1, 0)]
    task = CausalLM(student.config.vocab_size)
    model = DistillationModel(student, sides[1], LossWeights(1.0, 10.0), task=task)
    frozen = FrozenModel(FrozenModule(teacher, task, sides[0]))
    model.attach_teacher(frozen, layer_map, torch.ones(len(layer_map), device=ids.device))
    targets = torch.full_like(ids, IGNORED)
    targets[:, :-1] = ids[:, 1:]
    batch = Batch(ids, targets)
    counts = BatchCounts.of(batch)

    def step() -> None:
        model.zero_grad()
        loss, _ = model(batch=batch, counts=counts)
        loss.backward()

    return step


def build_and_run(kind: str, sizes: dict[str, int], device: str) -> Callable[[], None]:
    """For the memory child: the models are built inside what is measured."""

    def run() -> None:
        step = (streamed_step if kind == "streamed" else plain_step)(*build_models(sizes, device))
        step()
        step()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in zip(SIZES, (12, 6, 384, 50257, 2, 512), strict=True):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="where to write the report as well")
    arguments = parser.parse_args()
    sizes = {name: getattr(arguments, name) for name in SIZES}
    device = torch.device(arguments.device)
    peak = {
        kind: extra_peak_mib(build_and_run, kind, sizes, arguments.device, device=device)
        for kind in ("streamed", "plain")
    }
    teacher, student, ids = build_models(sizes, arguments.device)
    # the streamed step hooks the models, so that the plain one runs on models of its own
    steps = {
        "streamed": streamed_step(*build_models(sizes, arguments.device)),
        "plain": plain_step(teacher, student, ids),
    }
    seconds = medians(interleaved_seconds(steps, arguments.repeats, device))
    report = {
        "benchmark": "step",
        "sizes": sizes,
        "repeats": arguments.repeats,
        "median_seconds": seconds,
        "time_ratio": seconds["streamed"] / seconds["plain"],
        "peak_mib": peak,
        "memory_ratio": peak["streamed"] / peak["plain"],
        "environment": environment(device),
    }
    write_report(report, arguments.json)


if __name__ == "__main__":
    main()
