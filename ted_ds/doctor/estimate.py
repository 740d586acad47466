"""A first estimate of what a rank holds in Stage II, and of a checkpoint on disk, from shapes alone.

Not estimated: fragmentation of the allocator, buffers of the collectives, short peaks of loading and evaluation.
Stage I holds less: one frozen model and filters.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from ted_ds.config.deepspeed import trained_engine_config
from ted_ds.config.schema import RunConfig
from ted_ds.config.tasks import KINDS
from ted_ds.doctor.shapes import FilterShape, ModelShape, Shapes
from ted_ds.models.loading import DTYPES
from ted_ds.ops.layer_loss import KINDS as LAYER_KINDS
from ted_ds.ops.logit_gemms import default_chunk_tokens
from ted_ds.teacher.hosting import HOSTS

FLOAT32 = 4

Place = Literal["device", "host"]


@dataclass(frozen=True)
class Machine:
    """What one rank may use, in bytes.

    device_bytes: of its GPU, or on CPUs its share of the host's memory. host_bytes: its share of the host's memory if
    the device is a GPU, else 0. idle: what the process holds before it loads anything.
    """

    world_size: int
    device: torch.device
    device_bytes: float
    host_bytes: float
    idle: float


class Line(NamedTuple):
    """A part of the estimate, in bytes per rank. passing: only the largest of these counts, they follow each other."""

    what: str
    size: float
    place: Place = "device"
    passing: bool = False


@dataclass(frozen=True)
class Estimate:
    """Bytes that a rank holds at its worst moment. checkpoint: bytes on disk, of all ranks together."""

    lines: tuple[Line, ...]
    checkpoint: float

    def total(self, place: Place) -> float:
        """The lines that stay, and the largest of those that pass."""
        own = [line for line in self.lines if line.place == place]
        passing = max((line.size for line in own if line.passing), default=0.0)
        return sum(line.size for line in own if not line.passing) + passing


class _Engine:
    """How a DeepSpeed engine keeps its state. item: bytes of one element of its weights."""

    def __init__(self, config: dict[str, Any], ranks: int, item: int) -> None:
        self.zero = DeepSpeedZeroConfig(**config.get("zero_optimization", {}))
        self.stage, self.ranks, self.item = int(self.zero.stage), ranks, item
        self.weights: Place = "host" if _offloads(self.zero.offload_param) else "device"
        self.states: Place = "host" if _offloads(self.zero.offload_optimizer) else "device"
        accumulation = config.get("data_types", {}).get("grad_accum_dtype")
        self.gradient_item = item if accumulation is None else FLOAT32 if accumulation == "fp32" else 2
        # ZeRO also copies weights that are float32 already
        self.has_float32_copies = bool(self.stage) or item != FLOAT32

    def share(self, elements: int, from_stage: int) -> float:
        """The elements on one rank of a state that is sharded from this stage on."""
        return elements / self.ranks if self.stage >= from_stage else elements

    def gathered(self, elements: int, largest: int, *, backward: bool) -> int:
        """Elements of sharded weights that are whole at the same time.

        A weight that backward needs again within the reuse distance stays: between forward and backward these are
        half of that distance. One rank gathers nothing, unless its weights lie on the host.
        """
        if self.stage < 3 or (self.ranks == 1 and self.weights == "device"):
            return 0
        reused = int(self.zero.max_reuse_distance) // 2 if backward else 0
        return min(elements, max(largest, reused) + int(self.zero.prefetch_bucket_size))


def _offloads(section: Any) -> bool:
    """Whether a section such as zero_optimization.offload_param moves anything."""
    return section is not None and section.device != "none"


def estimate(run: RunConfig, shapes: Shapes, machine: Machine) -> Estimate:
    """What each of `machine.world_size` ranks holds in Stage II.

    Raises ConfigError if the DeepSpeed files or the batch sizes do not fit the recipe or the number of ranks.
    """
    on_cpu = machine.device.type == "cpu"
    config = trained_engine_config(
        run,
        world_size=machine.world_size,
        learning_rate=run.optimizer.learning_rate,
        weight_decay=run.optimizer.weight_decay,
        cpu=on_cpu,
    )
    engine = _Engine(config, machine.world_size, DTYPES[run.student.dtype].itemsize)
    trained = shapes.student.parameters + shapes.filters.pairs * shapes.filters.student
    kept = _activation_lines(run, shapes.student, shapes.filters, engine.item)
    activations = sum(line.size for line in kept)
    lines = [
        Line("the process itself", machine.idle),
        *_trained_lines(engine, trained, shapes.student.largest, activations, on_cpu=on_cpu),
        *_teacher_lines(run, shapes.teacher, shapes.filters, machine.world_size),
        *kept,
        *_passing_lines(run, shapes, machine.device),
    ]
    # moments, float32 copies if there are any, and below ZeRO-3 the weights themselves
    item = 2 * FLOAT32 + FLOAT32 * engine.has_float32_copies + (0 if engine.stage == 3 else engine.item)
    if on_cpu:  # offloaded state stays in the same memory
        lines = [line._replace(place="device") for line in lines]
    return Estimate(tuple(line for line in lines if line.size), trained * item)


def _trained_lines(engine: _Engine, trained: int, largest: int, activations: float, *, on_cpu: bool) -> Iterator[Line]:
    """Weights, gradients and AdamW's state of the student and its filters, as DeepSpeed's stages keep them."""
    item, states, shard = engine.item, engine.states, engine.share(trained, 1)
    millions = f"{trained / 1e6:.1f} M of student and filters"
    yield Line(f"weights, {millions}", item * engine.share(trained, 3), engine.weights)
    if engine.has_float32_copies:
        yield Line("their float32 copies", FLOAT32 * shard, states)
    yield Line("AdamW's two moments", 2 * FLOAT32 * shard, states)
    yield Line("gradients", engine.gradient_item * engine.share(trained, 2), states)
    yield Line("weights gathered at a time", item * engine.gathered(trained, largest, backward=True))
    if engine.stage:
        bucket = engine.zero.reduce_bucket_size  # on a CPU its memory is taken as it is filled
        yield Line("bucket of gradients", item * (min(bucket, trained) if on_cpu else bucket))
    if engine.has_float32_copies:
        what, step = "gradients in float32 for the optimizer", FLOAT32 * shard
        if states == "host":
            yield Line(what, step, "host")
        else:  # the optimizer steps when the activations are gone
            yield Line(what, max(0.0, step - activations), passing=True)


def _teacher_lines(run: RunConfig, teacher: ModelShape | None, filters: FilterShape, world_size: int) -> Iterator[Line]:
    if teacher is None or run.teacher is None:
        return
    item = DTYPES[run.teacher.dtype].itemsize
    elements = teacher.parameters + filters.pairs * filters.teacher
    named = f"{elements / 1e6:.1f} M"
    if run.teacher.cache is not None:
        if run.loss.kl_alpha and run.loss.kl_top_k is None and KINDS[run.spec.kind].lm_head:
            yield Line("the cached teacher's LM head", item * teacher.vocab * teacher.width)
    elif (host := HOSTS[run.teacher.sharding]).whole_copy:
        yield Line(f"the teacher's copy, {named}", item * elements)
    else:
        engine = _Engine(host.engine_config(run, world_size) or {}, world_size, item)
        yield Line(f"the teacher's shard, {named}", item * elements / world_size, engine.weights)
        gathered = engine.gathered(elements, teacher.largest, backward=False)
        yield Line("the teacher's weights gathered at a time", item * gathered)


def _activation_lines(run: RunConfig, student: ModelShape, filters: FilterShape, item: int) -> list[Line]:
    """What waits for backward. With checkpointing a block keeps only its input [B, S, D]."""
    rows, length = run.train.micro_batch_size, run.data.sequence_length
    name, saved = "activations", student.saved
    if run.student.activation_checkpointing:
        name = "activations, a block's input each"
        saved = student.saved_outside + student.blocks * length * student.width * item
    residual = filters.output_dim * item
    hidden = (2 + LAYER_KINDS[run.loss.layer_loss].by_token) * student.width * item if run.filters.nonlinear else 0
    waiting = filters.pairs * rows * length * (residual + hidden)
    return [Line(f"{name}, {rows} rows", rows * saved), Line(f"residuals of {filters.pairs} pairs", waiting)]


def _passing_lines(run: RunConfig, shapes: Shapes, device: torch.device) -> Iterator[Line]:
    """What is held for a moment: a teacher's block, a block's backward, the chunks of logits."""
    rows, length, student = run.train.micro_batch_size, run.data.sequence_length, shapes.student
    live = False
    if shapes.teacher is not None and run.teacher is not None and run.teacher.cache is None:
        live = True
        state = length * (shapes.teacher.width + shapes.filters.output_dim) * DTYPES[run.teacher.dtype].itemsize
        yield Line("a teacher's block and its state", rows * (shapes.teacher.saved_in_block + state), passing=True)
    recomputed = 2 if run.student.activation_checkpointing else 1
    yield Line("a block's backward", recomputed * rows * student.saved_in_block, passing=True)
    if KINDS[run.spec.kind].lm_head:
        compared = bool(run.loss.kl_alpha) and (live or run.loss.kl_top_k is None)
        widened = compared and run.loss.kl_top_k is not None
        size = _logit_bytes(run, student, device, sides=1 + compared, widened=widened)
        yield Line("chunks of logits, d_hidden and d_weight of the LM head", size, passing=True)


def _logit_bytes(run: RunConfig, student: ModelShape, device: torch.device, *, sides: int, widened: bool) -> float:
    """Of `linear_cross_entropy_kl`: a chunk [C, V] per side, d_hidden, d_weight [V, D] in float32 and in its dtype."""
    tokens = run.train.micro_batch_size * run.data.sequence_length
    like = torch.empty(0, dtype=DTYPES[run.student.dtype], device=device)
    item = like.element_size()
    chunk = default_chunk_tokens(tokens, student.vocab, like, sides=sides, widened=widened)
    row = student.vocab * (sides * item + 8 * (widened and like.is_cuda))
    wide = FLOAT32 if item == FLOAT32 else FLOAT32 + item
    return chunk * row + tokens * student.width * item + student.vocab * student.width * wide
