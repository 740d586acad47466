"""The layer loss: how a pair of hidden states is compared, and how the sums of K pairs become one term.

A new kind needs its name in `ted_ds.config.choices` and an entry in `KINDS` here, with its plain torch reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ted_ds.batch import BatchCounts
from ted_ds.config.choices import LayerLossKind
from ted_ds.ops import dispatch

PairError = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None],
    torch.Tensor,
]
"""(features [.., D], weight [F, D], bias [F], target [.., F], mask [..] or None) -> scalar, a sum over tokens.

The last linear layer of the student's filter is part of it, so that its output never waits for backward."""


@dataclass(frozen=True)
class Kind:
    """One way to compare. reference: (filtered student, filtered teacher, mask) -> the same scalar in plain torch.

    normalized: the sum is divided by the mean square of the teacher's filtered states.
    """

    error: PairError
    reference: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
    normalized: bool


class LayerLoss:
    """layer_loss = mean over k of error_k / (tokens * F) * scale_k.

    mask_padding: whether padding positions are left out.
    """

    def __init__(self, kind: LayerLossKind, *, mask_padding: bool) -> None:
        self.kind, self.mask_padding = KINDS[kind], mask_padding
        self._scale: torch.Tensor | float = 1.0

    def normalise(self, mean_squares: torch.Tensor) -> None:
        """mean_squares: [K] of the teacher's filtered states.

        They are constants, because teacher and filters are: a micro-batch's own mean square would make the loss depend
        on how rows are split, and the global batch's is known only once the teacher has gone past.
        """
        self._scale = mean_squares.clamp_min(1e-12).reciprocal()

    def against(
        self, target: torch.Tensor, mask: torch.Tensor | None
    ) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
        """The error of a pair, of (features, weight, bias) of the student's filter; see `PairError`.

        target: [.., F], the teacher's filtered states, in any floating dtype; mask: [..], 0 at padding, or None.
        """
        counted = mask if self.mask_padding else None
        return lambda features, weight, bias: self.kind.error(
            features, weight, bias, target.to(features.dtype), counted
        )

    def counted(self, counts: BatchCounts) -> torch.Tensor:
        """Tokens that are compared: real ones, or all positions."""
        return counts.tokens if self.mask_padding else counts.positions

    def of_pairs(self, sums: Mapping[int, torch.Tensor], counts: BatchCounts, width: int) -> torch.Tensor:
        """[K] each pair's share of the global batch's loss, from the sums that the kind's `error` gave; width: F."""
        if not sums:
            return torch.zeros(0, device=counts.values.device)
        stacked = torch.stack([sums[k] for k in range(len(sums))])
        return stacked / (self.counted(counts).clamp_min(1) * width) * self._scale


def linear_squared_error(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    target: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum over unmasked tokens of (hidden W^T + bias - target)^2, a scalar.

    hidden: [.., D]; weight: [F, D]; bias: [F]; target: [.., F], a constant without gradient; all of one
        floating dtype. mask: [..] bool or 0/1 of any dtype, or None if every token counts.
    Returns float32 (float64 for float64 inputs), summed in that dtype.

    One GEMM forward and two backward (as plain autograd), but a single [N, F] buffer: the residual is
    written in place and saved, next to `hidden` and `weight`, which live anyway. Plain autograd would
    keep the filter's output and the target. `weight` is read anew in backward, so ZeRO-3 may release
    and gather it in between.
    """
    loss: torch.Tensor = _LinearSquaredError.apply(hidden, weight, bias, target, mask)
    return loss


def squared_error_sum(
    filtered_student: torch.Tensor, filtered_teacher: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The reference: sum of (filtered_student - filtered_teacher)^2 over unmasked tokens; both [.., F], mask [..]."""
    squared = (filtered_student - filtered_teacher).square()
    return squared.sum() if mask is None else (squared * mask.unsqueeze(-1)).sum()


KINDS: dict[LayerLossKind, Kind] = {
    "normalized_mse": Kind(linear_squared_error, squared_error_sum, normalized=True),
    "mse": Kind(linear_squared_error, squared_error_sum, normalized=False),
}


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
    if dispatch.has_kernel(output):
        from ted_ds.ops.layer_kernels import subtract_in_place  # torch on a CPU comes without triton

        return output, subtract_in_place(output, target, counted).sum()
    residual = output.sub_(target)
    if counted is not None:
        # masked_fill, not a product: a padded position may hold inf or nan, and 0 * inf is nan.
        residual.masked_fill_(~counted[:, None], 0.0)
    # norms by row in the wide dtype: no copy of [N, F]
    dtype = torch.promote_types(residual.dtype, torch.float32)
    return residual, torch.linalg.vector_norm(residual, dim=-1, dtype=dtype).square_().sum()
