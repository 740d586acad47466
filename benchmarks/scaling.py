"""Ranks on one machine: tokens/s, efficiency, and the bytes that a TED step moves against ZeRO-3's theory.

`python -m benchmarks.scaling --json OUT`: 1, 2 and 4 ranks (gloo on the CPU, NCCL where there are as many GPUs) run the
project's own engines, teacher and student both under ZeRO-3, in a configuration in which nothing stays resident. Every
rank has the same micro-batch, so efficiency is tokens/s over ranks times tokens/s of one.

A step should gather the student twice and the teacher once, and reduce-scatter the student's gradients once:
3 N_s + N_t elements, filters included. A size is that of the whole tensor, gathered or reduced; a ring of R ranks sends
(R - 1) / R of it through each. What else is moved (counts, norms) is listed as other. With --tied the shared embedding
is gathered for each of its two uses, with --checkpoint a block once more to be recomputed: `surplus` says what.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.multiprocessing as mp
from matplotlib.figure import Figure
from torch import nn
from torch.distributed.elastic.utils.distributed import get_free_port

from benchmarks.collectives import CollectiveLog, parameter_bytes, theory
from benchmarks.report import parser_of, publish, table
from benchmarks.shapes import Shape, Side, parameters_of, random_batch, random_model
from benchmarks.timing import environment
from ted_ds.config.deepspeed import trained_engine_config
from ted_ds.config.schema import RunConfig
from ted_ds.config.sections import LossConfig
from ted_ds.distill.balance import Balance
from ted_ds.distill.distillation_model import DistillationModel
from ted_ds.distill.engine import build_trained_engine
from ted_ds.job.world import World, init_world, seed_everything, shut_down
from ted_ds.models.filter_files import new_filters
from ted_ds.models.filters import FilterPlan
from ted_ds.models.layer_map import resolve_layer_map
from ted_ds.models.loading import checkpoint_activations, load_model
from ted_ds.pipeline.step import train_step
from ted_ds.tasks.causal_lm import CausalLM
from ted_ds.teacher.frozen import FrozenModel, FrozenModule
from ted_ds.teacher.hosting import HOSTS

ZERO3 = {
    "stage": 3,
    "overlap_comm": False,
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
}
"""A weight is released as soon as its module is done: a small model would stay whole otherwise, unlike a large one."""

TED = LossConfig(kl_alpha=1.0, mse_alpha=1.0, balance="gradient", layer_fade=0.5)

WARMUP_STEPS = 2
"""ZeRO-3 records the order of modules in the first step and follows it from the second on."""


@dataclass(frozen=True)
class Setting:
    """What every rank runs; threads: of each rank on the CPU; checkpoint: recompute the student's blocks."""

    shape: Shape
    steps: int
    device: str
    threads: int
    checkpoint: bool


def build_engines(
    setting: Setting, folder: Path, world: World, weights: LossConfig = TED, **changes: Any
) -> tuple[Any, FrozenModel]:
    """(student's engine, frozen teacher) as Stage II builds them, with fresh filters if `weights` want layers.

    changes: of the recipe, by section or key. Without a KL nothing is attached: the teacher is the caller's to run.
    """
    shape = setting.shape
    run = RunConfig(**_merged(recipe(setting, folder, world.size), changes))
    assert run.teacher is not None
    trained = trained_engine_config(
        run, world_size=world.size, learning_rate=1e-4, weight_decay=0.0, cpu=world.device.type == "cpu"
    )
    host = HOSTS[run.teacher.sharding]
    frozen = host.engine_config(run, world.size)
    layer_map = resolve_layer_map("uniform", shape.student.blocks, shape.teacher.blocks) if weights.mse_alpha else ()
    task = CausalLM(shape.vocab)

    def filters(side: int, width: int, config: dict[str, Any] | None) -> nn.ModuleList:
        plan = FilterPlan(tuple(pair[side] for pair in layer_map), width, shape.teacher.width, normalized=True)
        return new_filters(plan, config, shape.dtype)

    def model(side: str, config: dict[str, Any] | None) -> Any:
        return load_model(str(folder / side), "causal-lm", dtype=shape.dtype, deepspeed_config=config)

    seed_everything(0)
    student = model("student", trained)
    if setting.checkpoint:
        checkpoint_activations(student)
    module = DistillationModel(student, filters(0, shape.student.width, trained), weights, task=task)
    engine = build_trained_engine(module, deepspeed_config=trained, schedule=lambda step: 1.0)
    bank = filters(1, shape.teacher.width, frozen)
    teacher = host.place(FrozenModule(model("teacher", frozen), task, bank), world.device, frozen)
    if weights.kl_alpha:
        balance = Balance.of(weights, len(layer_map), world.device)
        module.attach_teacher(teacher, layer_map, balance=balance)
    return engine, teacher


