"""A first estimate of what a rank holds in Stage II, and a checkpoint on disk, from shapes alone.

Not estimated: fragments of the allocator, buffers of the collectives, the one-time peaks of loading and evaluation.
Stage I holds less: one frozen model and filters.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedConfig

from ted_ds.config.deepspeed import trained_engine_config
from ted_ds.config.schema import RunConfig
from ted_ds.config.tasks import Kind
from ted_ds.models.loading import DTYPES
from ted_ds.models.structure import find_blocks
from ted_ds.models.task_head import AUTO_CLASSES
from ted_ds.ops.logit_gemms import default_chunk_tokens
from ted_ds.teacher.hosting import HOSTS

FLOAT32 = 4


@dataclass(frozen=True)
class ModelShape:
    """A model without weights.

    parameters, largest: elements, of all of it (tied ones once) and of the largest part that ZeRO-3 gathers in one
    go, a block or an embedding. vocab: the rows of its embedding.
    saved, saved_outside, saved_in_block: bytes that autograd keeps of one row's forward, in all, of what is no block,
    and of the block that keeps most.
    """

    parameters: int
    largest: int
    blocks: int
    width: int
    vocab: int
    saved: int
    saved_outside: int
    saved_in_block: int


@dataclass(frozen=True)
class FilterShape:
    """K filters of each side: widths, and parameters of one (0: the side has none)."""

    pairs: int
    output_dim: int
    student: int
    teacher: int


class Line(NamedTuple):
    """A part of the estimate, in bytes a rank. passing: of these only the largest counts, they follow each other."""

    what: str
    size: float
    place: Literal["device", "host"] = "device"
    passing: bool = False


@dataclass(frozen=True)
class Estimate:
    """Bytes a rank holds at its worst moment. checkpoint: of all ranks together, on disk."""

    lines: tuple[Line, ...]
    checkpoint: float

    def total(self, place: str) -> float:
        """What stays, and the largest of what passes."""
        own = [line for line in self.lines if line.place == place]
        return sum(line.size for line in own if not line.passing) + max([0.0, *(p.size for p in own if p.passing)])


@dataclass(frozen=True)
class _Zero:
    """What a DeepSpeed file says of memory, see DeepSpeed's configuration reference; its defaults are DeepSpeed's."""

    stage: int
    ranks: int
    bucket: int
    prefetch: int
    reuse_distance: int
    offload_optimizer: bool
    offload_weights: bool
    accumulation_bytes: int

    @staticmethod
    def of(config: dict[str, Any], ranks: int, item: int) -> _Zero:
        zero = config.get("zero_optimization", {})
        accumulation = config.get("data_types", {}).get("grad_accum_dtype")
        return _Zero(
            stage=zero.get("stage", 0),
            ranks=ranks,
            bucket=int(zero.get("reduce_bucket_size", 5e8)),
            prefetch=int(zero.get("stage3_prefetch_bucket_size", 5e7)),
            reuse_distance=int(zero.get("stage3_max_reuse_distance", 1e9)),
            offload_optimizer=_offloads(zero, "offload_optimizer"),
            offload_weights=_offloads(zero, "offload_param"),
            accumulation_bytes=item if accumulation is None else FLOAT32 if accumulation == "fp32" else 2,
        )

    def share(self, elements: int, from_stage: int) -> float:
        """A rank's part of what is sharded from this stage on."""
        return elements / self.ranks if self.stage >= from_stage else elements

    def gathered(self, elements: int, largest: int, *, backward: bool) -> int:
        """Elements of sharded weights that are whole at a time.

        A weight that backward needs again within the reuse distance stays: at the turn from forward to backward these
        are half of that distance. On one rank nothing is gathered, unless it lies on the host.
        """
        if self.stage < 3 or (self.ranks == 1 and not self.offload_weights):
            return 0
        return min(elements, max(largest, self.reuse_distance // 2 if backward else 0) + self.prefetch)


def _offloads(zero: dict[str, Any], key: str) -> bool:
    return zero.get(key, {}).get("device", "none") != "none"


def estimate(
    run: RunConfig,
    student: ModelShape,
    teacher: ModelShape | None,
    filters: FilterShape,
    *,
    world_size: int,
    device: torch.device,
    idle: float = 0.0,
) -> Estimate:
    """What a rank of `world_size` holds of Stage II. teacher: None where no loss compares with one.

    idle: bytes that the process has before it loads anything. Raises ConfigError where the DeepSpeed files or the batch
    sizes do not fit the recipe or the ranks.
    """
    config = trained_engine_config(run, world_size=world_size, cpu=device.type == "cpu")
    item = DTYPES[run.student.dtype].itemsize
    zero = _Zero.of(config, world_size, item)
    trained = student.parameters + filters.pairs * filters.student
    kept = _activation_lines(run, student, filters, item)
    activations = sum(line.size for line in kept)
    lines = [
        Line("the process itself", idle),
        *_trained_lines(zero, trained, student.largest, item, activations, device),
        *_teacher_lines(run, teacher, filters, world_size),
        *kept,
        *_passing_lines(run, student, teacher, filters, item, device),
    ]
    # moments, float32 copies where there are any, and below ZeRO-3 the weights themselves
    checkpoint = trained * (2 * FLOAT32 + FLOAT32 * _has_copies(zero.stage, item) + (0 if zero.stage == 3 else item))
    if device.type == "cpu":  # what is offloaded stays where it was
        lines = [line._replace(place="device") for line in lines]
    return Estimate(tuple(line for line in lines if line.size), checkpoint)


def _trained_lines(
    zero: _Zero, trained: int, largest: int, item: int, activations: float, device: torch.device
) -> Iterator[Line]:
    """Weights, gradients, AdamW's state of the student and its filters, as DeepSpeed's stages keep them."""
    millions = f"{trained / 1e6:.1f} M of student and filters"
    weights: Any = "host" if zero.offload_weights else "device"
    states: Any = "host" if zero.offload_optimizer else "device"
    shard = zero.share(trained, 1)
    yield Line(f"weights, {millions}", item * zero.share(trained, 3), weights)
    if _has_copies(zero.stage, item):
        yield Line("their float32 copies", FLOAT32 * shard, states)
    yield Line("AdamW's two moments", 2 * FLOAT32 * shard, states)
    yield Line("gradients", zero.accumulation_bytes * zero.share(trained, 2), states)
    yield Line("weights gathered at a time", item * zero.gathered(trained, largest, backward=True))
    if zero.stage:
        # memory of a CPU's bucket is taken as it is filled
        yield Line("bucket of gradients", item * (min(zero.bucket, trained) if device.type == "cpu" else zero.bucket))
    if _has_copies(zero.stage, item):
        # activations are gone by then
        step = FLOAT32 * shard
        yield Line(
            "gradients in float32 for the optimizer",
            step if zero.offload_optimizer else max(0.0, step - activations),
            states,
            passing=not zero.offload_optimizer,
        )


def _has_copies(stage: int, item: int) -> bool:
    """Whether the optimizer works on float32 copies; ZeRO copies weights that are float32 already."""
    return bool(stage) or item != FLOAT32


def _teacher_lines(run: RunConfig, teacher: ModelShape | None, filters: FilterShape, world_size: int) -> Iterator[Line]:
    if teacher is None or run.teacher is None:
        return
    item = DTYPES[run.teacher.dtype].itemsize
    elements = teacher.parameters + filters.pairs * filters.teacher
    named = f"{elements / 1e6:.1f} M"
    if run.teacher.cache is not None:
        if run.loss.kl_alpha and run.loss.kl_top_k is None and run.task == "causal-lm":
            yield Line("the cached teacher's LM head", item * teacher.vocab * teacher.width)
    elif (host := HOSTS[run.teacher.sharding]).whole_copy:
        yield Line(f"the teacher's copy, {named}", item * elements)
    else:
        zero = _Zero.of(host.engine_config(run, world_size) or {}, world_size, item)
        yield Line(f"the teacher's shard, {named}", item * elements / world_size, _place(zero))
        gathered = zero.gathered(elements, teacher.largest, backward=False)
        yield Line("the teacher's weights gathered at a time", item * gathered)


def _place(zero: _Zero) -> Literal["device", "host"]:
    return "host" if zero.offload_weights else "device"


def _activation_lines(run: RunConfig, student: ModelShape, filters: FilterShape, item: int) -> list[Line]:
    """What waits for backward. With checkpointing a block keeps its input [B, S, D] alone."""
    rows, length = run.train.micro_batch_size, run.data.sequence_length
    inputs = student.saved_outside + student.blocks * length * student.width * item
    checkpointed = run.student.activation_checkpointing
    name = "activations, a block's input each" if checkpointed else "activations"
    lines = [Line(f"{name}, {rows} rows", rows * (inputs if checkpointed else student.saved))]
    residual = filters.output_dim * item
    hidden = 2 * student.width * item if run.filters.nonlinear else 0
    waiting = filters.pairs * rows * length * (residual + hidden)
    return [*lines, Line(f"residuals of {filters.pairs} pairs", waiting)]


def _passing_lines(
    run: RunConfig,
    student: ModelShape,
    teacher: ModelShape | None,
    filters: FilterShape,
    item: int,
    device: torch.device,
) -> Iterator[Line]:
    """What is there for a moment: a teacher's block, the chunks of logits, a block's backward."""
    rows, length = run.train.micro_batch_size, run.data.sequence_length
    live = False
    if teacher is not None and run.teacher is not None and run.teacher.cache is None:
        live = True
        state = length * (teacher.width + filters.output_dim) * DTYPES[run.teacher.dtype].itemsize
        yield Line("a teacher's block and its state", rows * (teacher.saved_in_block + state), passing=True)
    recomputed = 2 if run.student.activation_checkpointing else 1
    yield Line("a block's backward", recomputed * rows * student.saved_in_block, passing=True)
    if run.task == "causal-lm":
        compared = bool(run.loss.kl_alpha) and (live or run.loss.kl_top_k is None)
        yield Line(
            "chunks of logits, d_hidden and d_weight of the LM head",
            _logit_bytes(rows * length, student, 1 + compared, compared and run.loss.kl_top_k is not None, run, device),
            passing=True,
        )


def _logit_bytes(
    tokens: int, student: ModelShape, sides: int, widened: bool, run: RunConfig, device: torch.device
) -> float:
    """`linear_cross_entropy_kl`'s: a chunk [C, V] a side, d_hidden, d_weight [V, D] in float32 and in its dtype."""
    like = torch.empty(0, dtype=DTYPES[run.student.dtype], device=device)
    chunk = default_chunk_tokens(tokens, student.vocab, like, sides=sides, widened=widened)
    row = student.vocab * (sides * like.element_size() + 8 * (widened and like.is_cuda))
    wide = FLOAT32 if like.element_size() == FLOAT32 else FLOAT32 + like.element_size()
    return chunk * row + tokens * student.width * like.element_size() + student.vocab * student.width * wide


def model_shape(config: PreTrainedConfig, kind: Kind, dtype: str, length: int, **options: Any) -> ModelShape:
    """The shape of the model of `config`, its forward counted on a row of `length` tokens; no weight is made.

    options: of transformers' `from_config`. Raises whatever a model's own code raises that cannot do without values.
    """
    with FakeTensorMode():
        model: Any = AUTO_CLASSES[kind].from_config(config, dtype=DTYPES[dtype], **options).train()
        structure = find_blocks(model)
        ids = torch.zeros(1, length, dtype=torch.int64)
        with _saved_bytes(model, structure.blocks) as saved:
            if kind == "causal-lm":
                structure.backbone(input_ids=ids, use_cache=False)
            else:
                model(input_ids=ids)  # a mask would be looked at, and adds next to nothing
    blocks = [sum(p.numel() for p in block.parameters()) for block in structure.blocks]
    embeddings = model.get_input_embeddings().weight
    return ModelShape(
        parameters=sum(p.numel() for p in model.parameters()),
        largest=max(*blocks, embeddings.numel()),
        blocks=len(blocks),
        width=structure.width,
        vocab=len(embeddings),
        saved=sum(saved.values()),
        saved_outside=saved.get(-1, 0),
        saved_in_block=max(saved.get(i, 0) for i in range(len(blocks))),
    )


@contextmanager
def _saved_bytes(model: torch.nn.Module, blocks: torch.nn.ModuleList) -> Iterator[dict[int, int]]:
    """Fills with the bytes that autograd keeps, by block (-1: outside); each storage once, parameters not."""
    known = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
    alive: list[torch.Tensor] = []  # a storage that is gone could lend its number to another
    sizes: dict[int, int] = {}
    place = -1

    def enter(index: int) -> Any:
        def hook(*_: Any) -> None:
            nonlocal place
            place = index

        return hook

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            known.add(storage._cdata)
            alive.append(tensor)
            sizes[place] = sizes.get(place, 0) + storage.nbytes()
        return tensor

    handles = [
        h
        for i, b in enumerate(blocks)
        for h in (b.register_forward_pre_hook(enter(i)), b.register_forward_hook(enter(-1)))
    ]
    try:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            yield sizes
    finally:
        for handle in handles:
            handle.remove()
