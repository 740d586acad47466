"""Cross-entropy and KL from hidden states and LM heads, in chunks of tokens: [N, V] is never whole.

Four GEMMs in all: student logits, teacher logits, d_hidden, d_weight. The gradients are computed in the
forward, while a chunk's logits are at hand; backward multiplies them by the upstream gradient. The GEMMs
and the chunks are here, the math between them in `logit_rows` and, on CUDA, `logit_kernels`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ted_ds.config.choices import Divergence
from ted_ds.ops.dispatch import has_kernel
from ted_ds.ops.divergence import TopK, top_k_of
from ted_ds.ops.logit_rows import (
    Form,
    Mixture,
    Scratch,
    block_rows,
    losses_and_gradient,
    scaled_logits,
    scores,
    weights_of,
)

_CPU_CHUNK_BYTES = 112 << 20
"""Bytes that a chunk's buffers may take together, as long as `_MIN_CHUNK_TOKENS` fit."""

_CUDA_CHUNK_SHARE = 1 / 64
"""The same on CUDA as a share of the device's memory: 1.2 GiB of 80. Of all of it, not of what is free: a resumed run
must cut the chunks that it cut before, or its sums round differently."""

_GEMM_TILE = 128
"""CUDA chunks are a multiple of it: tokens that a GEMM's block of threads works on."""

_ROW_ALIGNMENT = 64
"""Elements; 128 bytes of bfloat16, what GEMMs and 16-byte loads want of a row's start."""

_EVEN_COLUMNS = 8
"""What cuBLAS wants every size of a half-precision GEMM to be a multiple of. On an H200 the four GEMMs of 8192 tokens,
D 2048, took 28 ms at V 151936 and at 151665, of rows that begin at multiples of 64, more than four times that."""

_MIN_CHUNK_TOKENS = 256
"""Every chunk passes over d_weight once: C / 4 FLOPs a byte, whatever V and D. On 2 cores with V 50257 and
D 384 the four GEMMs in chunks of 128, 256, 512 tokens took 1.26, 1.13, 1.03 of the whole ones; fresh pages
for larger buffers cost what larger GEMMs save, so the whole loss took 0.84, 0.78, 0.84 s."""