def _merged(recipe: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return recipe | {k: recipe[k] | v if isinstance(v, dict) else v for k, v in changes.items()}


def recipe(setting: Setting, folder: Path, ranks: int) -> dict[str, Any]:
    """The part of a recipe that engines are built by; the data are made, not read."""
    shape, deepspeed = setting.shape, str(folder / "deepspeed.json")
    return {
        "output_dir": str(folder),
        "deepspeed": deepspeed,
        "teacher": {"model": str(folder / "teacher"), "dtype": shape.dtype, "deepspeed": deepspeed},
        "student": {"model": str(folder / "student"), "dtype": shape.dtype},
        "data": {"train": ["none"], "tokenizer": "none", "sequence_length": shape.sequence},
        "train": {"steps": 1, "micro_batch_size": shape.rows, "global_batch_size": shape.rows * ranks},
    }


def run_rank(rank: int, ranks: int, port: int, setting: Setting, folder: Path) -> None:
    """One rank: steps by the clock, then one step whose collectives are counted; rank 0 writes the result."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ.update({name: str(value) for name, value in (address | place).items()})
    world = init_world()
    engine, teacher = build_engines(setting, folder, world)
    engine.train()
    batches = [random_batch(setting.shape, world.device, seed=rank)]
    log = CollectiveLog()
    if ranks > 1:  # a single rank gathers nothing
        log.watch("student", engine.module)
        log.watch("teacher", teacher.module)
    seconds = []
    for _ in range(WARMUP_STEPS + setting.steps):
        world.barrier()
        start = time.perf_counter()
        float(train_step(engine, batches, world)[0])  # waits for the device
        seconds.append(time.perf_counter() - start)
    with log.recording():
        train_step(engine, batches, world)
    if world.is_main:
        result = {"seconds": statistics.median(seconds[WARMUP_STEPS:]), **traffic(log, engine.module, teacher.module)}
        (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    shut_down(world)


def traffic(log: CollectiveLog, student: nn.Module, teacher: nn.Module) -> dict[str, Any]:
    """What a step moved, beside what it should move."""
    expected = theory(student, teacher)
    rows = log.table()
    moved = {
        f"{owner or 'student'} {kind}": {"bytes": log.size(kind, owner), "theory_bytes": size}
        for (kind, owner), size in expected.items()
    }
    return {
        "parameter_bytes": {"student": parameter_bytes(student), "teacher": parameter_bytes(teacher)},
        "collectives": moved,
        "other": [row for row in rows if (row["kind"], row["owner"]) not in expected],
        "surplus": surplus(log, {"student": (student, 2), "teacher": (teacher, 1)}),
    }


def surplus(log: CollectiveLog, sides: dict[str, tuple[nn.Module, int]]) -> list[dict[str, Any]]:
    """Parameters that were gathered more often than in theory, the largest first."""
    found = []
    for owner, (module, expected) in sides.items():
        for name, parameter in module.named_parameters():
            extra = log.gathers[owner, name] - expected
            if extra > 0:
                size = extra * getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()
                found.append({"owner": owner, "parameter": name, "more_gathers": extra, "bytes": size})
    return sorted(found, key=lambda row: -row["bytes"])


def measure(setting: Setting, ranks: int, folder: Path) -> dict[str, Any]:
    """Runs `ranks` processes to their end."""
    port = get_free_port()
    cpu = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(setting.threads)}  # both are read as a rank imports
    with patch.dict(os.environ, cpu if setting.device == "cpu" else {}):
        mp.spawn(run_rank, args=(ranks, port, setting, folder), nprocs=ranks)
    result: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return result


def write_models(setting: Setting, folder: Path, device: str = "cpu") -> None:
    """Random teacher and student, made on `device`, and the DeepSpeed file of both engines."""
    for side in ("teacher", "student"):
        random_model(getattr(setting.shape, side), setting.shape, torch.device(device)).save_pretrained(folder / side)
    (folder / "deepspeed.json").write_text(json.dumps({"zero_optimization": ZERO3}), encoding="utf-8")


def summarised(ranks: int, shape: Shape, result: dict[str, Any]) -> dict[str, Any]:
    """The result with speed, and bytes over theory."""
    moved = sum(part["bytes"] for part in result["collectives"].values())
    expected = sum(part["theory_bytes"] for part in result["collectives"].values())
    other = sum(row["bytes"] for row in result["other"])
    return {
        "ranks": ranks,
        "tokens_per_s": ranks * shape.tokens / result["seconds"],
        "bytes": moved,
        "theory_bytes": expected,
        "bytes_to_theory": _ratio(ranks, {"bytes": moved, "theory_bytes": expected}),
        "other_bytes": other,
        **result,
    }


def draw(figure: Figure, rows: Sequence[dict[str, Any]]) -> None:
    """Tokens/s against ranks; bytes of each collective beside the theory."""
    left, right = figure.subplots(1, 2)
    ranks = [row["ranks"] for row in rows]
    left.plot(ranks, [row["tokens_per_s"] for row in rows], "o-", label="measured")
    left.plot(ranks, [rows[0]["tokens_per_s"] * n / ranks[0] for n in ranks], ":", color="black", label="linear")
    left.set_xticks(ranks)
    left.set(title="speed", xlabel="ranks", ylabel="tokens/s")
    left.legend()
    for i, row in enumerate(rows):
        for j, part in enumerate(row["collectives"].values()):
            right.bar(j + 0.8 * i / len(rows), part["bytes"] / 2**20, 0.7 / len(rows), color=f"C{i}")
            right.hlines(part["theory_bytes"] / 2**20, j - 0.3, j + 0.7, color="black", linestyle=":")
    names = [name.replace(" ", "\n") for name in rows[0]["collectives"]]
    right.set_xticks([j + 0.2 for j in range(len(names))], names)
    right.set(title=f"bytes of a step, {', '.join(map(str, ranks))} ranks (dotted: theory)", ylabel="MiB")


def options_of(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", help="default 1 2 4; on CUDA as many as there are GPUs")
    parser.add_argument("--steps", type=int, default=5, help="measured steps")
    parser.add_argument("--threads", type=int, default=1, help="of every rank, on the CPU")
    parser.add_argument("--blocks", type=int, default=8, help="of the teacher; the student has half as many")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=2, help="of every rank's micro-batch")
    parser.add_argument("--sequence", type=int, default=128)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default float32, on CUDA bfloat16")
    parser.add_argument("--tied", action="store_true", help="the LM head is the embedding")
    parser.add_argument("--checkpoint", action="store_true", help="recompute the student's blocks in backward")
    options = parser.parse_args(argv)
    cuda = options.device == "cuda"
    options.dtype = options.dtype or ("bfloat16" if cuda else "float32")
    if options.ranks is None:
        options.ranks = [ranks for ranks in (1, 2, 4) if not cuda or ranks <= torch.cuda.device_count()]
    return options


def setting_of(options: argparse.Namespace) -> Setting:
    width = options.width
    heads = max(1, width // 64)
    teacher, student = (
        Side(blocks, width, 4 * width, heads, heads) for blocks in (options.blocks, options.blocks // 2)
    )
    shape = Shape(teacher, student, options.vocab, options.rows, options.sequence, options.dtype, tied=options.tied)
    return Setting(shape, options.steps, options.device, options.threads, options.checkpoint)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints, writes."""
    options = options_of(argv)
    setting = setting_of(options)
    with tempfile.TemporaryDirectory() as name:
        write_models(setting, Path(name))
        rows = [summarised(ranks, setting.shape, measure(setting, ranks, Path(name))) for ranks in options.ranks]
    for row in rows:
        row["efficiency"] = row["tokens_per_s"] / row["ranks"] / (rows[0]["tokens_per_s"] / rows[0]["ranks"])
    shape = setting.shape
    report = {
        "benchmark": "scaling: a TED step under ZeRO-3, teacher and student sharded, nothing resident",
        "shape": asdict(shape) | {side: parameters_of(getattr(shape, side), shape) for side in ("teacher", "student")},
        "tied": shape.tied,
        "activation_checkpointing": setting.checkpoint,
        "threads_per_rank": setting.threads if options.device == "cpu" else None,
        "zero_optimization": ZERO3,
        "steps": setting.steps,
        "ranks": rows,
        "environment": environment(torch.device(options.device), "scaling", sys.argv[1:] if argv is None else argv),
    }
    publish(report, tables(rows), lambda figure: draw(figure, rows), options.json)


def tables(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Speed; bytes by collective; everything else; what was gathered more often than in theory."""
    columns = ["ranks", "seconds", "tokens_per_s", "efficiency", "bytes", "theory_bytes", "bytes_to_theory"]
    parts = [
        {"ranks": row["ranks"], "collective": name, **part, "ratio": _ratio(row["ranks"], part)}
        for row in rows
        for name, part in row["collectives"].items()
    ]
    other = [{"ranks": row["ranks"], **part} for row in rows for part in row["other"]]
    more = [{"ranks": row["ranks"], **part} for row in rows for part in row["surplus"][:10]]
    shown = [
        table(rows, [*columns, "other_bytes"]),
        table(parts, ["ranks", "collective", "bytes", "theory_bytes", "ratio"]),
        "other\n" + table(other, ["ranks", "kind", "caller", "calls", "bytes"]),
    ]
    if more:
        shown.append("gathered more often than in theory (the ten largest)\n" + table(more, list(more[0])))
    return shown


def _ratio(ranks: int, part: dict[str, int]) -> float | None:
    """Bytes over theory; None for one rank, which has nothing to gather."""
    return part["bytes"] / part["theory_bytes"] if ranks > 1 else None


if __name__ == "__main__":
    main()
