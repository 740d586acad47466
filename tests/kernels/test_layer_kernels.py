"""The layer loss's kernel against plain autograd in float64: natively on a GPU, in the interpreter without one."""

from __future__ import annotations

import pytest
import torch

from ted_ds.ops import dispatch, linear_squared_error
from ted_ds.ops.layer_loss import squared_error_sum
from tests.conftest import DEVICE


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("width", [1, 7, 2048, 2051])
@pytest.mark.parametrize("masked", [False, True])
def test_it_is_the_reference(
    dtype: torch.dtype, tolerance: float, width: int, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "has_kernel", lambda x: True)
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(s).to(dtype) for s in ((3, 5, 19), (width, 19), (width,)))
    target = torch.randn(3, 5, width).to(dtype)
    mask = torch.arange(15).reshape(3, 5) % 4 != 0 if masked else None
    if mask is not None:
        target[0, 0] = float("nan")  # a masked position may hold anything
    wide = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    clean = target.double().nan_to_num()
    want = squared_error_sum(wide[0] @ wide[1].T + wide[2], clean, mask)
    want.backward(torch.tensor(0.37, dtype=torch.float64))
    own = [x.to(DEVICE).requires_grad_() for x in (hidden, weight, bias)]
    got = linear_squared_error(*own, target.to(DEVICE), None if mask is None else mask.to(DEVICE))
    got.backward(torch.tensor(0.37, device=DEVICE))
    assert got.dtype == torch.float32 and got.item() == pytest.approx(want.item(), rel=tolerance)
    for a, b in zip(own, wide, strict=True):
        assert a.grad is not None and b.grad is not None
        assert float((a.grad.double().cpu() - b.grad).norm() / b.grad.norm()) < tolerance


def test_no_tokens() -> None:
    empty = torch.zeros(0, 4, device=DEVICE)
    weight, bias = torch.zeros(3, 4, device=DEVICE, requires_grad=True), torch.zeros(3, device=DEVICE)
    assert linear_squared_error(empty, weight, bias, empty[:, :3]).item() == 0.0
