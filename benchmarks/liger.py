"""CE + KL by Liger's fused losses, the strongest competitor; `liger_kernel` is optional."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch


def why_not(name: str, device: torch.device) -> str | None:
    """Why an implementation of `LOSSES` cannot run here; None where it can."""
    if find_spec("liger_kernel") is None:
        return "liger_kernel is not installed"
    if name == "liger ce, kl" and device.type != "cuda":
        return "its fused CE is a Triton kernel for GPUs"
    return None


def one_pass(x: Any, temperature: float) -> torch.Tensor:
    """CE and KL by one chunked loss (beta 0 is the forward KL), which makes the student's logits once."""
    return _chunked(1.0, temperature, x.hidden_s.device)(x.hidden_s, x.weight_s, x.hidden_t, x.weight_t, x.targets)


def two_passes(x: Any, temperature: float) -> torch.Tensor:
    """The chunked loss for KL alone and the fused linear cross-entropy: student logits twice, each path its fastest."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    divergence = _chunked(0.0, temperature, x.hidden_s.device)
    hard: torch.Tensor = LigerFusedLinearCrossEntropyLoss()(x.weight_s, x.hidden_s, x.targets)
    return divergence(x.hidden_s, x.weight_s, x.hidden_t, x.weight_t, x.targets) + hard


LOSSES = {"liger ce+kl": one_pass, "liger ce, kl": two_passes}


def _chunked(hard: float, temperature: float, device: torch.device) -> Callable[..., torch.Tensor]:
    """Compiled, as by default, where that is a GPU's code; T^2 as in the KL of ted_ds."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss: Callable[..., torch.Tensor] = LigerFusedLinearJSDLoss(
        weight_hard_loss=hard,
        weight_soft_loss=temperature**2,
        beta=0.0,
        temperature=temperature,
        compiled=device.type == "cuda",
    )
    return loss
