"""Cross-entropy and KL from hidden states and LM heads, in chunks of tokens: [N, V] is never whole.

Four GEMMs in all: student logits, teacher logits, d_hidden, d_weight. The gradients are computed in the
forward, while a chunk's logits are at hand; backward multiplies them by the upstream gradient. The GEMMs
and the chunks are here, the math between them in `logit_rows` and, on CUDA, `logit_kernels`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ted_ds.batch import IGNORED
from ted_ds.config.choices import Divergence
from ted_ds.ops import dispatch
from ted_ds.ops.divergence import TopK, top_k_of
from ted_ds.ops.logit_gemms import (
    Head,
    add_product,
    chunks_of,
    common_vocab,
    default_chunk_tokens,
    even_parts,
    gemm_logits,
    logits_buffer,
)
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
    head_s.weight and head_s.bias, once; the two sums are detached. All are scalars, float32 (float64 if
    the inputs are).

    hidden_s: [N, D_s]; hidden_t: [N, D_t], a constant, or None (then kl_sum is 0); targets: [N] int64.
    pred_scale, kl_scale: constants, numbers or scalar tensors on the device, which are never read back.
    divergence: what stands in the KL's place, see `Divergence`; its sum is kl_sum.
    top_k: the KL is that over the teacher's k likeliest ids of each token and the event "any other id" (`TopK`); as
        a TopK, what was recorded of a teacher at this temperature, in place of hidden_t and head_t.
    vocab_size: so many rows of both heads take part (padded vocabularies of one tokenizer); None: the smaller head's.
        The other rows' gradients are zero.
    chunk_tokens: tokens whose logits are alive at a time; None: see `default_chunk_tokens`.

    On a CPU, rows without a target go before the GEMMs. On CUDA the host would have to wait for their number.
    Hidden states are cast to their head's dtype. GEMMs run in that dtype, the rest in float32 or wider; d_weight is
    summed over chunks in float32. Memory: two chunks of logits, and the gradients of hidden_s, weight and bias that are
    needed. Raises ValueError if shapes do not fit, or for a top k of another divergence than the forward KL.
    """
    _check(hidden_s, targets, hidden_t, head_t, top_k, divergence)
    vocab = common_vocab(head_s, head_t, vocab_size)
    if targets.device.type == "cpu" and (kept := _predicted_rows(targets)) is not None:
        hidden_s, targets, hidden_t, top_k = _chosen(kept, hidden_s, targets, hidden_t, top_k)
    like = hidden_s.to(head_s.weight.dtype)
    taught = head_t is not None or isinstance(top_k, TopK)
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


def _predicted_rows(targets: torch.Tensor) -> torch.Tensor | None:
    """The rows [n] that have a target; None if that is all of them, or none. The host waits for their number."""
    kept = (targets != IGNORED).nonzero()[:, 0]
    return kept if 0 < len(kept) < len(targets) else None


def _chosen(rows: torch.Tensor, *given: Any) -> tuple[Any, ...]:
    """These rows of tensors and TopKs; anything else as it is."""
    return tuple(x[rows] if isinstance(x, torch.Tensor) else x.rows(rows) if isinstance(x, TopK) else x for x in given)


