"""Gradients computed in the forward are the gradients of a plain backward."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from ted_ds.ops import eager_gradients


def parameters() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    shapes = ((7, 5), (5,), (3,))
    a, b, unused = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    return a, b, unused


def loss_of(a: torch.Tensor, b: torch.Tensor, unused: torch.Tensor | None = None) -> torch.Tensor:
    return torch.tanh(a * b).square().sum()


def test_loss_and_gradients_over_two_backwards() -> None:
    a, b, unused = parameters()
    upstream = torch.tensor(0.37, dtype=torch.float64)
    want = torch.autograd.grad(loss_of(a, b), (a, b), upstream)
    loss = eager_gradients(loss_of, a, b, unused)
    assert torch.equal(loss, loss_of(a, b))
    for times in (1, 2):
        loss.backward(upstream, retain_graph=True)
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad, times * want[0])
        torch.testing.assert_close(b.grad, times * want[1])
    assert unused.grad is None


def test_several_losses_share_one_backward() -> None:
    a, b, _ = parameters()
    total = eager_gradients(loss_of, a, b) + 3 * eager_gradients(lambda a: a.sum(), a)
    total.backward()
    found = a.grad
    a.grad = None
    (loss_of(a, b) + 3 * a.sum()).backward()
    torch.testing.assert_close(found, a.grad)


def test_parameters_are_not_copied_and_frozen_ones_stay_so() -> None:
    a, b, _ = parameters()
    b.requires_grad_(False)
    seen: list[tuple[int, bool]] = []

    def compute(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen.extend((t.data_ptr(), t.requires_grad) for t in (x, y))
        return loss_of(x, y)

    eager_gradients(compute, a, b).backward()
    assert seen == [(a.data_ptr(), True), (b.data_ptr(), False)]
    assert a.grad is not None and b.grad is None


def test_nothing_but_gradients_is_kept() -> None:
    a, b, _ = parameters()
    made: list[weakref.ref[torch.Tensor]] = []

    def compute(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        product = torch.tanh(x * y)
        made.append(weakref.ref(product))
        return product.square().sum()

    loss = eager_gradients(compute, a, b)
    gc.collect()
    assert loss.requires_grad and made[0]() is None


@pytest.mark.parametrize("mode", ["no_grad", "all frozen"])
def test_without_need_nothing_is_recorded(mode: str) -> None:
    a, b, _ = parameters()
    recorded: list[bool] = []

    def compute(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        recorded.append(torch.is_grad_enabled())
        return loss_of(x, y)

    if mode == "all frozen":
        a.requires_grad_(False)
        b.requires_grad_(False)
    with torch.set_grad_enabled(mode != "no_grad"):
        loss = eager_gradients(compute, a, b)
    assert recorded == [False] and not loss.requires_grad
