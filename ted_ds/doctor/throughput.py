"""What a recipe's Stage II does in a second, and how much memory it takes: measured, at each micro-batch size.

Nothing has to be made for it. The student is drawn at random in the shape that Stage 0 would give it, the filters are
fresh, and a causal LM whose data are not prepared reads Python's own documentation. All else is the run's own: engines,
teacher, loader, losses.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ted_ds.batch import Batch
from ted_ds.config.schema import ResolvedRun, RunConfig
from ted_ds.config.tasks import KINDS
from ted_ds.data.loader import Rows
from ted_ds.data.stdlib_corpus import write_stdlib_corpus
from ted_ds.doctor.engines import available_bytes
from ted_ds.doctor.shapes import planned_pairs, student_config
from ted_ds.errors import ConfigError, TedError
from ted_ds.job.files import empty_folder
from ted_ds.job.world import World, logger
from ted_ds.models.filter_files import write_filters
from ted_ds.models.loading import DTYPES
from ted_ds.models.task_head import AUTO_CLASSES
from ted_ds.pipeline.batch_flops import stage2_flops
from ted_ds.pipeline.stage0 import ModelPaths, check_models
from ted_ds.pipeline.stage2 import Plan, begin_step, build_distillation_engine
from ted_ds.pipeline.step import train_step
from ted_ds.tasks.base import RunData
from ted_ds.tasks.registry import open_data, open_tokenizer
from ted_ds.telemetry.flops import peak_flops
from ted_ds.telemetry.memory import peak_memory_gib, peak_reserved_gib, reset_peak
from ted_ds.telemetry.timeline import Timeline, recording

WARMUP_STEPS = 2
"""ZeRO-3 records the order of modules in the first step and follows it from the second on."""

MOST_MEMORY = 0.92
"""Share of the memory that the next size may be expected to take; what is left is for fragments and evaluation."""

NO_RATE = 1e-12
"""Weights that are drawn at random would soon diverge, and steps without finite gradients are shorter."""


@dataclass(frozen=True)
class Measured:
    """One micro-batch size.

    micro_batches: of a rank in an optimizer step. micro_batch_ms, update_ms: a step takes micro_batches of the one and
    one of the other, which holds the optimizer and what is done once a step. tokens_per_second: padding left out, of
    all ranks; a_rank: of one. mfu: None on devices whose peak is not known. peak_memory_gib: see `telemetry.memory`;
    the highest of any rank. communication: share of a step's time in which collectives run, beside computation or
    not; None on one rank. phase_ms: of a step of one micro-batch, see `telemetry.timeline`.
    """

    micro_batch_size: int
    micro_batches: int
    micro_batch_ms: float
    update_ms: float
    step_ms: float
    tokens_per_second: float
    a_rank: float
    mfu: float | None
    peak_memory_gib: float
    communication: float | None
    phase_ms: dict[str, float]


@dataclass(frozen=True)
class Throughput:
    """All sizes that fit. ended: why there are no more. faded: the fastest size once the layer loss has faded, None if
    it does not. hours: of the recipe's steps at the fastest size, without Stage 0 and I, evaluation and checkpoints.
    """

    device: str
    ranks: int
    sizes: list[Measured]
    fastest: Measured
    ended: str
    faded: Measured | None
    hours: float


def measure_throughput(run: RunConfig, world: World, folder: Path, steps: int) -> Throughput:
    """Steps of a recipe at every micro-batch size that divides its global batch, by doubling, until memory ends.

    folder: for what is made on the way; all ranks see it, and it is gone afterwards. steps: measured, of each kind. A
    collective. Raises TedError if the recipe is wrong or does not fit.
    """
    if run.teacher is not None and run.teacher.cache is not None:
        raise ConfigError("a teacher's cache would first have to be recorded: give --teacher.cache=null")
    world.on_main(lambda: len(str(empty_folder(folder))))
    try:
        own = _with_rows_at_hand(run, folder, world.on_main(lambda: _write_corpus(run, folder)))
        tokenizer = open_tokenizer(own, world)
        models, pairs, filters = world.on_main(lambda: _models(own, folder, tokenizer.vocab_size))
        data = open_data(own, world, tokenizer, check_models(own, models, tokenizer, world))
        resolved = own.resolved(data.num_rows)
        plan = Plan(models, pairs, filters)
        engine = build_distillation_engine(resolved, world, data, plan)
        return _Bench(resolved, world, data, plan, engine, steps).measured()
    finally:
        if world.is_main:  # no collective: the other ranks may be in the middle of a step that failed here
            shutil.rmtree(folder, ignore_errors=True)


def _write_corpus(run: RunConfig, folder: Path) -> Path | None:
    """The file of the rows that stand for a causal LM's data, unless those are prepared; on one rank."""
    if not KINDS[run.spec.kind].lm_head or (run.prepared_folder / "train").exists():
        return None
    write_stdlib_corpus(folder / "corpus")
    return folder / "corpus/train.jsonl"


