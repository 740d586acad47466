"""ZeRO-3 takes blocks whole: gradients are plain torch's, over micro-batches, with activation checkpointing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_grad, z3_leaf_module
from torch import nn
from transformers import PreTrainedModel

from ted_ds.batch import IGNORED, Batch, BatchCounts
from ted_ds.distill.distillation_model import DistillationModel
from ted_ds.distill.engine import build_trained_engine
from ted_ds.job.world import World
from ted_ds.models.leaf_blocks import handle_whole_blocks
from ted_ds.models.loading import checkpoint_activations
from ted_ds.models.structure import find_blocks
from ted_ds.tasks.causal_lm import CausalLM
from ted_ds.tasks.classification import Classification
from tests.marks import slow
from tests.project import loss_config
from tests.tiny_encoders import ENCODERS, tiny_encoder
from tests.tiny_models import FAMILIES, tiny_model
from tests.workers import Workers

Group = Callable[[int], Workers]
CE = loss_config(kl_alpha=0.0, mse_alpha=0.0)
VOCAB = 61
ZERO3: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 3,
    "gradient_accumulation_steps": 2,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "optimizer": {"type": "AdamW", "params": {"lr": 0.0, "torch_adam": True}},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "steps_per_print": 10**9,
}


def a_student(family: str) -> tuple[DistillationModel, list[Batch]]:
    """A model of the family with the loss of its task, and two micro-batches."""
    draw = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, VOCAB, (3, 9), generator=draw) for _ in range(2)]
    if family in FAMILIES:
        model = tiny_model(family, vocab=VOCAB)
        shifted = [torch.cat([x[:, 1:], torch.full((3, 1), IGNORED)], 1) for x in ids]
        return DistillationModel(model, nn.ModuleList(), CE, task=CausalLM(VOCAB)), list(map(Batch, ids, shifted))
    model, labels = tiny_encoder(family, vocab=VOCAB), torch.tensor([0, 2, 1])
    names: Any = model.config.id2label
    task = Classification([names[i] for i in range(3)])
    return DistillationModel(model, nn.ModuleList(), CE, task=task), [Batch(x, labels, torch.ones_like(x)) for x in ids]


def furthest_gradient(world: World, family: str, checkpoint: bool) -> tuple[float, bool]:
    """(The worst error of a gradient against plain torch's, over the largest gradient; whether blocks are leaves.)"""
    module, batches = a_student(family)
    counts = BatchCounts.of(batches[0])
    plain = copy.deepcopy(module).train()
    for batch in batches:
        plain(batch=batch, counts=counts)[0].backward()
    wanted = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in plain.named_parameters()}
    if checkpoint:
        checkpoint_activations(module.student)
    handle_whole_blocks(module.structure, trained=True)  # as on a GPU
    engine: Any = build_trained_engine(module, deepspeed_config=ZERO3, schedule=lambda step: 1.0)
    engine.train()
    for i, batch in enumerate(batches):
        loss, _ = engine(batch=batch, counts=counts)
        engine.backward(loss, scale_wrt_gas=False)
        if i == 0:
            engine.step()
    got = {name: safe_get_full_grad(p) for name, p in engine.module.named_parameters()}
    engine.destroy()
    largest = max(float(gradient.norm()) for gradient in wanted.values())
    worst = max(float((got[name] - gradient).norm()) for name, gradient in wanted.items()) / largest
    return worst, all(map(z3_leaf_module, module.structure.blocks))


@pytest.mark.parametrize(
    ("family", "checkpoint"),
    # without checkpointing, the losses of both stages are held for each family of decoders in test_invariance.py
    [
        *((family, True) if family in ("gpt2", "llama") else slow(family, True) for family in FAMILIES),
        *((family, False) for family in ENCODERS),
        *(slow(family, True) for family in ENCODERS),
    ],
)
def test_gradients_are_plain_torchs(workers: Group, family: str, checkpoint: bool) -> None:
    for worst, leaves in workers(2).run(furthest_gradient, family, checkpoint):
        assert worst < 1e-5
        assert leaves


def shared_weight() -> PreTrainedModel:
    model: Any = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    return model


def weight_of_another() -> PreTrainedModel:
    model: Any = tiny_model("llama")
    model.model.norm.weight = model.model.layers[0].input_layernorm.weight
    return model


def block_that_runs_twice() -> PreTrainedModel:
    model = tiny_model("llama")
    model.config.num_hidden_layers = 4
    return model


def foreign_blocks() -> PreTrainedModel:
    model: Any = tiny_model("llama")
    model.model.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
    return model


@pytest.mark.parametrize("make", [shared_weight, weight_of_another, block_that_runs_twice, foreign_blocks])
def test_blocks_that_would_lose_gradients_keep_their_hooks(make: Callable[[], PreTrainedModel]) -> None:
    structure = find_blocks(make())
    handle_whole_blocks(structure, trained=True)
    assert not any(map(z3_leaf_module, structure.blocks))
    handle_whole_blocks(structure, trained=False)
    assert all(map(z3_leaf_module, structure.blocks))
