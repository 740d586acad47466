"""A TED step through DeepSpeed's engines as they are shipped, on one device.

`python -m benchmarks.engine --json OUT`: optimizer steps of one micro-batch (8 rows of 1024 tokens at 1.5b) by the
project's own engines, in each mode

* `zero3`: `ds_configs/zero3.json` and `teacher_zero3.json`,
* `replicated`: `zero3.json` and a teacher that is whole,
* `zero1`: `zero1.json` and a teacher that is whole,
* `zero0`: `zero0.json` and a teacher that is whole,

beside `plain`: the teacher's forward with its logits, and a student's CE step in the same engine. For each: seconds,
tokens/s, MFU by counted FLOPs, the phases of a step, the processor time that the host needs for it, peak memory. The
main number is `ted_to_plain` of each mode.

--size host: the same blocks, so narrow that next to nothing but the host's work for a step is left, without a GPU too:
blocks are DeepSpeed's leaf modules then, as on a GPU.

--profile FILE: torch's profiler over two steps of the first mode, as tables. --waits: only counts how often a step
makes the host wait for the device, by who asks; the exit code is not 0 if ted_ds does.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from matplotlib.figure import Figure

from benchmarks.flops import step_flops
from benchmarks.report import bars, parser_of, publish, table
from benchmarks.scaling import TED, Setting, build_engines, write_models
from benchmarks.shapes import SHAPES, Shape, parameters_of, random_batch
from benchmarks.timing import environment
from ted_ds.config.sections import LossConfig
from ted_ds.job.world import World, init_world, shut_down
from ted_ds.ops import Head
from ted_ds.pipeline.step import train_step
from ted_ds.telemetry.flops import peak_flops
from ted_ds.telemetry.memory import peak_memory_gib, reset_peak
from ted_ds.telemetry.timeline import PHASES, Timeline, recording

MODES: dict[str, dict[str, Any]] = {
    "zero3": {"deepspeed": "ds_configs/zero3.json", "teacher": {"deepspeed": "ds_configs/teacher_zero3.json"}},
    "replicated": {"deepspeed": "ds_configs/zero3.json", "teacher": {"sharding": "replicated"}},
    "zero1": {"deepspeed": "ds_configs/zero1.json", "teacher": {"sharding": "replicated"}},
    "zero0": {"deepspeed": "ds_configs/zero0.json", "teacher": {"sharding": "replicated"}},
}
"""Mode -> what its recipe changes."""

CE = LossConfig(kl_alpha=0.0, mse_alpha=0.0, balance="none", layer_fade=0.0)
WARMUP_STEPS = 3
COLUMNS = ("mode", "what", "seconds", "tokens_per_s", "mfu", "host_ms", "peak_gib", *PHASES)

Run = Callable[[], Any]


def as_on_gpu() -> AbstractContextManager[Any]:
    """Engines that are built within it have blocks as leaf modules, see `build_trained_engine`."""
    return patch("ted_ds.distill.engine.get_accelerator", lambda: SimpleNamespace(device_name=lambda: "cuda"))


@contextmanager
def engines(setting: Setting, folder: Path, world: World, mode: str, step: str) -> Iterator[Run]:
    """One optimizer step of `ted` or `plain`; batches come from the host, as in a run."""
    gc.collect()  # the engines before
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    reset_peak(world.device)
    with as_on_gpu() if setting.shape == SHAPES["host"] else nullcontext():
        engine, teacher = build_engines(setting, folder, world, TED if step == "ted" else CE, **MODES[mode])
    engine.train()
    batch = random_batch(setting.shape, torch.device("cpu"))

    def ted() -> Any:
        return train_step(engine, [batch], world)

    def logits(hidden: torch.Tensor, head: Head | None) -> None:
        if head is not None:
            _ = hidden.detach() @ head.weight.detach().T

    def plain() -> Any:
        teacher.stream(batch.to(world.device), logits)
        return train_step(engine, [batch], world)

    try:
        yield ted if step == "ted" else plain
    finally:
        engine.destroy()
        teacher.close()


def measure(setting: Setting, folder: Path, world: World, mode: str, step: str, profile: Path | None) -> dict[str, Any]:
    """The row of one step in one mode."""
    with engines(setting, folder, world, mode, step) as run:
        for _ in range(WARMUP_STEPS):
            run()
        settle(world)
        seconds, host = [], []
        for _ in range(setting.steps):
            start, busy = time.perf_counter(), time.process_time()
            run()
            host.append(time.process_time() - busy)
            settle(world)
            seconds.append(time.perf_counter() - start)
        timeline = Timeline(world.device)
        with recording(timeline):
            for _ in range(setting.steps):
                run()
        phases = {name: value / setting.steps for name, value in timeline.read().items()}
        if profile:
            write_profile(profile, run)
    shape, median = setting.shape, statistics.median(seconds)
    cuda = world.device.type == "cuda"
    peak = peak_flops(torch.cuda.get_device_name(), getattr(torch, shape.dtype)) if cuda else None
    return {
        "mode": mode,
        "what": step,
        "seconds": median,
        "tokens_per_s": shape.tokens / median,
        "mfu": peak and step_flops(step, shape) / median / peak,
        "host_ms": 1000 * statistics.median(host),
        "least_host_ms": 1000 * min(host),
        "peak_gib": peak_memory_gib(world.device),
        **phases,
        "all_seconds": seconds,
    }


def settle(world: World) -> None:
    """Waits for the device."""
    if world.device.type == "cuda":
        torch.cuda.synchronize()


def write_profile(path: Path, run: Run) -> None:
    """Two steps under torch's profiler: operators by the device's time, then by the host's."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        run()
        run()
    averages = profiler.key_averages()
    orders = ["self_device_time_total"] * (len(activities) > 1) + ["self_cpu_time_total"]
    tables = [averages.table(sort_by=order, row_limit=60, max_name_column_width=90) for order in orders]
    path.write_text("\n".join(f"two steps, by {o}\n{t}" for o, t in zip(orders, tables, strict=True)), encoding="utf-8")


