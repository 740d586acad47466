"""Both stages of a tiny pair of causal LMs, without an engine, on any device."""

from __future__ import annotations

from typing import Any

import torch

from ted_ds.batch import IGNORED, Batch
from ted_ds.distill.balance import Balance
from ted_ds.distill.distillation_model import DistillationModel
from ted_ds.distill.filter_learner import FilterLearner
from ted_ds.models.filters import FilterPlan
from ted_ds.models.loading import checkpoint_activations, resident_readout
from ted_ds.tasks.causal_lm import CausalLM, LMHead
from ted_ds.teacher.frozen import FrozenModel, FrozenModule
from tests.project import loss_config
from tests.tiny_models import tiny_model

VOCAB, PAIRS = 5003, ((0, 1), (1, 3))
BALANCED = [{"layer_loss": kind, "balance": "gradient"} for kind in ("rms_mse", "cosine")]


def both_stages(
    family: str, device: str, dtype: torch.dtype, **options: Any
) -> tuple[DistillationModel, FilterLearner, Batch]:
    sizes = {"vocab": VOCAB, "heads": 2}
    teacher = tiny_model(family, blocks=4, width=48, seed=1, **sizes).to(device, dtype)
    student = tiny_model(family, blocks=2, width=32, seed=2, **sizes).to(device, dtype)
    torch.manual_seed(3)
    loss = loss_config(kl_alpha=0.7, mse_alpha=3.0, **options)
    plans = [FilterPlan((0, 1), width, 24, normalized=loss.balance == "gradient") for width in (48, 32)]
    banks = [plan.build().to(device, dtype) for plan in plans]
    frozen = FrozenModel(FrozenModule(teacher, CausalLM(VOCAB), banks[0]))
    checkpoint_activations(student)
    model = DistillationModel(student.train(), banks[1], loss, task=CausalLM(VOCAB))
    balance = Balance.of(loss, 2, torch.device(device))
    if balance is not None:  # as if a step had been
        balance.load([1.0, 1.0, 0.5, 0.5, 1.0, 1.0])
        balance.begin(0.9)
    model.attach_teacher(frozen, PAIRS, balance=balance)
    norm, head = resident_readout(teacher, torch.device(device))
    learner = FilterLearner(
        FilterPlan((1, 3), 48, 24).build().to(device, dtype), frozen, (1, 3), LMHead(norm, head, vocab_size=VOCAB)
    ).to(device, dtype)
    ids = torch.randint(0, VOCAB, (3, 17), generator=torch.Generator().manual_seed(7))
    targets = torch.full_like(ids, IGNORED)
    targets[:, :-1] = ids[:, 1:]
    return model, learner, Batch(ids, targets)
