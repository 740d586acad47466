"""What lies between the GEMMs of the layer loss as one Triton kernel: a program a token, in place.

`layer_loss` has the same in torch. Passes over [N, F] in device memory: the filter's output and the target are read,
the residual is written, once each; torch's operations make 4 of it, with a mask 6.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 2048


def subtract_in_place(output: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """output [N, F] becomes output - target, 0 if mask [N] is False; returns float32 sums of squares [N]."""
    rows, width = output.shape
    sums = torch.empty(rows, dtype=torch.float32, device=output.device)
    if rows:
        block = min(_BLOCK, triton.next_power_of_2(width))
        _residual_rows[(rows,)](
            output,
            target.contiguous(),
            output if mask is None else mask,
            sums,
            F=width,
            MASKED=mask is not None,
            BLOCK=block,
        )
    return sums


@triton.jit
def _residual_rows(output, target, mask, sums, F: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    counts = True
    if MASKED:
        counts = tl.load(mask + row) != 0
    lanes = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, F, BLOCK):
        inside = start + lanes < F
        places = row * F + start + lanes
        a = tl.load(output + places, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(target + places, mask=inside, other=0.0).to(tl.float32)
        # a choice, not a product: a padded position may hold inf or nan, and 0 * inf is nan
        difference = tl.where(counts, a - b, 0.0)
        squares += difference * difference
        tl.store(output + places, difference, mask=inside)
    tl.store(sums + row, tl.sum(squares, 0))