@dataclass(frozen=True)
class Head:
    """An LM head: logits = softcap * tanh(scale * (h W^T + b) / softcap), or scale * (h W^T + b) uncapped.

    weight: [V, D]; bias: [V] or None; softcap: Gemma 2's `final_logit_softcapping`.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    softcap: float | None = None
    scale: float = 1.0


def linear_cross_entropy_kl(
    hidden_s: torch.Tensor,
    head_s: Head,
    targets: torch.Tensor,
    hidden_t: torch.Tensor | None = None,
    head_t: Head | None = None,
    *,
    pred_scale: torch.Tensor | float,
    kl_scale: torch.Tensor | float = 0.0,
    temperature: float = 2.0,
    divergence: Divergence = "forward",
    top_k: int | TopK | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(total, pred_sum, kl_sum) with total = pred_scale * pred_sum + kl_scale * kl_sum (arXiv 2210.01351).

    pred_sum = sum of -log softmax(z_s)[target]; kl_sum = T^2 * sum of KL(softmax(z_t/T) || softmax(z_s/T)),
    both over the rows whose target is not -100. total is differentiable with respect to hidden_s,
    head_s.weight and head_s.bias, once; the two sums are detached. All are scalars, float32 (float64 where
    the inputs are).

    hidden_s: [N, D_s]; hidden_t: [N, D_t], a constant, or None (then kl_sum is 0); targets: [N] int64.
    pred_scale, kl_scale: constants, numbers or scalar tensors on the device, which are never read back.
    divergence: what stands in the KL's place, see `Divergence`; its sum is kl_sum.
    top_k: the KL is that over the teacher's k likeliest ids of each token and the event "any other id" (`TopK`); as
        a TopK, what was recorded of a teacher at this temperature, in place of hidden_t and head_t.
    vocab_size: the first so many rows of both heads take part (padded vocabularies of one tokenizer);
        None: the smaller head's. The other rows' gradients are zero.
    chunk_tokens: tokens whose logits are alive at a time; None: see `default_chunk_tokens`.

    Hidden states are cast to their head's dtype. GEMMs run in that dtype, the rest in float32 or wider;
    d_weight is summed over chunks in float32. Memory: two chunks of logits, and one gradient each of
    hidden_s, weight and bias (none of which needs no gradient; under no_grad only the forward GEMMs run).
    Raises ValueError where shapes do not fit, or for a top k of another divergence than the forward KL.
    """
    if (hidden_t is None) != (head_t is None):
        raise ValueError("linear_cross_entropy_kl: hidden_t and head_t come together; give both or neither")
    recorded = top_k if isinstance(top_k, TopK) else None
    if recorded is not None and hidden_t is not None:
        raise ValueError("linear_cross_entropy_kl: a recorded TopK stands for hidden_t and head_t; give one of them")
    if top_k is not None and divergence != "forward":
        raise ValueError(f"linear_cross_entropy_kl: top_k is for the forward KL, divergence is {divergence!r}")
    given = (hidden_s, targets, hidden_t, recorded.ids if recorded else None)
    lengths = {len(t) for t in given if t is not None}
    if len(lengths) != 1:
        raise ValueError(f"linear_cross_entropy_kl: hidden_s, targets and the teacher's differ in length: {lengths}")
    vocab = _common_vocab(head_s, head_t, vocab_size)
    like = hidden_s.to(head_s.weight.dtype)
    taught = head_t is not None or recorded is not None
    problem = _Problem(
        head_s=head_s,
        targets=targets,
        hidden_t=None if hidden_t is None or head_t is None else hidden_t.detach().to(head_t.weight.dtype),
        head_t=head_t,
        pred_scale=_scalar(pred_scale, like),
        top_k=top_k,
        kl_scale=_scalar(kl_scale if taught else 0.0, like),
        temperature=float(temperature) if taught else 1.0,
        divergence=divergence,
        vocab=vocab,
        chunk_tokens=chunk_tokens
        or default_chunk_tokens(len(like), vocab, like, sides=1 + (head_t is not None), widened=isinstance(top_k, int)),
        with_gradient=torch.is_grad_enabled(),
    )
    result: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    result = _LinearCrossEntropyKL.apply(like, head_s.weight, head_s.bias, problem)
    return result


@torch.no_grad()
def teacher_top_k(
    hidden_t: torch.Tensor,
    head_t: Head,
    k: int,
    *,
    temperature: float = 2.0,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
) -> TopK:
    """What `linear_cross_entropy_kl` needs of a teacher where `top_k` is k, without gradients.

    hidden_t: [N, D]. Returns ids [N, k] int32 and log-probabilities in float32 (float64 for float64 heads).
    vocab_size and chunk_tokens: see `linear_cross_entropy_kl`.
    """
    vocab = _common_vocab(head_t, None, vocab_size)
    hidden = hidden_t.to(head_t.weight.dtype)
    chunk = chunk_tokens or default_chunk_tokens(len(hidden), vocab, hidden, sides=1, widened=True)
    form = Form.of(head_t.softcap, head_t.scale, float(temperature))
    logits = _logits_buffer(hidden, min(chunk, len(hidden)), vocab)
    found = [_top_k(_gemm_logits(hidden[rows], head_t, form, logits), form, k) for rows in _chunks(len(hidden), chunk)]
    ids = torch.cat([part.ids for part in found]).int()
    return TopK(ids, torch.cat([part.log_probs for part in found]), torch.cat([part.log_rest for part in found]))


