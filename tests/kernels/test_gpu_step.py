"""A micro-batch of both stages on a GPU: the CPU's losses, and no wait for the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from ted_ds.batch import Batch, BatchCounts
from tests.both_stages import BALANCED, both_stages
from tests.tiny_models import FAMILIES, READS_BACK

pytestmark = pytest.mark.requires_gpu


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
