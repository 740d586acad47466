"""Filters: the maps that carry a hidden state into the space where teacher and student are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN

from ted_ds.ops.layer_loss import rms_normalized

UseFilter = Callable[..., torch.Tensor]
"""(features [.., D], weight [F, D], bias [F]), the input and the parameters of a filter's last linear layer; and
normalize=True if the features are yet to be divided by their root mean square, see `rms_normalized`."""


def fresh_linear(inputs: int, outputs: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight [outputs, inputs] and bias of an `nn.Linear`, drawn as it draws them.

    Not made by `nn.Linear` itself: under `zero.Init` a module is cut into shards as soon as it is built.
    """
    weight = nn.Parameter(torch.empty(outputs, inputs))
    nn.init.kaiming_uniform_(weight, a=5**0.5)
    bias = nn.Parameter(torch.empty(outputs))
    nn.init.uniform_(bias, -(inputs**-0.5), inputs**-0.5)
    return weight, bias


class Filter(nn.Module):
    """f: [.., D] -> [.., F], `W h + b`, or `W act(W_inner h + b_inner) + b` (arXiv 2210.01351, section 3).

    The filter owns its tensors itself, without submodules, so that ZeRO-3 gathers all of them when the
    filter is called. A linear filter with F = D starts at identity: a student cut
    from its teacher shares its basis, and a random start would throw that away. start: the weight [F, D] that another
    linear filter starts with. normalized: it reads `rms_normalized(h)` in place of h.
    """

    def __init__(
        self,
        width: int,
        output_dim: int,
        *,
        nonlinear: bool = False,
        activation: str = "gelu",
        normalized: bool = False,
        start: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.width, self.output_dim, self.nonlinear, self.normalized = width, output_dim, nonlinear, normalized
        self.weight, self.bias = fresh_linear(width, output_dim)
        if start is None and output_dim == width:
            start = torch.eye(width)
        if start is not None and not nonlinear:
            with torch.no_grad():
                self.weight.copy_(start)
                self.bias.zero_()
        if nonlinear:
            self.inner_weight, self.inner_bias = fresh_linear(width, width)
        self.activation = ACT2FN[activation]

    def states(
        self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *inner: torch.Tensor
    ) -> torch.Tensor:
        """The filtered states [.., F] of `hidden` [.., D] under the given tensors (Stage I's gradients need it)."""
        return functional.linear(self._features(hidden, *inner), weight, bias)

    def forward(self, hidden: torch.Tensor, *, use: UseFilter | None = None) -> torch.Tensor:
        """What `use` makes of the last linear layer and its input; without it, the filtered states [.., F].

        hidden: [.., D]. Stage II gives the layer loss as `use` (`LayerLoss.against`), and does not compute it from what
        this returns, for two reasons: under ZeRO-3 the weights are whole only inside this forward, and neither the
        filtered states nor the target should wait for backward.
        """
        hidden = hidden.to(self.weight.dtype)
        inner = (self.inner_weight, self.inner_bias) if self.nonlinear else ()
        if use is None:
            return self.states(hidden, self.weight, self.bias, *inner)
        if self.normalized and not inner:  # normalised within `use`: no second [.., D] waits for backward
            return use(hidden, self.weight, self.bias, normalize=True)
        return use(self._features(hidden, *inner), self.weight, self.bias)

    def _features(self, hidden: torch.Tensor, *inner: torch.Tensor) -> torch.Tensor:
        if self.normalized:
            hidden = rms_normalized(hidden)
        return self.activation(functional.linear(hidden, *inner)) if inner else hidden


@dataclass(frozen=True)
class FilterPlan:
    """K filters of one shape, for the blocks `blocks` of a model of width `width`."""

    blocks: tuple[int, ...]
    width: int
    output_dim: int
    nonlinear: bool = False
    activation: str = "gelu"
    normalized: bool = False

    def build(self, basis: torch.Tensor | None = None) -> nn.ModuleList:
        """K fresh filters, in the order of `blocks`.

        basis: [teacher's D, student's D], if the student's hidden states are the teacher's in that basis: linear
        filters from one width to the other start there.
        """
        starts = {} if basis is None else {basis.shape: basis, basis.T.shape: basis.T}
        start = starts.get(torch.Size((self.output_dim, self.width)))
        return nn.ModuleList(
            Filter(
                self.width,
                self.output_dim,
                nonlinear=self.nonlinear,
                activation=self.activation,
                normalized=self.normalized,
                start=start,
            )
            for _ in self.blocks
        )