def _with_rows_at_hand(run: RunConfig, folder: Path, corpus: Path | None) -> RunConfig:
    """The recipe in a folder of its own, with a rate that changes nothing."""
    rows: dict[str, Any] = {"prepared": run.prepared_folder}
    if corpus is not None:
        rows = {"prepared": folder / "data", "train": (str(corpus),), "validation": ()}
    changes = {
        "output_dir": folder,
        "optimizer": run.optimizer.model_copy(update={"learning_rate": NO_RATE}),
        "data": run.data.model_copy(update=rows),
    }
    return run.model_copy(update=changes)


def _models(run: RunConfig, folder: Path, vocabulary: int) -> tuple[ModelPaths, Any, dict[str, Path]]:
    """The paths of both models, the plan of the pairs, and the folder of the teacher's filters; on one rank."""
    teacher = run.teacher.model if run.teacher is not None and run.uses_teacher else None
    student, section = run.student.model, run.student
    if student is None or section.init_from_pretrained:
        student = str(folder / "student")
        logger.info("a student at random -> %s", student)
        config = student_config(run)
        auto: Any = AUTO_CLASSES[run.spec.kind]
        torch.manual_seed(run.seed)
        model = auto.from_config(config, dtype=DTYPES[section.dtype], trust_remote_code=section.trust_remote_code)
        model.save_pretrained(student)
    models = ModelPaths(student, teacher)
    pairs = planned_pairs(run, student) if run.loss.mse_alpha else None
    filters = {}
    if pairs is not None and pairs.teacher is not None:
        filters = {"teacher": folder / "teacher_filters"}
        write_filters(pairs.teacher.build(), pairs.teacher, filters["teacher"])
    return models, pairs, filters


