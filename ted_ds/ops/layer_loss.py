"""The layer loss of one pair: a filter's output against the teacher's, as one autograd function."""

from __future__ import annotations

from typing import Any

import torch

from ted_ds.ops.dispatch import has_kernel


def linear_squared_error(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    target: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum over unmasked tokens of (hidden W^T + bias - target)^2, a scalar.

    hidden: [.., D]; weight: [F, D]; bias: [F]; target: [.., F], a constant without gradient; all of one
        floating dtype. mask: [..] bool or 0/1 of any dtype, or None where every token counts.
    Returns float32 (float64 for float64 inputs), summed in that dtype.

    One GEMM forward and two backward (as plain autograd), but a single [N, F] buffer: the residual is
    written in place and saved, next to `hidden` and `weight`, which live anyway. Plain autograd would
    keep the filter's output and the target. `weight` is read anew in backward, so ZeRO-3 may release
    and gather it in between.
    """
    loss: torch.Tensor = _LinearSquaredError.apply(hidden, weight, bias, target, mask)
    return loss


class _LinearSquaredError(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        target: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        output = torch.addmm(bias, hidden.reshape(-1, hidden.shape[-1]), weight.t())
        counted = None if mask is None else mask.reshape(-1) != 0
        residual, loss = _residual(output, target.reshape(output.shape), counted)
        ctx.save_for_backward(hidden, weight, residual)
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, residual = ctx.saved_tensors
        # The factor 2 * upstream goes to the GEMMs' results: the residual stays as it is, so that backward
        # may run again, and no second [N, F] tensor appears.
        scale = 2.0 * upstream[0]
        d_hidden = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            d_hidden = (residual @ weight).mul_(scale).reshape(hidden.shape)
        if ctx.needs_input_grad[1]:
            d_weight = (residual.t() @ hidden.reshape(-1, hidden.shape[-1])).mul_(scale)
        if ctx.needs_input_grad[2]:
            d_bias = residual.sum(0, dtype=upstream[0].dtype).mul_(scale).to(residual.dtype)
        return d_hidden, d_weight, d_bias, None, None


def _residual(
    output: torch.Tensor, target: torch.Tensor, counted: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(residual [N, F] in `output`'s place, its sum of squares)."""
    if has_kernel(output):
        from ted_ds.ops.layer_kernels import subtract_in_place  # torch on a CPU comes without triton

        return output, subtract_in_place(output, target, counted).sum()
    residual = output.sub_(target)
    if counted is not None:
        # masked_fill, not a product: a padded position may hold inf or nan, and 0 * inf is nan.
        residual.masked_fill_(~counted[:, None], 0.0)
    return residual, _sum_of_squares(residual)


def _sum_of_squares(residual: torch.Tensor) -> torch.Tensor:
    """The sum of squares of [N, F] in float32 or wider: norms by row in the wide dtype, no copy of [N, F]."""
    dtype = torch.promote_types(residual.dtype, torch.float32)
    return torch.linalg.vector_norm(residual, dim=-1, dtype=dtype).square_().sum()
