"""The layer loss: how a pair of hidden states is compared, and how the sums of K pairs become one term.

A new kind needs its name in `ted_ds.config.choices` and an entry in `KINDS` here, with its plain torch reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from ted_ds.batch import BatchCounts
from ted_ds.config.choices import LayerLossKind
from ted_ds.ops import dispatch

RMS_EPSILON = 1e-6
"""Added to the mean square of a hidden state before it is divided by its root: a state of zeros stays zeros."""


@dataclass(frozen=True)
class Kind:
    """One way to compare.

    reference: (filtered student [.., F], target [.., F], mask [..] or None) -> sum over tokens, in plain torch.
    by_token: filters read states that are normalised token by token (`rms_normalized`), and so is the target. If not,
    attention sinks decide: in SmolLM2 1% of the tokens have 98.7% of the mean square of a state.
    by_energy: the sum is divided by the mean square of the teacher's filtered states.
    """

    reference: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
    by_token: bool
    by_energy: bool = False
    cosine: bool = False


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
    ) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor, bool], torch.Tensor]:
        """The error of a pair, of what a student's filter hands to `use`; see `ted_ds.models.filters.UseFilter`.

        The last linear layer of the student's filter is part of it, so that its output never waits for backward.
        target: [.., F], the teacher's filtered states, in any floating dtype; mask: [..], 0 at padding, or None.
        """
        counted = mask if self.mask_padding else None

        def error(
            features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, normalize: bool = False
        ) -> torch.Tensor:
            wanted = rms_normalized(target) if self.kind.by_token else target
            compare = linear_cosine_error if self.kind.cosine else linear_squared_error
            return compare(features, weight, bias, wanted.to(features.dtype), counted, normalize=normalize)

        return error

    def counted(self, counts: BatchCounts) -> torch.Tensor:
        """Tokens that are compared: real ones, or all positions."""
        return counts.tokens if self.mask_padding else counts.positions

    def of_pairs(self, sums: Mapping[int, torch.Tensor], counts: BatchCounts, width: int) -> torch.Tensor:
        """[K] each pair's share of the global batch's loss, from the sums that `against` gave; width: F."""
        if not sums:
            return torch.zeros(0, device=counts.values.device)
        stacked = torch.stack([sums[k] for k in range(len(sums))])
        return stacked / (self.counted(counts).clamp_min(1) * width) * self._scale


def rms_normalized(hidden: torch.Tensor) -> torch.Tensor:
    """Hidden states [.., D], each divided by its root mean square (of float32 or wider); of their own dtype."""
    return hidden * rms_scale(hidden).to(hidden.dtype).unsqueeze(-1)


def rms_scale(hidden: torch.Tensor) -> torch.Tensor:
    """What `rms_normalized` multiplies by: [..], float32 or wider."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    # norms by row in the wide dtype: no copy of [.., D]
    squares = torch.linalg.vector_norm(hidden, dim=-1, dtype=wide).square()
    scale: torch.Tensor = (squares / hidden.shape[-1] + RMS_EPSILON).rsqrt()
    return scale


def linear_squared_error(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    target: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    normalize: bool = False,
) -> torch.Tensor:
    """Sum over unmasked tokens of (hidden W^T + bias - target)^2, a scalar.

    hidden: [.., D]; weight: [F, D]; bias: [F]; target: [.., F], a constant without gradient; all of one
        floating dtype. mask: [..] bool or 0/1 of any dtype, or None if every token counts.
    normalize: `hidden` is taken as `rms_normalized` has it.
    Returns float32 (float64 for float64 inputs), summed in that dtype.

    One GEMM forward and two backward (as plain autograd), but a single [N, F] buffer: the residual is
    written in place and saved, next to `hidden` and `weight`, which live anyway. Plain autograd would
    keep the filter's output, the target and the normalised states. `weight` is read anew in backward, so ZeRO-3 may
    release and gather it in between.
    """
    loss: torch.Tensor = _LinearError.apply(hidden, weight, bias, target, mask, normalize, False)
    return loss


def linear_cosine_error(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    target: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    normalize: bool = False,
) -> torch.Tensor:
    """F times the sum over unmasked tokens of 1 - cosine(hidden W^T + bias, target); otherwise as the above."""
    loss: torch.Tensor = _LinearError.apply(hidden, weight, bias, target, mask, normalize, True)
    return loss