class _Bench:
    """One engine, which takes micro-batches of any size."""

    def __init__(self, run: ResolvedRun, world: World, data: RunData, plan: Plan, engine: Any, steps: int) -> None:
        self._run, self._world, self._data, self._plan = run, world, data, plan
        self._engine, self._steps = engine, steps
        self._fade = 1.0
        engine.train()

    def measured(self) -> Throughput:
        """See `measure_throughput`."""
        sizes: list[Measured] = []
        ended = "the global batch has no larger part"
        limit = available_bytes(self._world) / 2**30
        for size in self._candidates():
            if len(sizes) > 1 and (need := _expected_gib(sizes[-2:], size)) > MOST_MEMORY * limit:
                ended = f"{size} rows would take about {need:.1f} of {limit:.1f} GiB"
                break
            try:
                sizes.append(self._measure(size))
            except torch.OutOfMemoryError as error:
                if not sizes or self._world.size > 1:  # the other ranks are in the middle of a step
                    raise TedError(f"micro-batches of {size} rows do not fit: {error}") from error
                ended = f"{size} rows do not fit"
                break
        fastest = max(sizes, key=lambda one: one.tokens_per_second)
        share, steps = self._run.loss.layer_fade if self._plan.pairs else 0.0, self._run.train.steps
        faded = None
        if share:
            self._fade = 0.0
            faded = self._measure(fastest.micro_batch_size)
        spent = share * fastest.step_ms + (1 - share) * faded.step_ms if faded else fastest.step_ms
        name = torch.cuda.get_device_name(self._world.device) if self._world.device.type == "cuda" else "cpu"
        return Throughput(name, self._world.size, sizes, fastest, ended, faded, steps * spent / 3.6e6)

    def _candidates(self) -> Iterator[int]:
        """Powers of two, and the recipe's own size, of which a rank's part of the global batch is a multiple."""
        part, own = self._run.train.global_batch_size // self._world.size, self._run.train.micro_batch_size
        if KINDS[self._run.spec.kind].compares_rows and self._run.loss.kl_alpha:  # a step's rows stay together
            return iter([part])
        sizes = {own, *(1 << i for i in range(part.bit_length()))}
        return iter(sorted(size for size in sizes if size <= part and part % size == 0))

    def _measure(self, size: int) -> Measured:
        world, device = self._world, self._world.device
        train = self._run.train.model_copy(update={"micro_batch_size": size})
        run = self._run.model_copy(update={"train": train})
        rows = self._data.training_rows(run, world, size * world.size)
        self._engine.set_train_micro_batch_size(size)
        for _ in range(WARMUP_STEPS):
            self._step(rows.micro_batches(0))
        reset_peak(device)
        timeline = Timeline(device)
        one = two = 0.0
        for step in range(self._steps):
            batches = rows.micro_batches(step)
            with recording(timeline):
                one += self._seconds(batches) / self._steps
            two += self._seconds(batches * 2) / self._steps
        count = run.train.global_batch_size // (size * world.size)
        each = max(two - one, 0.0)
        seconds = one + (count - 1) * each
        tokens = count * sum(rows.tokens(step) for step in range(self._steps)) / self._steps
        peak = peak_reserved_gib(device) if device.type == "cuda" else peak_memory_gib(device)
        found = Measured(
            micro_batch_size=size,
            micro_batches=count,
            micro_batch_ms=1e3 * each,
            update_ms=1e3 * max(one - each, 0.0),
            step_ms=1e3 * seconds,
            tokens_per_second=tokens / seconds,
            a_rank=tokens / seconds / world.size,
            mfu=self._mfu(run, rows, count / seconds),
            peak_memory_gib=-world.min(torch.tensor(-peak, dtype=torch.float64)).item(),
            communication=self._communication(rows.micro_batches(0)) if world.size > 1 else None,
            phase_ms={name: total / self._steps for name, total in timeline.read().items()},
        )
        logger.info("%d rows: %.0f tokens/s, %.1f GiB", size, found.tokens_per_second, found.peak_memory_gib)
        return found

    def _step(self, batches: list[Batch]) -> None:
        size = len(batches) * self._world.size * self._engine.train_micro_batch_size_per_gpu()
        self._engine.set_train_batch_size(size)
        train_step(self._engine, batches, self._world, **begin_step(self._engine.module, self._fade, self._world))

    def _seconds(self, batches: list[Batch]) -> float:
        """A step's time on the slowest rank."""
        self._world.barrier()
        self._settle()
        start = time.perf_counter()
        self._step(batches)
        self._settle()
        spent = torch.tensor(start - time.perf_counter(), dtype=torch.float64)
        return -self._world.min(spent).item()

    def _settle(self) -> None:
        if self._world.device.type == "cuda":
            torch.cuda.synchronize()

    def _communication(self, batches: list[Batch]) -> float:
        """The share of a step in which this rank has a collective running, by torch's profiler."""
        from torch.profiler import ProfilerActivity, profile

        on_cuda = self._world.device.type == "cuda"
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]) as profiler:
            spent = self._seconds(batches)
        mark = "ncclDevKernel" if on_cuda else "gloo:"
        spans = sorted((e.time_range.start, e.time_range.end) for e in profiler.events() if e.name.startswith(mark))
        return min(1.0, _union(spans) / (1e6 * spent))

    def _mfu(self, run: ResolvedRun, rows: Rows, batches_per_second: float) -> float | None:
        if self._world.device.type != "cuda":
            return None
        pairs = self._plan.pairs
        own = () if pairs is None else (pairs.layer_map, pairs.student, pairs.teacher)
        flops = stage2_flops(run, self._plan.models, self._data.task, self._data.tokenizer, *own)
        if flops is None or flops.dtype is None:
            return None
        peak = peak_flops(torch.cuda.get_device_name(self._world.device), flops.dtype)
        lengths = [batch.input_ids.shape[1] for step in range(self._steps) for batch in rows.micro_batches(step)]
        without = {} if self._fade else {"layers": False}
        work = sum(flops.count(length, **without) for length in lengths) / len(lengths)
        return None if peak is None else work * batches_per_second / peak


def _expected_gib(known: list[Measured], size: int) -> float:
    """Memory grows by the row."""
    (a, x), (b, y) = ((one.micro_batch_size, one.peak_memory_gib) for one in known)
    return y + (y - x) * (size - b) / (b - a)


def _union(spans: list[tuple[float, float]]) -> float:
    """The time that sorted spans cover, each moment once."""
    covered, reached = 0.0, float("-inf")
    for start, end in spans:
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered
