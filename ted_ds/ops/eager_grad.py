"""A loss whose gradients are computed in the forward, so that nothing of its size waits for backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def eager_gradients(compute: Callable[..., torch.Tensor], *parameters: torch.Tensor) -> torch.Tensor:
    """`compute(*parameters)`, a scalar, differentiable with respect to `parameters` alone.

    Runs `compute` and its backward at once, inside the forward of one autograd function, and keeps the
    parameters' gradients: memory until backward is one gradient for each parameter, whatever `compute` made on
    the way. Stage I needs it: there, each block's loss must be finished before the next block runs, yet
    DeepSpeed's engine must see a single backward.

    compute: called with aliases of the parameters (same storage, own autograd leaves), returns a scalar
        tensor; called once, without recording if no parameter needs a gradient or grad mode is off.
        Tensors that it takes from elsewhere get no gradient.
    Backward multiplies the stored gradients by the upstream gradient, in new tensors: it may run twice.
    """
    loss: torch.Tensor = _EagerGradients.apply(compute, torch.is_grad_enabled(), *parameters)
    return loss


class _EagerGradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, compute: Callable[..., torch.Tensor], record: bool, *parameters: torch.Tensor
    ) -> torch.Tensor:
        needed = [record and need for need in ctx.needs_input_grad[2:]]
        leaves = [p.detach().requires_grad_(need) for p, need in zip(parameters, needed, strict=True)]
        if not any(needed):
            return compute(*leaves).detach()
        with torch.enable_grad():
            loss = compute(*leaves)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found = iter(torch.autograd.grad(loss, wanted, allow_unused=True))
        ctx.gradients = [next(found) if need else None for need in needed]
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scale = upstream[0]
        scaled = [None if g is None else g * scale.to(g.dtype) for g in ctx.gradients]
        return (None, None, *scaled)
