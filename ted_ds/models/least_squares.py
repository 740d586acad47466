"""What is left makes up for what is gone: a matrix reads its narrower input so that its output changes least."""

from __future__ import annotations

import torch

RIDGE = 0.1
"""Times the mean square of the inputs, as if it were independent noise in each: a small sample knows few directions."""


def reading_basis(moments: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """[inputs, k]: what the columns of a matrix are multiplied by, which now reads x @ S in place of x.

    moments: [inputs, inputs] float64, C = mean of x x^T. kept: S, [inputs, k] orthonormal columns, or the k numbers of
    the inputs that stay. The M with the least mean of |x - M S^T x|^2 is C S (S^T C S)^-1, whatever matrix reads x; C
    gets the ridge first, which draws M to S, the plain cut.
    """
    ridge = RIDGE * moments.diagonal().mean().clamp_min(1e-30)
    moments = moments + ridge * torch.eye(len(moments), dtype=moments.dtype)
    if kept.ndim == 1:
        rows, square = moments[kept], moments[kept][:, kept]
    else:
        kept = kept.to(moments.dtype)
        rows = kept.T @ moments
        square = rows @ kept
    reading: torch.Tensor = torch.linalg.solve(square, rows).T
    return reading
