"""Learning-rate schedules as pure functions: step -> multiplier of the peak rate."""

from __future__ import annotations

import math
from collections.abc import Callable


def learning_rate_schedule(
    shape: str, *, warmup_steps: int, total_steps: int, final_ratio: float
) -> Callable[[int], float]:
    """Linear warm-up from 1/warmup_steps to 1, then `shape` (cosine | linear | constant) to `final_ratio`.

    The k-th optimizer step (0-based) uses multiplier(k). Constant stays at 1.
    """

    def multiplier(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if shape == "constant":
            return 1.0
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        falling = 1.0 - progress if shape == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
        return final_ratio + (1.0 - final_ratio) * falling

    return multiplier
