"""Sums over tokens turned into scores; pure arithmetic, float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ted_ds.errors import DataError, NotFiniteError

_LARGEST_EXPONENT = 700.0
"""exp of more overflows a float; a diverged model's perplexity stays a number that JSON can hold."""


@dataclass(frozen=True)
class Perplexity:
    """loss: mean nats a token; perplexity: exp(loss), at most exp(700); tokens: how many were predicted."""

    loss: float
    perplexity: float
    tokens: int


def perplexity(nll_sum: float, count: int) -> Perplexity:
    """nll_sum: sum of -log p(token), in nats, over `count` predicted tokens.

    DataError if count is 0, NotFiniteError if the sum is nan or infinite.
    """
    if count < 1:
        raise DataError("perplexity: no token to predict; the data is empty or its sequences have one token")
    if not math.isfinite(nll_sum):
        raise NotFiniteError(f"the loss of {count} tokens is {nll_sum}, which is not finite")
    loss = nll_sum / count
    return Perplexity(loss, math.exp(min(loss, _LARGEST_EXPONENT)), count)