@contextmanager
def waits_counted() -> Iterator[Counter[tuple[str, str]]]:
    """Counts (who, where) of every wait of the host for the device: torch's debug mode, and plain synchronisations."""
    from deepspeed.accelerator import get_accelerator

    found: Counter[tuple[str, str]] = Counter()

    def note(*_: Any, **__: Any) -> None:
        for frame in reversed(traceback.extract_stack()):
            owner = next((o for o in ("deepspeed", "ted_ds", "transformers") if f"/{o}/" in frame.filename), None)
            if owner:
                place = frame.filename.rpartition(f"/{owner}/")[2]
                found[owner, f"{owner}/{place}:{frame.lineno} {frame.name}"] += 1
                return

    def warned(message: Warning | str, *_: Any, **__: Any) -> None:
        if "synchroniz" in str(message):
            note()

    places: list[tuple[Any, str]] = [(type(get_accelerator()), "synchronize"), (torch.cuda, "synchronize")]
    places += [(torch.cuda.Event, "synchronize"), (torch.cuda.Stream, "synchronize")]
    kept = [getattr(owner, name) for owner, name in places]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = warned
        for owner, name in places:
            setattr(owner, name, note)
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("default")
            for (owner, name), original in zip(places, kept, strict=True):
                setattr(owner, name, original)


def count_waits(setting: Setting, folder: Path, world: World, mode: str) -> int:
    """Prints who waits in a step of this mode; how often ted_ds does."""
    with engines(setting, folder, world, mode, "ted") as run:
        for _ in range(WARMUP_STEPS):
            run()
        settle(world)
        with waits_counted() as found:
            for _ in range(setting.steps):
                run()
    for (_, place), times in found.most_common():
        print(f"{mode}: {times / setting.steps:g} a step: {place}")
    by_owner: Counter[str] = Counter()
    for (owner, _), times in found.items():
        by_owner[owner] += times
    each = ", ".join(
        f"{owner} {by_owner[owner] / setting.steps:g}" for owner in ("ted_ds", "deepspeed", "transformers")
    )
    print(f"{mode}: waits of a step: {each}", flush=True)
    return by_owner["ted_ds"]


def draw(figure: Figure, rows: list[dict[str, Any]]) -> None:
    left, right = figure.subplots(1, 2)
    bars(left, {f"{r['mode']} {r['what']}": r["seconds"] for r in rows}, title="time of a step", unit="s")
    bars(right, {f"{r['mode']} {r['what']}": r["peak_gib"] for r in rows}, title="peak memory", unit="GiB")


def options_of() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--size", choices=SHAPES, help="default: host, or 1.5b on CUDA")
    parser.add_argument("--rows", type=int, help="of the micro-batch; default 8 on CUDA")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--steps", type=int, default=10, help="measured steps")
    parser.add_argument("--checkpoint", action="store_true", help="recompute the student's blocks in backward")
    parser.add_argument("--profile", type=Path, metavar="FILE")
    parser.add_argument("--waits", action="store_true")
    parser.add_argument("--gate", action="store_true", help="only what `make bench-check` compares: the host's work")
    return parser.parse_args()


def shape_of(options: argparse.Namespace) -> Shape:
    cuda = options.device == "cuda"
    shape = SHAPES[options.size or ("1.5b" if cuda else "host")]
    return replace(shape, rows=options.rows or (8 if cuda else shape.rows))


def main() -> int:
    """Measures, prints, writes; returns the exit code."""
    options = options_of()
    shape = shape_of(options)
    setting = Setting(shape, options.steps, options.device, 1, options.checkpoint)
    world = init_world()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(setting, folder, options.device)
        if options.waits:
            ours = sum(count_waits(setting, folder, world, mode) for mode in options.modes)
            shut_down(world)
            return 1 if ours else 0
        for mode in options.modes:
            for step in ("ted",) if options.gate else ("ted", "plain"):
                profile = options.profile if (mode, step) == (options.modes[0], "ted") else None
                rows.append(measure(setting, folder, world, mode, step, profile))
                print({k: v for k, v in rows[-1].items() if k != "all_seconds"}, flush=True)
                publish(report(options, shape, rows), [], lambda figure: draw(figure, rows), options.json)
    print(table(rows, COLUMNS))
    print({name: ratio for name, ratio in report(options, shape, rows).items() if "ratio" in name or "to_" in name})
    shut_down(world)
    return 0


def report(options: argparse.Namespace, shape: Shape, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What is known so far."""
    seconds = {(row["mode"], row["what"]): row["seconds"] for row in rows}
    host = {row["mode"]: row["least_host_ms"] for row in rows if row["what"] == "ted"}  # other work only adds to it
    return {
        "benchmark": "engine: an optimizer step of one micro-batch through DeepSpeed's engines",
        "size": options.size,
        "shape": asdict(shape) | {side: parameters_of(getattr(shape, side), shape) for side in ("teacher", "student")},
        "activation_checkpointing": options.checkpoint,
        "ted_to_plain": {
            mode: seconds[mode, "ted"] / seconds[mode, "plain"] for mode in MODES if (mode, "plain") in seconds
        },
        **{f"host_ratio_{mode}": ms / host["zero0"] for mode, ms in host.items() if "zero0" in host},
        "steps": rows,
        "environment": environment(torch.device(options.device), "engine", sys.argv[1:]),
    }


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # at exit the threads of DeepSpeed's engines may outlive the process group
