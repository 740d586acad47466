"""The math between the GEMMs of the logit losses: logits of a few rows in, losses and d_logits out.

A chunk of logits is [C, V]. On a CPU it is worked through in blocks of few rows, so that of the dozen
passes over a block only the first read and the last write leave the cache. A fused kernel may replace
`losses_and_gradient` whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ted_ds.batch import IGNORED

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
    x_t: torch.Tensor | None,
    targets: torch.Tensor,
    forms: tuple[Form, Form],
    temperature: float,
    mixture: Mixture | None,
    scratch: Scratch,
) -> tuple[torch.Tensor, torch.Tensor]:
    """CE and T^2 KL of each row of a chunk, [C] and [C]; x_s becomes d_logits where a mixture is given.

    x_s, x_t: [C, V] GEMM outputs of student and teacher (see `Form`); both are overwritten.
    targets: [C] int64 below V; rows that do not count are the caller's to leave out.
    temperature: must be 1 where x_t is None.
    """
    ce, kl = [], []
    for start in range(0, max(1, len(x_s)), scratch.rows):
        rows = slice(start, start + scratch.rows)
        if x_t is None:
            ce.append(_cross_entropy(x_s[rows], targets[rows, None], forms[0], mixture, scratch))
            continue
        ce_rows, kl_rows = _cross_entropy_kl(
            x_s[rows], x_t[rows], targets[rows, None], forms, temperature, mixture, scratch
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
        z = _scaled_logits(x[rows], form, scratch, "student")
        target = targets[rows, None]
        greedy.append(z.argmax(-1) == target[:, 0])
        nll.append(_cross_entropy_of(z, target))
    return torch.cat(nll), torch.cat(greedy)


def weights_of(targets: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[N]: 1 where a target is predicted, 0 where it is `IGNORED`."""
    return (targets != IGNORED).to(dtype)


def _scaled_logits(x: torch.Tensor, form: Form, scratch: Scratch, name: str) -> torch.Tensor:
    """y = logits / T [R, V], float32 or wider: x itself where that will do; under a cap x becomes tanh."""
    if form.capped_factor is None:
        wide = x.dtype in (torch.float32, torch.float64)
        return x if wide else scratch.get(name, len(x)).copy_(x)
    return scratch.get(name, len(x)).copy_(x.tanh_()).mul_(form.capped_factor)


def _softmax_(y: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """softmax(y) into `out` (may be y); returns log-sum-exp(y) [R, 1].

    The largest probability is 1 / sum exp(y - max), so two maxima give the log-sum-exp without an exp.
    """
    largest = y.amax(-1, keepdim=True)
    torch.softmax(y, -1, out=out)
    return largest - out.amax(-1, keepdim=True).log_()


def _cross_entropy_of(y: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """CE [R] of logits y, which become softmax(y)."""
    y_target = y.gather(1, target)
    return (_softmax_(y, y) - y_target)[:, 0]


def _cross_entropy(
    x: torch.Tensor, target: torch.Tensor, form: Form, mixture: Mixture | None, scratch: Scratch
) -> torch.Tensor:
    """CE alone: 1 exp; passes over [R, V]: max, softmax (read, write), max."""
    y = _scaled_logits(x, form, scratch, "student")
    ce = _cross_entropy_of(y, target)
    if mixture is not None:
        # The factor is 1 but for its sign, or 0; a pass in the cache buys one rule for all scales.
        _finish_gradient(x, y.mul_(mixture.cross_entropy), target, mixture.cross_entropy, form, scratch)
    return ce


def _cross_entropy_kl(
    x_s: torch.Tensor,
    x_t: torch.Tensor,
    target: torch.Tensor,
    forms: tuple[Form, Form],
    temperature: float,
    mixture: Mixture | None,
    scratch: Scratch,
) -> tuple[torch.Tensor, torch.Tensor]:
    """CE and KL, with q = softmax(y_s), p = softmax(y_t), y = logits / T.

    KL = sum p (y_t - y_s) - lse(y_t) + lse(y_s). At T = 2, exp(z) = exp(z / 2)^2, so softmax(z_s) =
    q^2 / sum q^2 and CE needs no exp of its own: 2 exps a logit instead of 3 (naive autograd: 6).
    Passes over [R, V] beyond the two softmaxes (read, write each) and four maxima: y_t - y_s, * p, sum;
    the norm of q; and for the gradient q - p, * weight, q * weight, and one fused multiply-add.
    """
    n = len(x_s)
    y_s = _scaled_logits(x_s, forms[0], scratch, "student")
    y_t = _scaled_logits(x_t, forms[1], scratch, "teacher")
    p, work = scratch.get("probs", n), scratch.get("work", n)

    lse_t = _softmax_(y_t, p)
    cross = y_t.sub_(y_s).mul_(p).sum(-1, keepdim=True)
    y_target = y_s.gather(1, target)
    if temperature == 2.0:
        lse_s = _softmax_(y_s, y_s)
        sum_q2 = torch.linalg.vector_norm(y_s, dim=-1, keepdim=True).square_()
        ce = sum_q2.log() + 2.0 * (lse_s - y_target)
    else:
        z = torch.mul(y_s, temperature, out=work)
        ce = _cross_entropy_of(z, target)[:, None]
        lse_s = _softmax_(y_s, y_s)
    kl = temperature**2 * (cross - lse_t + lse_s)

    if mixture is not None:
        # d_logits = a (softmax(z_s) - onehot) + b (q - p); the factor T of dKL/dz_s is in the mixture.
        q = y_s
        difference = torch.sub(q, p, out=p).mul_(mixture.divergence)
        if temperature == 2.0:
            torch.mul(q, mixture.cross_entropy / sum_q2, out=work)
            difference.addcmul_(q, work)
        else:
            difference.add_(work.mul_(mixture.cross_entropy))
        _finish_gradient(x_s, difference, target, mixture.cross_entropy, forms[0], scratch)
    return ce[:, 0], kl[:, 0]


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
