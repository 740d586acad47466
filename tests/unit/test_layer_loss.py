"""The pair's loss as one autograd function, against plain autograd in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ted_ds.ops import linear_cosine_error, linear_squared_error, rms_normalized
from ted_ds.ops.layer_loss import KINDS as LAYER_LOSSES

B, S, D, F = 3, 13, 19, 7


def tensors(dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {"hidden": (B, S, D), "weight": (F, D), "bias": (F,)}
    made = {name: torch.randn(shape).to(dtype).requires_grad_() for name, shape in shapes.items()}
    return made | {"target": torch.randn(B, S, F).to(dtype)}


def reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    target: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    return LAYER_LOSSES["mse"].reference(hidden @ weight.T + bias, target, mask)


KINDS = {
    "squared": (linear_squared_error, LAYER_LOSSES["mse"].reference, False),
    "squared, normalized": (linear_squared_error, LAYER_LOSSES["mse"].reference, True),
    "cosine": (linear_cosine_error, LAYER_LOSSES["cosine"].reference, False),
    "cosine, normalized": (linear_cosine_error, LAYER_LOSSES["cosine"].reference, True),
}
"""(fused, its reference, whether what it reads is normalised first)."""


def masks() -> list[torch.Tensor | None]:
    mask = torch.arange(B * S).reshape(B, S) % 4 != 0
    return [None, mask, mask.long(), mask.float()]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", masks())
def test_loss_and_gradients(mask: torch.Tensor | None, kind: str) -> None:
    fused, plain, normalize = KINDS[kind]
    t = tensors()
    t["hidden"].data[0] *= 1000  # sinks
    leaves = [t["hidden"], t["weight"], t["bias"]]
    read = t["hidden"]
    if normalize:
        read = read / (read.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        assert torch.allclose(read, rms_normalized(t["hidden"]))
    want = plain(read @ t["weight"].T + t["bias"], t["target"], mask)
    got = fused(**t, mask=mask, normalize=normalize)
    assert distance(got, want) < 1e-13
    upstream = torch.tensor(0.37, dtype=torch.float64)
    wanted = torch.autograd.grad(want, leaves, upstream)
    for _ in range(2):  # a graph that is retained gives the same again
        found = torch.autograd.grad(got, leaves, upstream, retain_graph=True)
        assert all(distance(a, b) < 1e-12 for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_frozen_parts_get_no_gradient(frozen: str) -> None:
    t = tensors()
    t[frozen].requires_grad_(False)
    linear_squared_error(**t).backward()
    found = {name: t[name].grad for name in t}
    for name in ("hidden", "weight", "bias"):
        t[name].grad = None
    reference(**t).backward()
    for name, gradient in found.items():
        want = t[name].grad
        assert (gradient is None) == (want is None)
        if gradient is not None and want is not None:
            assert distance(gradient, want) < 1e-13


@pytest.mark.parametrize("kind", KINDS)
def test_masked_positions_may_hold_anything(kind: str) -> None:
    fused, _, normalize = KINDS[kind]
    t = tensors()
    mask = torch.ones(B, S)
    mask[1, 4:] = 0
    t["target"][1, 4:] = float("nan")
    loss = fused(**t, mask=mask, normalize=normalize)
    loss.backward()
    assert loss.isfinite() and t["hidden"].grad is not None
    assert t["hidden"].grad.isfinite().all() and not t["hidden"].grad[1, 4:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_it_saves_the_residual_alone(kind: str) -> None:
    """Beside hidden and weight, which live anyway, one [N, F] tensor waits for backward, and a number a token."""
    fused, _, normalize = KINDS[kind]
    t = tensors()
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        fused(**t, normalize=normalize)
    live = {t["hidden"].data_ptr(), t["weight"].data_ptr()}
    sizes = [x.numel() for x in saved if x.data_ptr() not in live]
    assert sizes == ([B * S * F, B * S] if normalize else [B * S * F])


def test_weight_is_read_again_in_backward() -> None:
    """ZeRO-3 swaps a parameter's storage between forward and backward."""
    t = tensors()
    loss = linear_squared_error(**t)
    whole = t["weight"].data
    t["weight"].data = torch.zeros_like(whole)
    t["weight"].data = whole.clone()
    whole.fill_(float("nan"))
    loss.backward()
    assert t["hidden"].grad is not None and t["hidden"].grad.isfinite().all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_sums_are_float32_or_wider(dtype: torch.dtype, tolerance: float) -> None:
    t = tensors(dtype)
    wide: dict[str, Any] = {name: x.detach().double().requires_grad_(x.requires_grad) for name, x in t.items()}
    got, want = linear_squared_error(**t), reference(**wide)
    assert got.dtype == torch.float32
    got.backward()
    want.backward()
    assert distance(got, want) < tolerance
    for name in ("hidden", "weight", "bias"):
        gradient = t[name].grad
        assert gradient is not None and gradient.dtype == dtype
        assert distance(gradient, wide[name].grad) < tolerance