def squared_error_sum(
    filtered_student: torch.Tensor, filtered_teacher: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The reference: sum of (filtered_student - filtered_teacher)^2 over unmasked tokens; both [.., F], mask [..]."""
    squared = (filtered_student - filtered_teacher).square()
    return squared.sum() if mask is None else (squared * mask.unsqueeze(-1)).sum()


def cosine_error_sum(
    filtered_student: torch.Tensor, filtered_teacher: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The reference: F times the sum of 1 - cosine over unmasked tokens; both [.., F], mask [..]."""
    errors = 1 - functional.cosine_similarity(filtered_student, filtered_teacher, dim=-1, eps=RMS_EPSILON)
    return filtered_student.shape[-1] * (errors if mask is None else errors * mask).sum()


KINDS: dict[LayerLossKind, Kind] = {
    "rms_mse": Kind(squared_error_sum, by_token=True),
    "cosine": Kind(cosine_error_sum, by_token=True, cosine=True),
    "normalized_mse": Kind(squared_error_sum, by_token=False, by_energy=True),
    "mse": Kind(squared_error_sum, by_token=False),
}


class _LinearError(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        target: torch.Tensor,
        mask: torch.Tensor | None,
        normalize: bool,
        cosine: bool,
    ) -> torch.Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])
        scale = rms_scale(rows) if normalize else None
        if scale is None:
            output = torch.addmm(bias, rows, weight.t())
        else:  # W (s h) = s (W h): the normalised states are never there
            output = (rows @ weight.t()).mul_(scale.to(rows.dtype)[:, None]).add_(bias)
        counted = None if mask is None else mask.reshape(-1) != 0
        # d loss / d output up to the factor of backward, and the loss
        slope, loss = (_cosine_slope if cosine else _residual)(output, target.reshape(output.shape), counted)
        ctx.factor = 1.0 if cosine else 2.0
        ctx.save_for_backward(hidden, weight, slope, scale)
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, slope, scale = ctx.saved_tensors
        rows = hidden.reshape(-1, hidden.shape[-1])
        # The factor goes to the GEMMs' results: the slope stays as it is, so that backward
        # may run again, and no second [N, F] tensor appears.
        factor = ctx.factor * upstream[0]
        d_hidden = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            d_hidden = slope @ weight
            if scale is not None:
                d_hidden = _through_rms(d_hidden, rows, scale)
            d_hidden = d_hidden.mul_(factor).reshape(hidden.shape)
        if ctx.needs_input_grad[1]:
            scaled = slope if scale is None else slope * scale.to(slope.dtype)[:, None]
            d_weight = (scaled.t() @ rows).mul_(factor)
        if ctx.needs_input_grad[2]:
            d_bias = slope.sum(0, dtype=upstream[0].dtype).mul_(factor).to(slope.dtype)
        return d_hidden, d_weight, d_bias, None, None, None, None


def _through_rms(gradient: torch.Tensor, rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The gradient of rows [N, D] from that of rows * scale [N, D], which is overwritten.

    d/dh of s(h) h with s = (|h|^2 / D + eps)^(-1/2) is s I - s^3 h h^T / D.
    """
    along = (rows * gradient).sum(-1, dtype=scale.dtype)
    along = (along * scale.pow(3) / rows.shape[-1]).to(gradient.dtype)
    return gradient.mul_(scale.to(gradient.dtype)[:, None]).addcmul_(rows, along[:, None], value=-1)


def _cosine_slope(
    output: torch.Tensor, target: torch.Tensor, counted: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(d loss / d output [N, F] in `output`'s place, F sum(1 - cos)), cos = x y / (|x| |y|).

    d(1 - cos)/dx = (cos x / |x| - y / |y|) / |x|.
    """
    dtype, width = torch.promote_types(output.dtype, torch.float32), output.shape[-1]
    if counted is not None:
        # a choice, not a product: a padded position may hold inf or nan, and 0 * inf is nan
        target = target.masked_fill(~counted[:, None], 0.0)
        output = output.masked_fill_(~counted[:, None], 0.0)
    size_x, size_y = (
        torch.linalg.vector_norm(t, dim=-1, dtype=dtype).clamp_min_(RMS_EPSILON) for t in (output, target)
    )
    cosine = (output * target).sum(-1, dtype=dtype) / (size_x * size_y)
    errors = 1 - cosine
    along, across = width * cosine / size_x.square(), -width / (size_x * size_y)
    if counted is not None:
        errors, along, across = (t * counted for t in (errors, along, across))
    slope = output.mul_(along.to(output.dtype)[:, None]).addcmul_(target, across.to(output.dtype)[:, None])
    return slope, width * errors.sum()


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