def _check(
    hidden_s: torch.Tensor,
    targets: torch.Tensor,
    hidden_t: torch.Tensor | None,
    head_t: Head | None,
    top_k: int | TopK | None,
    divergence: Divergence,
) -> None:
    if top_k is not None and divergence != "forward":
        raise ValueError(f"linear_cross_entropy_kl: top_k is for the forward KL, divergence is {divergence!r}")
    if (hidden_t is None) != (head_t is None):
        raise ValueError("linear_cross_entropy_kl: hidden_t and head_t come together; give both or neither")
    recorded = top_k if isinstance(top_k, TopK) else None
    if recorded is not None and hidden_t is not None:
        raise ValueError("linear_cross_entropy_kl: a recorded TopK stands for hidden_t and head_t; give one of them")
    given = (hidden_s, targets, hidden_t, recorded.ids if recorded else None)
    lengths = {len(t) for t in given if t is not None}
    if len(lengths) != 1:
        raise ValueError(f"linear_cross_entropy_kl: hidden_s, targets and the teacher's differ in length: {lengths}")


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
    """What `linear_cross_entropy_kl` needs of a teacher if `top_k` is k, without gradients.

    hidden_t: [N, D]. Returns ids [N, k] int32 and log-probabilities in float32 (float64 for float64 heads).
    vocab_size and chunk_tokens: see `linear_cross_entropy_kl`.
    """
    vocab = common_vocab(head_t, None, vocab_size)
    hidden = hidden_t.to(head_t.weight.dtype)
    chunk = chunk_tokens or default_chunk_tokens(len(hidden), vocab, hidden, sides=1, widened=True)
    form = Form.of(head_t.softcap, head_t.scale, float(temperature))
    logits = logits_buffer(hidden, min(chunk, len(hidden)), vocab)
    found = [_top_k(gemm_logits(hidden[rows], head_t, form, logits), form, k) for rows in chunks_of(len(hidden), chunk)]
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
    False if the target is -100. Those rows cost nothing, but the host waits for the number of the others.
    vocab_size and chunk_tokens: see `linear_cross_entropy_kl`.
    """
    kept = _predicted_rows(targets)
    if kept is not None:
        own = token_scores(hidden[kept], head, targets[kept], vocab_size=vocab_size, chunk_tokens=chunk_tokens)
        nll, greedy = (torch.zeros(len(targets), dtype=t.dtype, device=t.device) for t in own)
        return nll.index_copy_(0, kept, own[0]), greedy.index_copy_(0, kept, own[1])
    vocab = common_vocab(head, None, vocab_size)
    hidden = hidden.to(head.weight.dtype)
    chunk = chunk_tokens or default_chunk_tokens(len(hidden), vocab, hidden, sides=1, widened=True)
    form = Form.of(head.softcap, head.scale, 1.0)
    logits = logits_buffer(hidden, min(chunk, len(hidden)), vocab)
    scratch = Scratch(block_rows(len(logits), vocab, hidden.device), vocab, hidden)
    nlls, greedies = [], []
    for rows in chunks_of(len(hidden), chunk):
        x = gemm_logits(hidden[rows], head, form, logits)
        ce, best = scores(x, targets[rows].clamp_min(0), form, scratch)
        predicted = weights_of(targets[rows], torch.bool)
        nlls.append(ce.masked_fill_(~predicted, 0.0))
        greedies.append(best & predicted)
    return torch.cat(nlls), torch.cat(greedies)


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
    """Gradients up to a common factor: of hidden [N, D], weight [V, D], bias [V]; None if not needed."""

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
            for columns in even_parts(d_logits):
                out.addmm_(d_logits[:, columns], weight[columns], beta=float(columns.start > 0))
            out.mul_(counts[:, None].to(out.dtype))
        if self.weight is not None:
            counted = hidden * counts[:, None].to(hidden.dtype)
            # The first chunk writes: nothing reads, and nothing had to zero, [V, D] before.
            for columns in even_parts(d_logits):
                add_product(self.weight[columns], d_logits[:, columns].t(), counted, first=rows.start == 0)
        if self.bias is not None:
            self.bias[: self.vocab].add_(torch.mv(d_logits.t(), counts.to(d_logits.dtype)))


def _run_chunks(
    hidden: torch.Tensor, problem: _Problem, mixture: Mixture | None, gradients: _Gradients
) -> tuple[torch.Tensor, torch.Tensor]:
    """The chunk loop: logits, the math between, gradient GEMMs. Returns the CE sum and the KL sum."""
    head_s, head_t, hidden_t = problem.head_s, problem.head_t, problem.hidden_t
    vocab, chunk = problem.vocab, min(problem.chunk_tokens, len(hidden))
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    scratch = Scratch(block_rows(chunk, vocab, hidden.device), vocab, hidden)
    logits_s = logits_buffer(hidden, chunk, vocab)
    logits_t = None if hidden_t is None else logits_buffer(hidden_t, chunk, vocab)
    forms = (
        Form.of(head_s.softcap, head_s.scale, problem.temperature),
        Form.of(*((head_t.softcap, head_t.scale) if head_t else (None, 1.0)), problem.temperature),
    )
    sums = torch.zeros(2, dtype=dtype, device=hidden.device)
    for rows in chunks_of(len(hidden), chunk):
        x_s = gemm_logits(hidden[rows], head_s, forms[0], logits_s)
        teacher: torch.Tensor | TopK | None = None
        if hidden_t is not None and head_t is not None and logits_t is not None:
            teacher = gemm_logits(hidden_t[rows], head_t, forms[1], logits_t)
            if isinstance(problem.top_k, int):
                teacher = _top_k(teacher, forms[1], problem.top_k)
        elif isinstance(problem.top_k, TopK):
            teacher = problem.top_k.rows(rows)
        targets = problem.targets[rows]
        between = (x_s, teacher, targets.clamp_min(0), forms, problem.temperature, problem.divergence, mixture)
        losses = _in_one_kernel(*between) if dispatch.has_kernel(x_s) else losses_and_gradient(*between, scratch)
        counts = weights_of(targets, dtype)
        sums += torch.stack(losses) @ counts
        gradients.add_chunk(rows, x_s, hidden[rows], head_s.weight, counts)
    pred_sum, kl_sum = sums.unbind()
    return pred_sum.clone(), kl_sum.clone()


def _in_one_kernel(*between: Any) -> tuple[torch.Tensor, torch.Tensor]:
    from ted_ds.ops.logit_kernels import fused_losses_and_gradient  # torch on a CPU comes without triton

    return fused_losses_and_gradient(*between)


def _scalar(value: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor:
    """A 0-dimensional tensor on like's device, float32 or wider; a number is filled in there, not copied."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    if isinstance(value, torch.Tensor):
        return value.detach().to(like.device, dtype, non_blocking=True).reshape(())
    return torch.full((), value, dtype=dtype, device=like.device)
