"""Cross-entropy and KL from hidden states and LM heads, in chunks of tokens: [N, V] is never whole.

Four GEMMs in all: student logits, teacher logits, d_hidden, d_weight. The gradients are computed in the
forward, while a chunk's logits are at hand; backward multiplies them by the upstream gradient. The GEMMs
and the chunks are here, the math between them in `logit_rows`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ted_ds.ops.logit_rows import (
    Form,
    Mixture,
    Scratch,
    block_rows,
    losses_and_gradient,
    scores,
    weights_of,
)

_CHUNK_BYTES = {"cpu": 112 << 20, "cuda": 1 << 30}
"""Bytes that a chunk's buffers may take together, as long as `_MIN_CHUNK_TOKENS` fit."""

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
    vocab_size: the first so many rows of both heads take part (padded vocabularies of one tokenizer);
        None: the smaller head's. The other rows' gradients are zero.
    chunk_tokens: tokens whose logits are alive at a time; None: see `default_chunk_tokens`.

    Hidden states are cast to their head's dtype. GEMMs run in that dtype, the rest in float32 or wider;
    d_weight is summed over chunks in float32. Memory: two chunks of logits, and one gradient each of
    hidden_s, weight and bias (none of which needs no gradient; under no_grad only the forward GEMMs run).
    Raises ValueError where shapes do not fit.
    """
    if (hidden_t is None) != (head_t is None):
        raise ValueError("linear_cross_entropy_kl: hidden_t and head_t come together; give both or neither")
    lengths = {len(t) for t in (hidden_s, targets, hidden_t) if t is not None}
    if len(lengths) != 1:
        raise ValueError(f"linear_cross_entropy_kl: hidden_s, targets and hidden_t differ in length: {lengths}")
    vocab = _common_vocab(head_s, head_t, vocab_size)
    like = hidden_s.to(head_s.weight.dtype)
    problem = _Problem(
        head_s=head_s,
        targets=targets,
        hidden_t=None if hidden_t is None or head_t is None else hidden_t.detach().to(head_t.weight.dtype),
        head_t=head_t,
        pred_scale=_scalar(pred_scale, like),
        kl_scale=_scalar(kl_scale if head_t is not None else 0.0, like),
        temperature=float(temperature) if head_t is not None else 1.0,
        vocab=vocab,
        chunk_tokens=chunk_tokens or default_chunk_tokens(len(like), vocab, like, head_t is not None),
        with_gradient=torch.is_grad_enabled(),
    )
    result: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    result = _LinearCrossEntropyKL.apply(like, head_s.weight, head_s.bias, problem)
    return result


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
    chunk = chunk_tokens or default_chunk_tokens(len(hidden), vocab, hidden, False)
    form = Form.of(head.softcap, head.scale, 1.0)
    logits = hidden.new_empty(min(chunk, len(hidden)), vocab)
    scratch = Scratch(block_rows(len(logits), vocab, hidden.device), vocab, hidden)
    nll, greedy = [], []
    for rows in _chunks(len(hidden), chunk):
        x = _gemm_logits(hidden[rows], head, form, logits)
        ce, best = scores(x, targets[rows].clamp_min(0), form, scratch)
        predicted = weights_of(targets[rows], torch.bool)
        nll.append(ce.masked_fill_(~predicted, 0.0))
        greedy.append(best & predicted)
    return torch.cat(nll), torch.cat(greedy)


def default_chunk_tokens(tokens: int, vocab: int, like: torch.Tensor, with_teacher: bool) -> int:
    """Equal chunks, at least two, as few as `_CHUNK_BYTES` and `_MIN_CHUNK_TOKENS` allow.

    Buffers: the GEMMs' outputs, and off the CPU four more in float32, for whole chunks are one block there.
    """
    logits_bytes = vocab * like.element_size() * (1 + with_teacher)
    scratch_bytes = 0 if like.device.type == "cpu" else vocab * 4 * 4
    limit = _CHUNK_BYTES.get(like.device.type, _CHUNK_BYTES["cuda"])
    most = max(_MIN_CHUNK_TOKENS, limit // (logits_bytes + scratch_bytes))
    chunks = max(2, -(-tokens // most))
    return max(1, -(-tokens // chunks))


@dataclass(frozen=True)
class _Problem:
    """What the autograd function needs beside the three tensors that it is differentiable in."""

    head_s: Head
    targets: torch.Tensor
    hidden_t: torch.Tensor | None
    head_t: Head | None
    pred_scale: torch.Tensor
    kl_scale: torch.Tensor
    temperature: float
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
        scaled = [None if g is None else g.mul_(factor).to(dtype) for g, dtype in zip(tensors, ctx.dtypes, strict=True)]
        return (*scaled, None)


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
            torch.mm(d_logits, weight[: self.vocab], out=out).mul_(counts[:, None].to(out.dtype))
        if self.weight is not None:
            counted = hidden * counts[:, None].to(hidden.dtype)
            # The first chunk writes: nothing reads, and nothing had to zero, [V, D] before.
            _add_product(self.weight[: self.vocab], d_logits.t(), counted, first=rows.start == 0)
        if self.bias is not None:
            self.bias[: self.vocab].add_(torch.mv(d_logits.t(), counts.to(d_logits.dtype)))


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, first: bool) -> None:
    """total (+)= a @ b; where total is wider than a and b, the product is rounded once a chunk, the sum is not."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=0.0 if first else 1.0)
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
    logits_s = hidden.new_empty(chunk, vocab)
    logits_t = None if hidden_t is None else hidden_t.new_empty(chunk, vocab)
    forms = tuple(Form.of(h.softcap, h.scale, problem.temperature) for h in (head_s, head_t or head_s))
    sums = torch.zeros(2, dtype=dtype, device=hidden.device)
    for rows in _chunks(len(hidden), chunk):
        x_s = _gemm_logits(hidden[rows], head_s, forms[0], logits_s)
        x_t = None
        if hidden_t is not None and head_t is not None and logits_t is not None:
            x_t = _gemm_logits(hidden_t[rows], head_t, forms[1], logits_t)
        targets = problem.targets[rows]
        losses = losses_and_gradient(
            x_s, x_t, targets.clamp_min(0), (forms[0], forms[1]), problem.temperature, mixture, scratch
        )
        counts = weights_of(targets, dtype)
        sums += torch.stack(losses) @ counts
        gradients.add_chunk(rows, x_s, hidden[rows], head_s.weight, counts)
    pred_sum, kl_sum = sums.unbind()
    return pred_sum.clone(), kl_sum.clone()


def _gemm_logits(hidden: torch.Tensor, head: Head, form: Form, out: torch.Tensor) -> torch.Tensor:
    """gemm_scale * (hidden W^T + b) into the first rows of `out` [C, V]; V may be below the head's."""
    out, weight = out[: len(hidden)], head.weight[: out.shape[1]]
    if head.bias is None:
        return out.addmm_(hidden, weight.t(), beta=0.0, alpha=form.gemm_scale)
    scale = form.gemm_scale
    return torch.addmm(head.bias[: len(weight)], hidden, weight.t(), beta=scale, alpha=scale, out=out)


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
