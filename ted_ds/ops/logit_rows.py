"""The math between the GEMMs of the logit losses: logits of a few rows in, losses and d_logits out.

A chunk of logits is [C, V]. On a CPU it is worked through in blocks of few rows, so that of the dozen
passes over a block only the first read and the last write leave the cache. On CUDA `logit_kernels` does all
of `losses_and_gradient` in one kernel; this is its specification.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ted_ds.batch import IGNORED
from ted_ds.config.choices import Divergence
from ted_ds.ops.divergence import DIVERGENCES, RowDivergence, TopK, TopKForwardKL, softmax_into

_CACHE_BYTES_PER_THREAD = 2 << 20
"""Level-2 cache that one thread may fill; server cores have 1 to 2 MiB, and misses cost little below that."""


@dataclass(frozen=True)
class Form:
    """How a head's GEMM output becomes y = logits / T: y = x, or factor * tanh(x) under soft-capping.

    gemm_scale: what the GEMM multiplies its product (and bias) by, at no cost.
    """

    gemm_scale: float
    capped_factor: float | None

    @staticmethod
    def of(softcap: float | None, scale: float, temperature: float) -> Form:
        """logits = softcap * tanh(scale * (h W^T + b) / softcap), or scale * (h W^T + b)."""
        if softcap is None:
            return Form(scale / temperature, None)
        return Form(scale / softcap, softcap / temperature)


@dataclass(frozen=True)
class Mixture:
    """d_logits up to one factor: cross_entropy * dCE + divergence * dKL, the two weights summing to 1.

    With the factor kept apart (it joins the upstream gradient), d_logits is of size 1 whatever the scales
    are: half-precision GEMMs neither overflow nor underflow, and a scale of 0 needs no case of its own.
    Both are 0-dimensional tensors on the device, so reading the scales does not wait for it.
    """

    cross_entropy: torch.Tensor
    divergence: torch.Tensor


class Scratch:
    """Row-block buffers [R, V] in the losses' dtype, each made at its first use and kept for the whole call.

    Fresh pages for every block would cost more than the math does.
    """

    def __init__(self, rows: int, vocab: int, like: torch.Tensor) -> None:
        self.rows, self._vocab, self._device = rows, vocab, like.device
        self._dtype = torch.promote_types(like.dtype, torch.float32)
        self._buffers: dict[str, torch.Tensor] = {}

    def get(self, name: str, rows: int) -> torch.Tensor:
        """The first rows of the buffer `name`, [rows, V]; what it held before is still there."""
        if name not in self._buffers:
            self._buffers[name] = torch.empty(self.rows, self._vocab, dtype=self._dtype, device=self._device)
        return self._buffers[name][:rows]


def block_rows(chunk_tokens: int, vocab: int, device: torch.device) -> int:
    """Rows per block: all of a chunk on an accelerator; on a CPU what four float32 buffers leave in cache."""
    chunk_tokens = max(1, chunk_tokens)
    if device.type != "cpu":
        return chunk_tokens
    threads = torch.get_num_threads()
    rows_per_thread = _CACHE_BYTES_PER_THREAD // (4 * 4 * vocab)
    return min(chunk_tokens, threads * max(1, rows_per_thread))


def losses_and_gradient(
    x_s: torch.Tensor,
    teacher: torch.Tensor | TopK | None,
    targets: torch.Tensor,
    forms: tuple[Form, Form],
    temperature: float,
    divergence: Divergence,
    mixture: Mixture | None,
    scratch: Scratch,
) -> tuple[torch.Tensor, torch.Tensor]:
    """CE and T^2 times the divergence of each row of a chunk, [C] and [C]; x_s becomes d_logits with a mixture.

    x_s: [C, V] GEMM output of the student (see `Form`), overwritten.
    teacher: the teacher's, likewise, or its top k (then `divergence` must be forward), or None.
    targets: [C] int64 below V; rows that do not count are the caller's to leave out.
    temperature: must be 1 if there is no teacher.
    """
    ce, kl = [], []
    for start in range(0, max(1, len(x_s)), scratch.rows):
        rows = slice(start, start + scratch.rows)
        if teacher is None:
            ce.append(_cross_entropy(x_s[rows], targets[rows, None], forms[0], mixture, scratch))
            continue
        own = teacher.rows(rows) if isinstance(teacher, TopK) else teacher[rows]
        ce_rows, kl_rows = _cross_entropy_kl(
            x_s[rows], own, targets[rows, None], forms, temperature, divergence, mixture, scratch
        )
        ce.append(ce_rows)
        kl.append(kl_rows)
    ce_all = torch.cat(ce)
    return ce_all, torch.cat(kl) if kl else torch.zeros_like(ce_all)


def scores(x: torch.Tensor, targets: torch.Tensor, form: Form, scratch: Scratch) -> tuple[torch.Tensor, torch.Tensor]:
    """CE of each row [C] and whether the target is its argmax [C] bool; x [C, V] is overwritten."""
    nll, greedy = [], []
    for start in range(0, max(1, len(x)), scratch.rows):
        rows = slice(start, start + scratch.rows)
        z = scaled_logits(x[rows], form, scratch, "student")
        target = targets[rows, None]
        greedy.append(z.argmax(-1) == target[:, 0])
        nll.append(_cross_entropy_of(z, target))
    return torch.cat(nll), torch.cat(greedy)


def weights_of(targets: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[N]: 1 if a target is predicted, 0 if it is `IGNORED`."""
    return (targets != IGNORED).to(dtype)


