"""Counts model FLOPs by running models without weights, and knows the peak FLOP/s of devices."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

BFLOAT16_PEAKS = {
    r"GB[23]00": 2500e12,
    r"B200": 2250e12,
    r"(H100 \d+GB HBM3|H800|H200|GH200( \d+GB?)?( HBM3e?)?)": 989.4e12,
    r"H[12]00 NVL": 835.5e12,
    r"H[18]00 PCIe": 756e12,
    r"H20": 148e12,
    r"A[18]00(-SXM4|-PCIE|-PCIe)?(-\d+GB)?( \d+GB)?( PCIe)?": 312e12,
    r"A30": 165e12,
    r"A40": 149.7e12,
    r"A10": 125e12,
    r"RTX A6000": 154.8e12,
    r"RTX 6000 Ada Generation": 364.2e12,
    r"L40S": 362.05e12,
    r"L40": 181.05e12,
    r"L4": 121e12,
    r"GeForce RTX 4090": 165.2e12,
    r"GeForce RTX 3090": 71e12,
}
"""A pattern of a device's name without "NVIDIA" -> dense bfloat16 FLOP/s with float32 sums (NVIDIA's data sheets; half
of the figure with sparsity). Slices of a GPU (MIG, vGPU) have longer names, and no entry."""


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """Peak dense FLOP/s of a device in `dtype`, by its name; None, never a guess, if the table has no entry."""
    if dtype != torch.bfloat16:
        return None
    name = device_name.removeprefix("NVIDIA ")
    return next((peak for pattern, peak in BFLOAT16_PEAKS.items() if re.fullmatch(pattern, name)), None)


@dataclass(frozen=True)
class BatchFlops:
    """The cost of a micro-batch of a run: `count(S)` model FLOPs of its B rows, S being their padded length;
    of Stage II `count(S, layers=False)` without the layer loss.

    Model FLOPs are those of MFU: without recomputation, element-wise operations, optimizer and collectives, and with
    the whole attention, though causal kernels skip half. dtype: of the GEMMs; None if there are several.
    """

    count: Callable[..., float]
    dtype: torch.dtype | None


def count_flops(model: torch.nn.Module, run: Callable[[], Any]) -> int:
    """FLOPs of the GEMMs, convolutions and attention of `run()`, a forward of `model` on the meta device.

    model: without weights; afterwards it is in bfloat16 (which grouped GEMMs of experts need) and eval mode.
    Raises RuntimeError if the forward depends on values of tensors.
    """
    model.to(torch.bfloat16).eval()
    mapping = {torch.ops.aten._grouped_mm: _grouped_mm_flops}
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with torch.no_grad(), counter, FakeTensorMode(allow_non_fake_inputs=True):
        run()
    return counter.get_total_flops()


def polynomial(values: dict[int, int]) -> Callable[[int], float]:
    """The polynomial of degree len(values) - 1 through the points S -> value.

    The FLOPs of a forward are a quadratic polynomial in S (linear layers are linear, attention is quadratic), so counts
    at three lengths give the count at every length exactly.
    """

    def at(length: int) -> float:
        terms = (v * prod(Fraction(length - t, s - t) for t in values if t != s) for s, v in values.items())
        return float(sum(terms))

    return at


def count_lengths(longest: int) -> Sequence[int]:
    """Three lengths up to `longest`, which determine the polynomial; fewer if `longest` is too small."""
    return sorted({longest, -(-longest // 2), -(-longest // 4)})


def gemm_flops(tokens: int, inputs: int, outputs: int) -> int:
    """The forward of a linear layer over `tokens`. Each gradient, of its input and of its weight, costs the same."""
    return 2 * tokens * inputs * outputs


def logit_loss_flops(tokens: int, vocab: int, width_s: int, width_t: int | None = None) -> int:
    """CE + KL: student logits, d_hidden and d_weight, teacher logits (width_t None: there is no teacher)."""
    return 3 * gemm_flops(tokens, width_s, vocab) + (0 if width_t is None else gemm_flops(tokens, width_t, vocab))


def _grouped_mm_flops(a: Sequence[int], b: Sequence[int], *_: Any, **__: Any) -> int:
    """[tokens, D] by [experts, D, F]: each token goes through one expert."""
    return gemm_flops(a[0], a[1], b[-1])
