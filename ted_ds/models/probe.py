"""Whether a model behaves as ted_ds assumes, measured on its family's tiny model before anything is loaded.

Distillation does not call a causal LM's own forward: it runs the backbone, takes hidden states out of the blocks, and
puts the LM head behind them itself. What `structure` found and `families` knows is compared here with what the model
computes by itself.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from ted_ds.batch import Batch
from ted_ds.config.student_section import InitConfig
from ted_ds.config.tasks import KINDS, Kind
from ted_ds.errors import ModelError
from ted_ds.job.world import logger
from ted_ds.models.cut_plan import plan_cut
from ted_ds.models.loading import load_model, meta_model, resident_readout
from ted_ds.models.pruning import init_student
from ted_ds.models.readout import LogitHead
from ted_ds.models.structure import block_input, block_output, find_blocks, find_structure
from ted_ds.models.tiny import tiny_ids, tiny_model
from ted_ds.models.weight_files import copy_companions
from ted_ds.ops import Head
from ted_ds.ops.reference import soft_capped

TOLERANCE = 1e-4
"""Largest difference, as a share of the largest value, of two orders of float32 arithmetic."""


def probe(role: str, path: str, model: PreTrainedModel, kind: Kind, *, layers: bool = False) -> None:
    """Compares the parts that ted_ds puts together with the whole of a tiny model of `model`'s class and config.

    model: with or without weights, on any device. layers: whether hidden states are taken out of blocks, and read by
    the final norm and the LM head. It takes some tenths of a second.
    Raises ModelError that names the family and the part that behaves differently from what ted_ds assumes. A family of
    which no tiny model can be made is let through, with a warning.
    """
    try:
        tiny = tiny_model(model)
    except ModelError as error:
        logger.warning("the %s %s could not be measured: %s", role, path, error)
        return
    with torch.no_grad(), _seen_blocks(tiny) as (order, states):
        logits = _logits(tiny)
    lm = KINDS[kind].lm_head
    fault = _head_fault(tiny, logits) if lm else None
    if layers and fault is None:
        fault = _block_fault(tiny, order, states)
        if lm and fault is None:
            fault = _readout_fault(tiny, states[-1][1], logits)
    if fault is not None:
        raise ModelError(
            f"the {role} {path} is a {model.config.model_type}, which ted_ds does not support: in a tiny model of its "
            f"config, {fault}"
        )


def probe_cut(teacher: str, init: InitConfig, kind: Kind, *, trust_remote_code: bool = False) -> None:
    """Runs a tiny model of the student that is asked for, and compares a tiny teacher's cut with its skipped block.

    If the recipe keeps the teacher's first blocks, the last one is lost, and else one in the middle, so that those
    after it get other numbers. Raises ModelError if they differ: something depends on a block's number, or on how many
    there are.
    """
    plan = plan_cut(teacher, init, kind, trust_remote_code)
    try:
        tiny = tiny_model(meta_model(teacher, kind, trust_remote_code=trust_remote_code))
    except ModelError as error:
        logger.warning("the cut of the teacher %s could not be measured: %s", teacher, error)
        return
    tiny_model(plan.student)  # which says whether such a student runs
    if len(plan.blocks) == plan.total:
        return
    first_blocks = plan.blocks == tuple(range(len(plan.blocks)))
    total = find_blocks(tiny).num_blocks
    kept = tuple(range(total - 1)) if first_blocks else (0, *range(2, total))
    with tempfile.TemporaryDirectory() as folder:
        whole, cut = Path(folder) / "teacher", Path(folder) / "student"
        tiny.save_pretrained(whole)
        try:
            copy_companions(teacher, whole)
            init_student(str(whole), InitConfig(blocks=kept), cut, kind=kind, trust_remote_code=trust_remote_code)
            student = load_model(str(cut), kind, dtype="float32", trust_remote_code=trust_remote_code).eval()
        except ModelError as error:
            raise ModelError(str(error).replace(str(whole), teacher)) from error
    with torch.no_grad(), skipped_blocks(tiny, set(range(total)) - set(kept)):
        expected = _logits(tiny)
    with torch.no_grad():
        if not _differ(_logits(student), expected):
            return
    raise ModelError(
        f"these blocks cannot be cut out of teacher {teacher}: in a {tiny.config.model_type} what a block computes "
        f"depends on its number or on how many there are; {'cut' if first_blocks else 'use blocks: first, cut'} "
        "the width alone, or give student.init.config"
    )


@contextmanager
def skipped_blocks(model: PreTrainedModel, numbers: set[int]) -> Iterator[None]:
    """Within it, these blocks of a model give what they are given."""

    def skip(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
        hidden = block_input(inputs, named)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    blocks = find_blocks(model).blocks
    handles = [blocks[number].register_forward_hook(skip, with_kwargs=True) for number in numbers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _seen_blocks(model: PreTrainedModel) -> Iterator[tuple[list[int], list[tuple[torch.Tensor, torch.Tensor]]]]:
    """(numbers of blocks, (input, output) of each), in the order in which they run within it."""
    order: list[int] = []
    states: list[tuple[torch.Tensor, torch.Tensor]] = []

    def note(number: int) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            order.append(number)
            states.append((block_input(inputs, named).clone(), block_output(output).clone()))

        return hook

    handles = [b.register_forward_hook(note(i), with_kwargs=True) for i, b in enumerate(find_blocks(model).blocks)]
    try:
        yield order, states
    finally:
        for handle in handles:
            handle.remove()


def _logits(model: PreTrainedModel) -> torch.Tensor:
    output = model(input_ids=tiny_ids(model.config))
    logits: torch.Tensor = output.logits if "logits" in output else output[0]
    return logits


def _head_fault(model: PreTrainedModel, logits: torch.Tensor) -> str | None:
    """Logits: the backbone's last hidden state through the LM head, scaled and capped."""
    readout = LogitHead(find_structure(model))
    ids = tiny_ids(model.config)
    with torch.no_grad():
        own = readout(readout.read(Batch(ids, ids)), use=_through)
    if not _differ(own, logits):
        return None
    if own.shape != logits.shape:
        return f"its logits are {list(logits.shape)}, its LM head makes {list(own.shape)} of its last hidden state"
    ratio = (logits / own).flatten()
    same = (ratio / ratio.median() - 1).abs().median() < TOLERANCE
    factor = f" (they are {ratio.median():.4g} times as large)" if same else ""
    return f"its logits are not what its LM head makes of its last hidden state{factor}"