def scaled_logits(x: torch.Tensor, form: Form, scratch: Scratch, name: str) -> torch.Tensor:
    """y = logits / T [R, V], float32 or wider: x itself if that will do; under a cap x becomes tanh."""
    if form.capped_factor is None:
        wide = x.dtype in (torch.float32, torch.float64)
        return x if wide else scratch.get(name, len(x)).copy_(x)
    return scratch.get(name, len(x)).copy_(x.tanh_()).mul_(form.capped_factor)


def _cross_entropy_of(y: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """CE [R] of logits y, which become softmax(y)."""
    y_target = y.gather(1, target)
    return (softmax_into(y, y) - y_target)[:, 0]


def _cross_entropy(
    x: torch.Tensor, target: torch.Tensor, form: Form, mixture: Mixture | None, scratch: Scratch
) -> torch.Tensor:
    """CE alone: 1 exp; passes over [R, V]: max, softmax (read, write), max."""
    y = scaled_logits(x, form, scratch, "student")
    ce = _cross_entropy_of(y, target)
    if mixture is not None:
        # The factor is 1 but for its sign, or 0; a pass in the cache buys one rule for all scales.
        _finish_gradient(x, y.mul_(mixture.cross_entropy), target, mixture.cross_entropy, form, scratch)
    return ce


def _cross_entropy_kl(
    x_s: torch.Tensor,
    teacher: torch.Tensor | TopK,
    target: torch.Tensor,
    forms: tuple[Form, Form],
    temperature: float,
    divergence: Divergence,
    mixture: Mixture | None,
    scratch: Scratch,
) -> tuple[torch.Tensor, torch.Tensor]:
    """CE and divergence, with q = softmax(y_s), y = logits / T.

    At T = 2, exp(z) = exp(z / 2)^2, so softmax(z_s) = q^2 / sum q^2 and CE needs no exp of its own: with the
    forward KL 2 exps a logit instead of 3 (naive autograd: 6). Passes over [R, V] beyond the two softmaxes (read,
    write each) and four maxima: y_t - y_s, * p, sum; the norm of q; and for the gradient q - p, * weight,
    q * weight, and one fused multiply-add.
    """
    y_s = scaled_logits(x_s, forms[0], scratch, "student")
    work = scratch.get("work", len(x_s))
    distance = _divergence(y_s, teacher, forms[1], divergence, scratch)
    y_target = y_s.gather(1, target)
    if temperature == 2.0:
        lse_s = softmax_into(y_s, y_s)
        sum_q2 = torch.linalg.vector_norm(y_s, dim=-1, keepdim=True).square_()
        ce = sum_q2.log() + 2.0 * (lse_s - y_target)
    else:
        z = torch.mul(y_s, temperature, out=work)
        ce = _cross_entropy_of(z, target)[:, None]
        lse_s = softmax_into(y_s, y_s)
    q = y_s
    kl = temperature**2 * distance.value(q, lse_s)

    if mixture is not None:
        # d_logits = a (softmax(z_s) - onehot) + b d_divergence / dy_s; the factor T of d / dz_s is in the mixture.
        gradient = distance.gradient(q).mul_(mixture.divergence)
        if temperature == 2.0:
            torch.mul(q, mixture.cross_entropy / sum_q2, out=work)
            gradient.addcmul_(q, work)
        else:
            gradient.add_(work.mul_(mixture.cross_entropy))
        _finish_gradient(x_s, gradient, target, mixture.cross_entropy, forms[0], scratch)
    return ce[:, 0], kl[:, 0]


def _divergence(
    y_s: torch.Tensor, teacher: torch.Tensor | TopK, form: Form, divergence: Divergence, scratch: Scratch
) -> RowDivergence:
    """The divergence, having taken what it needs of y_s before that becomes q."""
    p = scratch.get("probs", len(y_s))
    if isinstance(teacher, TopK):
        return TopKForwardKL(y_s, teacher, p)
    y_t = scaled_logits(teacher, form, scratch, "teacher")
    lse_t = softmax_into(p, y_t)
    return DIVERGENCES[divergence](y_s, y_t, p, lse_t, scratch.get)


def _finish_gradient(
    x: torch.Tensor,
    gradient: torch.Tensor,
    target: torch.Tensor,
    one_hot: torch.Tensor,
    form: Form,
    scratch: Scratch,
) -> None:
    """Into x: the gradient less the target's one-hot, through the cap (1 - tanh^2, tanh being in x)."""
    gradient.scatter_add_(1, target, (-one_hot).expand(target.shape))
    if form.capped_factor is not None:
        work = torch.mul(gradient, x, out=scratch.get("work", len(x)))
        gradient.addcmul_(work, x, value=-1)
    if gradient.data_ptr() != x.data_ptr():
        x.copy_(gradient)
