"""The math between the GEMMs of the logit losses as one Triton kernel: a program a row, logits in, d_logits out.

`logit_rows` is the specification. Everything is float32 in registers, whatever the logits are. Passes over a row of V
logits in device memory: each side's are read once for the sums and once for the gradient, which is written in the
student's place: 2 reads and 1 write of x_s, 2 reads of x_t (the Jensen-Shannon divergence, whose gradient needs a sum
over its own terms: 3 reads of each); without gradients half of it. A row of V = 128256 in bfloat16 is 250 KiB: it does
not stay on a multiprocessor, its second read may come from the level-2 cache.

Rows begin at multiples of `EVEN` elements, and are read and written to the next such multiple behind V: a mask that
ends at an odd V would make every access one of 2 bytes instead of 16.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ted_ds.config.choices import Divergence
from ted_ds.ops.divergence import TopK
from ted_ds.ops.logit_rows import Form, Mixture

_BLOCK, _WARPS = 2048, 8
"""Logits that a program works on at a time, 8 a thread. Compiled for sm_90 by Triton 3.6 and 3.9 that takes up to 80
registers and no stack, so three programs fit a multiprocessor; 4096 took 122 to 188, one or two. Not timed on a device
yet."""

EVEN = 8
"""Elements; 16 bytes of bfloat16, the most that a thread loads at a time."""

_NONE, _FORWARD, _REVERSE, _JENSEN_SHANNON = (tl.constexpr(i) for i in range(4))
_KINDS = {"forward": 1, "reverse": 2, "jensen-shannon": 3}


def fused_losses_and_gradient(
    x_s: torch.Tensor,
    teacher: torch.Tensor | TopK | None,
    targets: torch.Tensor,
    forms: tuple[Form, Form],
    temperature: float,
    divergence: Divergence,
    mixture: Mixture | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`logit_rows.losses_and_gradient` in one launch.

    x_s [C, V] and a dense teacher's have one row stride, a multiple of `EVEN`; what lies behind V up to there is
    overwritten.
    """
    rows, vocab = x_s.shape
    ce, kl = (torch.empty(rows, dtype=torch.float32, device=x_s.device) for _ in range(2))
    if rows == 0:
        return ce, kl
    weights = ce if mixture is None else torch.stack([mixture.cross_entropy, mixture.divergence]).float()
    common = {
        "V": vocab,
        "END": -(-vocab // EVEN) * EVEN,
        "STRIDE": x_s.stride(0),
        "T": temperature,
        "CAP_S": forms[0].capped_factor or 0.0,
        "GRADIENT": mixture is not None,
        "BLOCK": min(_BLOCK, triton.next_power_of_2(vocab)),
        "num_warps": _WARPS,
    }
    if isinstance(teacher, TopK):
        k = teacher.ids.shape[1]
        picked: tuple[Any, ...] = (teacher.ids.contiguous(), teacher.log_probs.contiguous(), teacher.log_rest)
        _top_k_rows[(rows,)](x_s, *picked, targets, weights, ce, kl, K=k, BLOCK_K=triton.next_power_of_2(k), **common)
    else:
        kind = 0 if teacher is None else _KINDS[divergence]
        cap_t = forms[1].capped_factor or 0.0
        _dense_rows[(rows,)](
            x_s, x_s if teacher is None else teacher, targets, weights, ce, kl, CAP_T=cap_t, KIND=kind, **common
        )
    return ce, kl


@triton.jit
def _tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def _scaled(x, CAP: tl.constexpr):
    """y = logits / T from the GEMM's output, see `Form`; -inf stays -inf."""
    if CAP == 0.0:
        return x
    return tl.where(x == float("-inf"), x, CAP * _tanh(x))


@triton.jit
def _raw(pointer, offsets, V: tl.constexpr, END: tl.constexpr):
    """The GEMM's output, -inf behind V."""
    x = tl.load(pointer + offsets, mask=offsets < END, other=float("-inf")).to(tl.float32)
    return x if V == END else tl.where(offsets < V, x, float("-inf"))


@triton.jit
def _load(pointer, offsets, V: tl.constexpr, END: tl.constexpr, CAP: tl.constexpr):
    return _scaled(_raw(pointer, offsets, V, END), CAP)


@triton.jit
def _through_cap(gradient, x, CAP: tl.constexpr):
    """d(tanh) = 1 - tanh^2; its factor is in `Form`."""
    if CAP == 0.0:
        return gradient
    t = _tanh(x)
    return gradient * (1.0 - t * t)


@triton.jit
def _shift(maximum):
    """What exponents are taken relative to; if nothing but -inf was seen, 0 instead of -inf - -inf."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _hot(y, shift, T: tl.constexpr, e):
    """exp(T (y - shift)), T being the temperature: the terms of the student's softmax at temperature 1."""
    if T == 1.0:
        return e
    elif T == 2.0:
        return e * e
    return tl.exp(T * (y - shift))


@triton.jit
def _add_block(y, m, sum_s, sum_hot, T: tl.constexpr):
    """The student's sums with a block of y added, relative to the maximum that it may raise.

    Returns (maximum, sum of exp(y - max), sum of exp(T (y - max)), the block's exp(y - max), what a sum shrank by).
    """
    before = m
    m = tl.maximum(m, tl.max(y, 0))
    shift = _shift(m)
    e = tl.exp(y - shift)
    shrunk = tl.exp(before - shift)
    sum_s = sum_s * shrunk + tl.sum(e, 0)
    sum_hot = sum_hot * _hot(before, shift, T, shrunk) + tl.sum(_hot(y, shift, T, e), 0)
    return m, sum_s, sum_hot, e, shrunk


@triton.jit
def _dense_rows(
    x_s,
    x_t,
    targets,
    weights,
    ce,
    kl,
    V: tl.constexpr,
    END: tl.constexpr,
    STRIDE: tl.constexpr,
    T: tl.constexpr,
    CAP_S: tl.constexpr,
    CAP_T: tl.constexpr,
    KIND: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_s += row * STRIDE
    x_t += row * STRIDE
    target = tl.load(targets + row)
    y_target = _scaled(tl.load(x_s + target).to(tl.float32), CAP_S)
    lanes = tl.arange(0, BLOCK)

    # sums of exp(y - max), rescaled as the maximum grows; `cross` is the mean of y_t - y_s under p, or of
    # y_s - y_t under q
    m_s = float("-inf")
    m_t = float("-inf")
    sum_s = 0.0
    sum_hot = 0.0
    sum_t = 0.0
    cross = 0.0
    for start in range(0, V, BLOCK):
        inside = start + lanes < V
        y_s = _load(x_s, start + lanes, V, END, CAP_S)
        m_s, sum_s, sum_hot, e_s, shrunk = _add_block(y_s, m_s, sum_s, sum_hot, T)
        if KIND != _NONE:
            y_t = _load(x_t, start + lanes, V, END, CAP_T)
            before_t = m_t
            m_t = tl.maximum(m_t, tl.max(y_t, 0))
            e_t = tl.exp(y_t - m_t)
            shrunk_t = tl.exp(before_t - m_t)
            sum_t = sum_t * shrunk_t + tl.sum(e_t, 0)
            if KIND == _FORWARD:
                cross = cross * shrunk_t + tl.sum(tl.where(inside, e_t * (y_t - y_s), 0.0), 0)
            elif KIND == _REVERSE:
                cross = cross * shrunk + tl.sum(tl.where(inside, e_s * (y_s - y_t), 0.0), 0)
    lse_s = m_s + tl.log(sum_s)
    lse_hot = T * m_s + tl.log(sum_hot)
    tl.store(ce + row, lse_hot - T * y_target)

    lse_t = 0.0
    divergence = 0.0
    if KIND != _NONE:
        lse_t = m_t + tl.log(sum_t)
    if KIND == _FORWARD:
        divergence = cross / sum_t - lse_t + lse_s
    elif KIND == _REVERSE:
        cross = cross / sum_s
        divergence = cross - lse_s + lse_t
    elif KIND == _JENSEN_SHANNON:
        divergence, cross = _jensen_shannon(x_s, x_t, lse_s, lse_t, V, END, CAP_S, CAP_T, BLOCK)
    tl.store(kl + row, T * T * divergence)

    if GRADIENT:
        for start in range(0, V, BLOCK):
            x = _raw(x_s, start + lanes, V, END)
            y_s = _scaled(x, CAP_S)
            hot = tl.where(start + lanes == target, 1.0, 0.0)
            gradient = tl.load(weights) * (tl.exp(T * y_s - lse_hot) - hot)
            if KIND != _NONE:
                y_t = _load(x_t, start + lanes, V, END, CAP_T)
                gradient += _slope(tl.load(weights + 1), y_s, y_t, lse_s, lse_t, cross, KIND)
            tl.store(x_s + start + lanes, _through_cap(gradient, x, CAP_S), mask=start + lanes < END)


@triton.jit
def _slope(b, y_s, y_t, lse_s, lse_t, cross, KIND: tl.constexpr):
    """b times the divergence's gradient with respect to y_s."""
    q = tl.exp(y_s - lse_s)
    if KIND == _FORWARD:
        return b * (q - tl.exp(y_t - lse_t))
    elif KIND == _REVERSE:
        return b * q * (y_s - y_t - cross)
    log_q = y_s - lse_s
    return b * 0.5 * q * (log_q - _log_mean(y_t - lse_t, log_q) - cross)


@triton.jit
def _jensen_shannon(
    x_s,
    x_t,
    lse_s,
    lse_t,
    V: tl.constexpr,
    END: tl.constexpr,
    CAP_S: tl.constexpr,
    CAP_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(the divergence, KL(q || m)), by a pass of its own."""
    kl_p = 0.0
    kl_q = 0.0
    lanes = tl.arange(0, BLOCK)
    for start in range(0, V, BLOCK):
        inside = start + lanes < V
        log_q = _load(x_s, start + lanes, V, END, CAP_S) - lse_s
        log_p = _load(x_t, start + lanes, V, END, CAP_T) - lse_t
        log_m = _log_mean(log_p, log_q)
        kl_p += tl.sum(tl.where(inside, tl.exp(log_p) * (log_p - log_m), 0.0), 0)
        kl_q += tl.sum(tl.where(inside, tl.exp(log_q) * (log_q - log_m), 0.0), 0)
    return 0.5 * (kl_p + kl_q), kl_q


@triton.jit
def _log_mean(log_p, log_q):
    """log((p + q) / 2); what lies beyond V, -inf on both sides, is left out by the caller."""
    largest = tl.maximum(log_p, log_q)
    return largest + tl.log(0.5 * (tl.exp(log_p - largest) + tl.exp(log_q - largest)))


@triton.jit
def _top_k_rows(
    x_s,
    ids,
    log_probs,
    log_rest,
    targets,
    weights,
    ce,
    kl,
    V: tl.constexpr,
    END: tl.constexpr,
    STRIDE: tl.constexpr,
    T: tl.constexpr,
    CAP_S: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_s += row * STRIDE
    ranks = tl.arange(0, BLOCK_K)
    listed = ranks < K
    places = tl.load(ids + row * K + ranks, mask=listed, other=0).to(tl.int64)
    log_p = tl.load(log_probs + row * K + ranks, mask=listed, other=float("-inf")).to(tl.float32)
    rest = tl.load(log_rest + row).to(tl.float32)
    target = tl.load(targets + row)
    y_target = _scaled(tl.load(x_s + target).to(tl.float32), CAP_S)
    x_top = tl.load(x_s + places, mask=listed, other=float("-inf")).to(tl.float32)
    y_top = _scaled(x_top, CAP_S)

    # the top k are taken out of the row, so that the others are summed by themselves
    tl.debug_barrier()
    tl.store(x_s + places, tl.full([BLOCK_K], float("-inf"), tl.float32), mask=listed)
    tl.debug_barrier()
    lanes = tl.arange(0, BLOCK)
    m = float("-inf")
    sum_s = 0.0
    sum_hot = 0.0
    for start in range(0, V, BLOCK):
        y = _load(x_s, start + lanes, V, END, CAP_S)
        m, sum_s, sum_hot, _, _ = _add_block(y, m, sum_s, sum_hot, T)
    lse_others = _shift(m) + tl.log(sum_s)
    largest = tl.maximum(m, tl.max(y_top, 0))
    e_top = tl.exp(y_top - largest)
    e_others = tl.exp(m - largest)
    lse_s = largest + tl.log(sum_s * e_others + tl.sum(e_top, 0))
    hot_others = sum_hot * _hot(m, largest, T, e_others)
    lse_hot = T * largest + tl.log(hot_others + tl.sum(_hot(y_top, largest, T, e_top), 0))
    tl.store(ce + row, lse_hot - T * y_target)

    p = tl.exp(log_p)
    some = rest > float("-inf")
    divergence = tl.sum(tl.where(listed, p * (log_p - y_top + lse_s), 0.0), 0)
    divergence += tl.where(some, tl.exp(rest) * (rest - lse_others + lse_s), 0.0)
    tl.store(kl + row, T * T * divergence)

    if GRADIENT:
        a = tl.load(weights)
        b = tl.load(weights + 1)
        for start in range(0, V, BLOCK):
            x = _raw(x_s, start + lanes, V, END)
            y = _scaled(x, CAP_S)
            gradient = a * (tl.exp(T * y - lse_hot) - tl.where(start + lanes == target, 1.0, 0.0))
            # to the others the teacher gives its rest as the student shares it among them
            gradient += b * (tl.exp(y - lse_s) - tl.where(some, tl.exp(y - lse_others + rest), 0.0))
            tl.store(x_s + start + lanes, _through_cap(gradient, x, CAP_S), mask=start + lanes < END)
        tl.debug_barrier()
        gradient = a * (tl.exp(T * y_top - lse_hot) - tl.where(places == target, 1.0, 0.0))
        gradient += b * (tl.exp(y_top - lse_s) - p)
        tl.store(x_s + places, _through_cap(gradient, x_top, CAP_S), mask=listed)
