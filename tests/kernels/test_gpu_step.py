"""A micro-batch of both stages on a GPU: the CPU's losses, and no wait for the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from ted_ds.batch import IGNORED, Batch, BatchCounts
from ted_ds.distill.balance import Balance
from ted_ds.distill.distillation_model import DistillationModel
from ted_ds.distill.filter_learner import FilterLearner
from ted_ds.models.filters import FilterPlan
from ted_ds.models.loading import checkpoint_activations, resident_readout
from ted_ds.tasks.causal_lm import CausalLM, LMHead
from ted_ds.teacher.frozen import FrozenModel, FrozenModule
from tests.project import loss_config
from tests.tiny_models import FAMILIES, READS_BACK, tiny_model

pytestmark = pytest.mark.requires_gpu

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
        balance.load([0.1, 1.0, *[1.0] * 6])
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


def micro_batch(module: nn.Module, batch: Batch, counts: BatchCounts, device: str, **inputs: int) -> torch.Tensor:
    loss, terms = module(batch=batch.to(torch.device(device)), counts=counts, **inputs)
    loss.backward()
    return terms


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *((family, {}) for family in FAMILIES),
        *(("llama", {"divergence": kind}) for kind in ("reverse", "jensen-shannon")),
        ("llama", {"kl_top_k": 5}),
        *(("llama", options) for options in BALANCED),
    ],
)
def test_no_micro_batch_waits_for_the_device(family: str, options: dict[str, Any]) -> None:
    if family in READS_BACK:
        pytest.skip("transformers itself reads back")
    model, learner, batch = both_stages(family, "cuda", torch.bfloat16, **options)
    counts = BatchCounts(BatchCounts.of(batch).values.cuda())
    for module, inputs in ((model, {}), (learner, {"step": 0})):
        micro_batch(module, batch, counts, "cuda", **inputs)  # kernels are compiled, pinned memory is made
        with waiting_is_an_error():
            micro_batch(module, batch, counts, "cuda", **inputs)


@pytest.mark.parametrize(
    ("family", "options"), [*((family, {}) for family in FAMILIES), *(("llama", options) for options in BALANCED)]
)
def test_losses_and_gradients_are_the_cpus(family: str, options: dict[str, Any]) -> None:
    found = {}
    for device in ("cpu", "cuda"):
        model, learner, batch = both_stages(family, device, torch.float32, **options)
        counts = BatchCounts(BatchCounts.of(batch).values.to(device))
        for name, module, inputs in (("Stage II", model, {}), ("Stage I", learner, {"step": 0})):
            terms = micro_batch(module, batch, counts, device, **inputs).cpu()
            gradients = [p.grad.flatten().cpu() for p in module.parameters() if p.grad is not None]
            found[device, name] = (terms, torch.cat(gradients))
    for name in ("Stage I", "Stage II"):
        for ours, wanted in zip(found["cuda", name], found["cpu", name], strict=True):
            assert float((ours - wanted).norm() / wanted.norm()) < 1e-4, name


def test_a_wait_would_be_noticed() -> None:
    with pytest.raises(RuntimeError, match="synchroniz"), waiting_is_an_error():
        torch.ones(1, device="cuda").item()
