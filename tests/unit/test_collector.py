from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ted_ds.errors import ModelError
from ted_ds.models.loading import checkpoint_activations
from ted_ds.models.structure import find_structure
from ted_ds.teacher.collector import HiddenStateCollector
from tests.tiny_models import tiny_model


def two_models(teacher_blocks: int, student_blocks: int = 2):
    teacher, student = (find_structure(tiny_model("llama", blocks=n)) for n in (teacher_blocks, student_blocks))
    return teacher, student, torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(0))


def test_pairs_see_the_states_that_the_models_report() -> None:
    teacher, student, ids = two_models(4)
    collector = HiddenStateCollector(student.blocks, teacher.blocks, ((0, 1), (1, 2)))
    seen = {}
    with collector.student_pass():
        student.model(ids)
    with torch.no_grad(), collector.teacher_pass(lambda k, s, t: seen.setdefault(k, (s, t))[0].sum()) as reduced:
        teacher.model(ids)
    states_s = student.model(ids, output_hidden_states=True).hidden_states
    states_t = teacher.model(ids, output_hidden_states=True).hidden_states
    assert torch.equal(seen[0][0], states_s[1]) and torch.equal(seen[0][1], states_t[2])
    assert torch.equal(seen[1][1], states_t[3])  # student block 1 is the last: the model reports it after its norm
    assert sorted(reduced) == [0, 1] and all(value.requires_grad for value in reduced.values())


@pytest.mark.parametrize("pairs", [2, 8])
def test_one_teacher_state_is_alive_however_many_pairs(pairs: int) -> None:
    teacher, student, ids = two_models(8, 8)
    states: list[weakref.ref] = []
    alive: list[int] = []
    for block in teacher.blocks:

        def watch(module, inputs, output) -> None:
            state = output[0] if isinstance(output, tuple) else output
            states.append(weakref.ref(state))
            alive.append(sum(ref() is not None for ref in states))

        block.register_forward_hook(watch)
    layer_map = tuple((8 // pairs * (k + 1) - 1,) * 2 for k in range(pairs))
    collector = HiddenStateCollector(student.blocks, teacher.blocks, layer_map)
    with collector.student_pass():
        student.model(ids)
    with torch.no_grad(), collector.teacher_pass(lambda k, s, t: (s - t).square().sum()):
        teacher.backbone(ids, use_cache=False)
        # a block's own input lives while it runs; its output is counted as it appears: never more than these
        assert max(alive) <= 2
    assert sum(ref() is not None for ref in states) == 0


def test_recomputation_does_not_record_again() -> None:
    teacher, student, ids = two_models(2)
    student.model.train()
    checkpoint_activations(student.model)
    collector = HiddenStateCollector(student.blocks, teacher.blocks, ((1, 1),))
    with collector.student_pass():
        student.model(ids)
    with torch.no_grad(), collector.teacher_pass(lambda k, s, t: (s - t).square().sum()) as reduced:
        teacher.model(ids)
    reduced[0].backward()
    assert collector._waiting == {}
    assert all(p.grad is not None for p in student.blocks.parameters())


def test_reentrant_checkpointing_is_refused() -> None:
    """A wrapper that checkpoints the block's call runs it, hooks included, under no_grad."""
    blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
    collector = HiddenStateCollector(blocks, blocks, ((0, 0),))
    with pytest.raises(ModelError, match="reentrant activation checkpointing"), collector.student_pass():
        checkpoint(blocks[0], torch.ones(2, 3, requires_grad=True), use_reentrant=True)


def test_a_block_that_did_not_run_is_named() -> None:
    teacher, student, _ids = two_models(2)
    collector = HiddenStateCollector(student.blocks, teacher.blocks, ((0, 0), (1, 1)))
    message = r"student blocks \[0, 1\] of the layer map did not run"
    with pytest.raises(ModelError, match=message), collector.student_pass():
        pass


def test_hooks_are_there_during_a_pass_alone() -> None:
    teacher, student, ids = two_models(2)
    before = [len(block._forward_hooks) for block in (*student.blocks, *teacher.blocks)]
    collector = HiddenStateCollector(student.blocks, teacher.blocks, ((0, 0),))
    with collector.student_pass():
        student.model(ids)
        assert [len(block._forward_hooks) for block in student.blocks] == [before[0] + 1, before[1]]
    with collector.teacher_pass(lambda k, s, t: s.sum()):
        teacher.model(ids)
    assert [len(block._forward_hooks) for block in (*student.blocks, *teacher.blocks)] == before