def _top_k(x_t: torch.Tensor, form: Form, k: int) -> TopK:
    """The top k of a chunk's GEMM output; x_t [C, V] is overwritten."""
    return top_k_of(scaled_logits(x_t, form, Scratch(len(x_t), x_t.shape[1], x_t), "teacher"), k)


@torch.no_grad()
def token_scores(
    hidden: torch.Tensor,
    head: Head,
    targets: torch.Tensor,
    *,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's -log softmax(z)[target] and whether the target is the argmax, without gradients.

    hidden: [N, D]; targets: [N] int64. Returns [N] float32 (float64 for float64 heads) and [N] bool; 0 and
    False where the target is -100. vocab_size and chunk_tokens: see `linear_cross_entropy_kl`.
    """
    vocab = _common_vocab(head, None, vocab_size)
    hidden = hidden.to(head.weight.dtype)
    chunk = chunk_tokens or default_chunk_tokens(len(hidden), vocab, hidden, sides=1, widened=True)
    form = Form.of(head.softcap, head.scale, 1.0)
    logits = _logits_buffer(hidden, min(chunk, len(hidden)), vocab)
    scratch = Scratch(block_rows(len(logits), vocab, hidden.device), vocab, hidden)
    nll, greedy = [], []
    for rows in _chunks(len(hidden), chunk):
        x = _gemm_logits(hidden[rows], head, form, logits)
        ce, best = scores(x, targets[rows].clamp_min(0), form, scratch)
        predicted = weights_of(targets[rows], torch.bool)
        nll.append(ce.masked_fill_(~predicted, 0.0))
        greedy.append(best & predicted)
    return torch.cat(nll), torch.cat(greedy)


def default_chunk_tokens(tokens: int, vocab: int, like: torch.Tensor, *, sides: int, widened: bool = False) -> int:
    """Equal chunks, at least two, as few as the bytes of a chunk allow.

    sides: GEMM outputs of a chunk. widened: whether torch, not the kernel, works on a side; off the CPU, where a chunk
    is no row block, it takes two of them again in float32. On CUDA a chunk has at least two rows for each
    multiprocessor, which the kernel works on at a time, and is a multiple of `_GEMM_TILE`.
    """
    row_bytes = vocab * (like.element_size() * sides + 8 * (widened and like.is_cuda))
    limit, least, tile = _CPU_CHUNK_BYTES, _MIN_CHUNK_TOKENS, 1
    if like.is_cuda:
        device = torch.cuda.get_device_properties(like.device)
        limit = int(device.total_memory * _CUDA_CHUNK_SHARE)
        least, tile = max(least, 2 * device.multi_processor_count), _GEMM_TILE
    chunks = max(2, -(-tokens // max(least, limit // row_bytes)))
    return max(1, -(-tokens // chunks // tile) * tile)


@dataclass(frozen=True)
class _Problem:
    """What the autograd function needs beside the three tensors that it is differentiable in."""

    head_s: Head
    targets: torch.Tensor
    hidden_t: torch.Tensor | None
    head_t: Head | None
    top_k: int | TopK | None
    pred_scale: torch.Tensor
    kl_scale: torch.Tensor
    temperature: float
    divergence: Divergence
    vocab: int
    chunk_tokens: int
    with_gradient: bool


class _LinearCrossEntropyKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, problem: _Problem
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        needed = [problem.with_gradient and need for need in ctx.needs_input_grad[:3]]
        # d_logits = size * (mixture of size 1); `size` joins the upstream gradient in backward.
        divergence = problem.kl_scale * problem.temperature
        size = (problem.pred_scale.abs() + divergence.abs()).clamp_min(torch.finfo(divergence.dtype).tiny)
        mixture = Mixture(problem.pred_scale / size, divergence / size) if any(needed) else None
        gradients = _Gradients.for_head(hidden, problem, needed)
        pred_sum, kl_sum = _run_chunks(hidden, problem, mixture, gradients)
        ctx.gradients, ctx.factor = gradients, size * problem.head_s.scale
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        total = problem.pred_scale * pred_sum + problem.kl_scale * kl_sum
        ctx.mark_non_differentiable(pred_sum, kl_sum)
        return total, pred_sum, kl_sum

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy_kl: backward ran before; its gradients were handed out")
        # In place: a second [V, D] would cost as much memory as the chunks. Hence one backward a forward.
        found, factor = ctx.gradients, ctx.factor * upstream[0]
        ctx.gradients = None
        tensors = (found.hidden, found.weight, found.bias)
        scaled = [None if g is None else _scaled_to(g, factor, t) for g, t in zip(tensors, ctx.dtypes, strict=True)]
        return (*scaled, None)


def _scaled_to(gradient: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """factor * gradient in `dtype`, in one pass: in place, or into the narrower tensor that is asked for."""
    out = gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, factor, out=out)


@dataclass
class _Gradients:
    """Gradients up to a common factor: of hidden [N, D], weight [V, D], bias [V]; None where not needed."""

    hidden: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    vocab: int

    @staticmethod
    def for_head(hidden: torch.Tensor, problem: _Problem, needed: list[bool]) -> _Gradients:
        weight, vocab = problem.head_s.weight, problem.vocab
        wide = torch.promote_types(weight.dtype, torch.float32)
        d_weight = torch.empty_like(weight, dtype=wide) if needed[1] else None
        if d_weight is not None:
            d_weight[vocab:].zero_()
        d_bias = weight.new_zeros(len(weight), dtype=wide) if needed[2] else None
        return _Gradients(torch.empty_like(hidden) if needed[0] else None, d_weight, d_bias, vocab)

    def add_chunk(
        self, rows: slice, d_logits: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor
    ) -> None:
        """d_logits [C, V]; hidden [C, D]; counts [C]: 0 for the rows that take no part, else 1."""
        if self.hidden is not None:
            out = self.hidden[rows]
            for columns in _even_parts(d_logits):
                out.addmm_(d_logits[:, columns], weight[columns], beta=float(columns.start > 0))
            out.mul_(counts[:, None].to(out.dtype))
        if self.weight is not None:
            counted = hidden * counts[:, None].to(hidden.dtype)
            # The first chunk writes: nothing reads, and nothing had to zero, [V, D] before.
            for columns in _even_parts(d_logits):
                _add_product(self.weight[columns], d_logits[:, columns].t(), counted, first=rows.start == 0)
        if self.bias is not None:
            self.bias[: self.vocab].add_(torch.mv(d_logits.t(), counts.to(d_logits.dtype)))


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, first: bool) -> None:
    """total (+)= a @ b; where total is wider than a and b, the sum is not rounded to their dtype.

    CUDA's GEMM adds half-precision products to a float32 total itself (pytorch#167931); elsewhere the product is
    made, and rounded, once a chunk.
    """
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=0.0 if first else 1.0)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=0.0 if first else 1.0, out=total)
    elif first:
        total.copy_(a @ b)
    else:
        total.add_(a @ b)


def _run_chunks(
    hidden: torch.Tensor, problem: _Problem, mixture: Mixture | None, gradients: _Gradients
) -> tuple[torch.Tensor, torch.Tensor]:
    """The chunk loop: logits, the math between, gradient GEMMs. Returns the CE sum and the KL sum."""
    head_s, head_t, hidden_t = problem.head_s, problem.head_t, problem.hidden_t
    vocab, chunk = problem.vocab, min(problem.chunk_tokens, len(hidden))
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    scratch = Scratch(block_rows(chunk, vocab, hidden.device), vocab, hidden)
    logits_s = _logits_buffer(hidden, chunk, vocab)
    logits_t = None if hidden_t is None else _logits_buffer(hidden_t, chunk, vocab)
    forms = (
        Form.of(head_s.softcap, head_s.scale, problem.temperature),
        Form.of(*((head_t.softcap, head_t.scale) if head_t else (None, 1.0)), problem.temperature),
    )
    sums = torch.zeros(2, dtype=dtype, device=hidden.device)
    for rows in _chunks(len(hidden), chunk):
        x_s = _gemm_logits(hidden[rows], head_s, forms[0], logits_s)
        teacher: torch.Tensor | TopK | None = None
        if hidden_t is not None and head_t is not None and logits_t is not None:
            teacher = _gemm_logits(hidden_t[rows], head_t, forms[1], logits_t)
            if isinstance(problem.top_k, int):
                teacher = _top_k(teacher, forms[1], problem.top_k)
        elif isinstance(problem.top_k, TopK):
            teacher = problem.top_k.rows(rows)
        targets = problem.targets[rows]
        between = (x_s, teacher, targets.clamp_min(0), forms, problem.temperature, problem.divergence, mixture)
        losses = _in_one_kernel(*between) if has_kernel(x_s) else losses_and_gradient(*between, scratch)
        counts = weights_of(targets, dtype)
        sums += torch.stack(losses) @ counts
        gradients.add_chunk(rows, x_s, hidden[rows], head_s.weight, counts)
    pred_sum, kl_sum = sums.unbind()
    return pred_sum.clone(), kl_sum.clone()


def _logits_buffer(like: torch.Tensor, chunk: int, vocab: int) -> torch.Tensor:
    """[C, V]; for a kernel rows begin every `_ROW_ALIGNMENT` elements, and it may write up to there."""
    apart = -(-vocab // _ROW_ALIGNMENT) * _ROW_ALIGNMENT if has_kernel(like) else vocab
    return like.new_empty(chunk, apart)[:, :vocab]


def _in_one_kernel(*between: Any) -> tuple[torch.Tensor, torch.Tensor]:
    from ted_ds.ops.logit_kernels import fused_losses_and_gradient  # torch on a CPU comes without triton

    return fused_losses_and_gradient(*between)


def _gemm_logits(hidden: torch.Tensor, head: Head, form: Form, out: torch.Tensor) -> torch.Tensor:
    """gemm_scale * (hidden W^T + b) into the first rows of `out` [C, V]; V may be below the head's."""
    out, scale = out[: len(hidden)], form.gemm_scale
    for columns in _even_parts(out):
        part, weight = out[:, columns], head.weight[columns]
        if head.bias is None:
            part.addmm_(hidden, weight.t(), beta=0.0, alpha=scale)
        else:
            torch.addmm(head.bias[columns], hidden, weight.t(), beta=scale, alpha=scale, out=part)
    return out


def _even_parts(logits: torch.Tensor) -> list[slice]:
    """The columns of [C, V] that a GEMM works on at a time: on CUDA the last V % `_EVEN_COLUMNS` go by themselves."""
    vocab = logits.shape[1]
    even = vocab - vocab % _EVEN_COLUMNS if has_kernel(logits) else vocab
    return [part for part in (slice(0, even), slice(even, vocab)) if part.stop > part.start]


def _chunks(tokens: int, chunk_tokens: int) -> Iterator[slice]:
    for start in range(0, max(1, tokens), max(1, chunk_tokens)):
        yield slice(start, min(tokens, start + chunk_tokens))


def _common_vocab(head_s: Head, head_t: Head | None, vocab_size: int | None) -> int:
    smallest = min(len(head.weight) for head in (head_s, head_t) if head is not None)
    if vocab_size is not None and vocab_size > smallest:
        raise ValueError(f"vocab_size {vocab_size} exceeds the smaller LM head's {smallest} rows")
    return smallest if vocab_size is None else vocab_size


def _scalar(value: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor:
    """A 0-dimensional tensor on like's device, float32 or wider; a number is filled in there, not copied."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    if isinstance(value, torch.Tensor):
        return value.detach().to(like.device, dtype, non_blocking=True).reshape(())
    return torch.full((), value, dtype=dtype, device=like.device)
