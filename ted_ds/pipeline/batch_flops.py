"""What a micro-batch of each stage costs in model FLOPs: models by counting, losses and filters by formula."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from transformers import PreTrainedModel

from ted_ds.batch import Batch
from ted_ds.config.schema import RunConfig
from ted_ds.config.tasks import KINDS
from ted_ds.data.tokenizers import Tokenizer
from ted_ds.job.world import logger
from ted_ds.models.filters import FilterPlan
from ted_ds.models.fit import fit_to_run
from ted_ds.models.layer_map import LayerMap
from ted_ds.models.loading import DTYPES, meta_model
from ted_ds.pipeline.stage0 import ModelPaths
from ted_ds.tasks.base import DisposableHead, Task
from ted_ds.teacher.frozen import FrozenModule
from ted_ds.telemetry.flops import BatchFlops, count_flops, count_lengths, gemm_flops, polynomial

Count = Callable[[int], float]


def stage2_flops(
    run: RunConfig,
    models: ModelPaths,
    task: Task,
    tokenizer: Tokenizer,
    layer_map: LayerMap = (),
    filters: FilterPlan | None = None,
    teacher_filters: FilterPlan | None = None,
) -> BatchFlops | None:
    """Of a micro-batch of distillation; None if a model cannot be counted, which the log says.

    The student costs three forwards, the teacher one (up to its last pair without a KL). Out of a cache it costs none,
    its filters neither, and its LM head only if logits are made anew (no `loss.kl_top_k`). layer_map, filters,
    teacher_filters: of the layer loss, empty or None without one.
    """
    rows, kl = run.train.micro_batch_size, bool(run.loss.kl_alpha)
    live = run.teacher is not None and run.teacher.cache is None and (kl or bool(layer_map))
    logits = kl and (live or run.loss.kl_top_k is None)

    def build() -> Count:
        student = _without_weights(run, "student", models.student, tokenizer)
        widths, forwards = [student.config.hidden_size], [_forward(run, student, task)]
        if kl or layer_map:
            assert models.teacher is not None
            teacher = _without_weights(run, "teacher", models.teacher, tokenizer)
            widths += [teacher.config.hidden_size] if logits else []
            forwards += [_forward(run, teacher, task, None if kl else layer_map[-1][1])] if live else []

        def count(length: int, layers: bool = True) -> float:
            tokens, pairs = rows * length, len(layer_map) if layers else 0
            total = 3 * forwards[0](length) + pairs * _filter(filters, tokens, 3, 3)
            if live and (kl or layers):
                total += forwards[1](length) + pairs * _filter(teacher_filters, tokens)
            return total + task.logit_flops(tokens, *widths)

        return count

    return _counted(run, build)


def stage1_flops(
    run: RunConfig,
    side: str,
    path: str,
    task: Task,
    tokenizer: Tokenizer,
    plan: FilterPlan,
    head: DisposableHead,
) -> BatchFlops | None:
    """Of a micro-batch of Stage I: a forward of the frozen model `path` up to its last filter, and what learns.

    Each filter's first layer has no gradient of its input.
    """
    rows = run.train.micro_batch_size

    def build() -> Count:
        frozen = _forward(run, _without_weights(run, side, path, tokenizer), task, plan.blocks[-1])

        def count(length: int) -> float:
            tokens = _tokens_seen(head, plan, rows, length)
            each = _filter(plan, tokens, 2, 3) + head.flops(tokens, plan)
            return frozen(length) + len(plan.blocks) * each

        return count

    return _counted(run, build)


def _counted(run: RunConfig, build: Callable[[], Count]) -> BatchFlops | None:
    try:
        count = build()
    except Exception as error:  # whatever a model's own code raises that cannot do without values
        logger.warning("model FLOPs are not counted, mfu is null: %s", str(error).partition("\n")[0])
        return None
    dtypes = {run.student.dtype, *([run.teacher.dtype] if run.teacher is not None else [])}
    return BatchFlops(cache(count), DTYPES[run.student.dtype] if len(dtypes) == 1 else None)


def _without_weights(run: RunConfig, side: str, path: str, tokenizer: Tokenizer) -> PreTrainedModel:
    section = run.teacher if side == "teacher" else run.student
    assert section is not None
    model = meta_model(path, run.spec.kind, trust_remote_code=section.trust_remote_code)
    fit_to_run(model, run, tokenizer)
    return model


def _forward(run: RunConfig, model: PreTrainedModel, task: Task, until: int | None = None) -> Count:
    """One forward as `task` reads the model (of a causal LM, its backbone), or up to the block `until`."""
    module = FrozenModule(model, task)
    last = None if until is None else module.structure.blocks[until]
    rows, longest = run.train.micro_batch_size, run.data.sequence_length
    lengths = count_lengths(longest) if KINDS[run.spec.kind].padded else [longest]

    def counted(length: int) -> int:
        return count_flops(model, lambda: module(batch=_blank(rows, length), until=last))

    return polynomial({length: counted(length) for length in lengths})


def _filter(plan: FilterPlan | None, tokens: int, first: int = 1, last: int = 1) -> int:
    """One filter. first, last: GEMMs (forward, gradients) of its first layer, and of a nonlinear one's second."""
    if plan is None:
        return 0
    if not plan.nonlinear:
        return first * gemm_flops(tokens, plan.width, plan.output_dim)
    return first * gemm_flops(tokens, plan.width, plan.width) + last * gemm_flops(tokens, plan.width, plan.output_dim)


def _tokens_seen(head: DisposableHead, plan: FilterPlan, rows: int, length: int) -> int:
    """Positions of a micro-batch that a filter is run on."""
    hidden = torch.empty(rows, length, plan.width, device="meta")
    return head.inputs(hidden, _blank(rows, length), 0, 0)[0][..., 0].numel()


def _blank(rows: int, length: int) -> Batch:
    ids = torch.empty(rows, length, dtype=torch.int64, device="meta")
    return Batch(ids, ids)
