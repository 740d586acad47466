"""Which tensors Triton kernels serve."""

from __future__ import annotations

import torch


def has_kernel(x: torch.Tensor) -> bool:
    """True on CUDA, but for float64, which the kernels would round to float32."""
    return x.is_cuda and x.dtype != torch.float64
