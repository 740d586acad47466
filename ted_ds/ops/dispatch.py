"""What a GPU does otherwise than a CPU: Triton kernels, GEMMs into wider sums, larger chunks."""

from __future__ import annotations

import torch


def on_gpu(x: torch.Tensor) -> bool:
    """True on CUDA. Tests without a GPU say so of the meta device."""
    return x.is_cuda


def has_kernel(x: torch.Tensor) -> bool:
    """True on a GPU, but for float64, which the kernels would round to float32."""
    return on_gpu(x) and x.dtype != torch.float64
