"""Words that a recipe may use, and what each method is; free of torch, so that config and numerics share them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Method = Literal["ce", "kd", "lwd", "ted"]
Dtype = Literal["float32", "bfloat16"]
Sharding = Literal["zero3", "replicated"]

Measured = Literal["greedy", "influence", "iterative"]
"""Policies of `student.init.blocks` for which the teacher reads a sample of the training data."""

Divergence = Literal["forward", "reverse", "jensen-shannon"]
"""forward: KL(p || q); reverse: KL(q || p); jensen-shannon: (KL(p || m) + KL(q || m)) / 2, m = (p + q) / 2.

p is the teacher's distribution, q the student's."""

LayerLossKind = Literal["normalized_mse", "mse"]
"""MSE of filtered hidden states over the mean square of the teacher's side, or the raw MSE of the paper."""


@dataclass(frozen=True)
class MethodSpec:
    """A method as weights of the one loss. kl_alpha, mse_alpha: defaults; 0: the method has no such term.

    learns_filters: whether Stage I learns filters of both sides. If not, the teacher's states are not filtered, and the
    student's filters are fresh linear maps.
    """

    kl_alpha: float
    mse_alpha: float
    learns_filters: bool = False


METHODS: dict[Method, MethodSpec] = {
    "ce": MethodSpec(0.0, 0.0),
    "kd": MethodSpec(1.0, 0.0),
    "lwd": MethodSpec(1.0, 10.0),
    "ted": MethodSpec(1.0, 10.0, learns_filters=True),
}