def _block_fault(
    model: PreTrainedModel, order: list[int], states: list[tuple[torch.Tensor, torch.Tensor]]
) -> str | None:
    """Blocks run once each, in order, and each one's input is what the one before gave."""
    structure = find_blocks(model)
    if order != list(range(structure.num_blocks)):
        return f"its blocks run in the order {order}, not one after another"
    sources = structure.hidden_state_sources()
    for number, ((_, output), (following, _)) in enumerate(pairwise(states)):
        if sources[number] is structure.blocks[number] and _differ(output, following):
            return f"block {number + 1} does not read what block {number} gives"
    width = states[-1][1].shape[-1]
    return None if width == structure.width else f"hidden states have {width} channels, not {structure.width}"


def _readout_fault(model: PreTrainedModel, last: torch.Tensor, logits: torch.Tensor) -> str | None:
    """Stage I: the last block's output through copies of the final norm and the LM head gives the logits."""
    norm, head = resident_readout(model, torch.device("cpu"))
    with torch.no_grad():
        own = _through(norm(last), head)
    if _differ(own, logits):
        return "its logits are not what its final norm and LM head make of its last block's output"
    return None


def _through(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    return soft_capped(head.scale * functional.linear(hidden, head.weight, head.bias), head.softcap)


def _differ(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = a.float(), b.float()
    return a.shape != b.shape or not bool((a - b).abs().max() <= TOLERANCE * b.abs().max())
