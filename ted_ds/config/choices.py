"""Words that a recipe may use, and what each method is; free of torch, so that config and numerics share them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Method = Literal["ce", "kd", "lwd", "ted"]
Dtype = Literal["float32", "bfloat16"]
Sharding = Literal["zero3", "replicated", "auto"]

Measured = Literal["greedy", "influence", "iterative"]
"""Policies of `student.init.blocks` for which the teacher reads a sample of the training data."""

Divergence = Literal["forward", "reverse", "jensen-shannon"]
"""forward: KL(p || q); reverse: KL(q || p); jensen-shannon: (KL(p || m) + KL(q || m)) / 2, m = (p + q) / 2.

p is the teacher's distribution, q the student's."""

LayerLossKind = Literal["rms_mse", "cosine", "normalized_mse", "mse"]
"""rms_mse: MSE of filtered hidden states; what filters read, and the teacher's filtered states, are divided by their
root mean square token by token. cosine: 1 - their cosine, of the same. normalized_mse: MSE over the mean square of the
teacher's side. mse: the raw MSE of the paper."""

BalanceKind = Literal["gradient", "none"]
"""gradient: mse_alpha is the layer loss's share of the gradient; none: it is a constant weight."""


@dataclass(frozen=True)
class LayerLossSpec:
    """What a recipe with this layer loss has if it does not say otherwise: see `LossConfig`, and for skip_last
    `FiltersConfig` (share of the pairs; of any, at least one).
    """

    mse_alpha: float
    balance: BalanceKind
    layer_fade: float
    skip_last: float


_BY_TOKEN = LayerLossSpec(mse_alpha=1.0, balance="gradient", layer_fade=0.5, skip_last=0.1)
_BY_ENERGY = LayerLossSpec(mse_alpha=10.0, balance="none", layer_fade=0.0, skip_last=0.0)
LAYER_LOSSES: dict[LayerLossKind, LayerLossSpec] = {
    "rms_mse": _BY_TOKEN,
    "cosine": _BY_TOKEN,
    "normalized_mse": _BY_ENERGY,
    "mse": _BY_ENERGY,
}


@dataclass(frozen=True)
class MethodSpec:
    """A method: kl_alpha: its default, 0 if it has no such term; layers: whether it has a layer loss.

    learns_filters: whether Stage I learns filters of both sides. If not, the teacher's states are not filtered, and the
    student's filters are fresh linear maps.
    """

    kl_alpha: float
    layers: bool = False
    learns_filters: bool = False


METHODS: dict[Method, MethodSpec] = {
    "ce": MethodSpec(0.0),
    "kd": MethodSpec(1.0),
    "lwd": MethodSpec(1.0, layers=True),
    "ted": MethodSpec(1.0, layers=True, learns_filters=True),
}
