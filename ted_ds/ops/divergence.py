"""Divergences between a teacher's and a student's next-token distributions, a few rows at a time, in place.

With q = softmax(y_s), p = softmax(y_t) and y = logits / T, each class gives its value and its gradient with respect to
y_s, and `reference`, the same in plain torch. The caller owns the buffers, because fresh memory pages cost more than
the math. A new divergence needs its name in `ted_ds.config.choices`, a class and an entry in `DIVERGENCES` here, and
its terms in `logit_kernels`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from ted_ds.config.choices import Divergence


@dataclass(frozen=True)
class TopK:
    """A teacher's k likeliest ids of each position, and what is left for all others together.

    ids: [N, k] int32 or int64, none twice in a row. log_probs: [N, k] log softmax(z_t / T) at them. log_rest: [N]
    log of the probability of all other ids, -inf if k is the whole vocabulary.
    """

    ids: torch.Tensor
    log_probs: torch.Tensor
    log_rest: torch.Tensor

    def rows(self, rows: slice | torch.Tensor) -> TopK:
        """These positions' alone."""
        return TopK(self.ids[rows], self.log_probs[rows], self.log_rest[rows])


def top_k_of(y: torch.Tensor, k: int) -> TopK:
    """The TopK of y [R, V]; y is spoilt. The rest is summed by itself: 1 minus the others would be rounding."""
    values, ids = y.topk(min(k, y.shape[-1]), dim=-1)
    rest = y.scatter_(1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    whole = torch.logaddexp(values.logsumexp(-1, keepdim=True), rest)
    return TopK(ids, values - whole, (rest - whole)[:, 0])


Buffer = Callable[[str, int], torch.Tensor]
"""(name, R) -> a buffer [R, V] of the caller's, kept for the whole call."""


class RowDivergence(Protocol):
    """A divergence of a few rows."""

    def value(self, q: torch.Tensor, lse_s: torch.Tensor) -> torch.Tensor:
        """[R, 1]; q [R, V] = softmax(y_s), lse_s [R, 1] the log-sum-exp of y_s."""
        ...

    def gradient(self, q: torch.Tensor) -> torch.Tensor:
        """[R, V], with respect to y_s; call it after `value`."""
        ...


class ForwardKL:
    """KL(p || q) = sum p (y_t - y_s) - lse(y_t) + lse(y_s); gradient q - p."""

    def __init__(
        self, y_s: torch.Tensor, y_t: torch.Tensor, p: torch.Tensor, lse_t: torch.Tensor, buffer: Buffer
    ) -> None:
        self._p, self._lse_t = p, lse_t
        self._cross = y_t.sub_(y_s).mul_(p).sum(-1, keepdim=True)

    def value(self, q: torch.Tensor, lse_s: torch.Tensor) -> torch.Tensor:
        """[R, 1]."""
        return self._cross - self._lse_t + lse_s

    def gradient(self, q: torch.Tensor) -> torch.Tensor:
        """[R, V], in p's buffer."""
        return torch.sub(q, self._p, out=self._p)

    @staticmethod
    def reference(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        """[R] of log-probabilities [R, V]."""
        return kl_rows(log_p, log_q)


class ReverseKL:
    """KL(q || p) = E - lse(y_s) + lse(y_t) with E = sum q (y_s - y_t); gradient q (y_s - y_t - E)."""

    def __init__(
        self, y_s: torch.Tensor, y_t: torch.Tensor, p: torch.Tensor, lse_t: torch.Tensor, buffer: Buffer
    ) -> None:
        self._work, self._lse_t = p, lse_t
        self._apart = y_t.sub_(y_s).neg_()

    def value(self, q: torch.Tensor, lse_s: torch.Tensor) -> torch.Tensor:
        """[R, 1]."""
        self._mean = torch.mul(q, self._apart, out=self._work).sum(-1, keepdim=True)
        return self._mean - lse_s + self._lse_t

    def gradient(self, q: torch.Tensor) -> torch.Tensor:
        """[R, V], in p's buffer."""
        return torch.sub(self._apart, self._mean, out=self._work).mul_(q)

    @staticmethod
    def reference(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        """[R] of log-probabilities [R, V]."""
        return kl_rows(log_q, log_p)


class JensenShannon:
    """(KL(p || m) + KL(q || m)) / 2, m = (p + q) / 2; gradient q (log(q / m) - KL(q || m)) / 2."""

    def __init__(
        self, y_s: torch.Tensor, y_t: torch.Tensor, p: torch.Tensor, lse_t: torch.Tensor, buffer: Buffer
    ) -> None:
        self._p, self._log_p = p, y_t.sub_(lse_t)
        self._log_q = buffer("log_q", len(y_s)).copy_(y_s)  # y_s becomes q

    def value(self, q: torch.Tensor, lse_s: torch.Tensor) -> torch.Tensor:
        """[R, 1]."""
        p, log_p, log_q = self._p, self._log_p, self._log_q.sub_(lse_s)
        # log m = log p + log((1 + q / p) / 2) from the logarithms: m itself underflows where both are tiny
        log_m = torch.logaddexp(log_p, log_q).sub_(_LOG_2)
        kl_p = log_p.sub_(log_m).mul_(p).sum(-1, keepdim=True)
        torch.mul(log_q.sub_(log_m), q, out=p)
        self._kl_q = p.sum(-1, keepdim=True)
        return (kl_p + self._kl_q).mul_(0.5)

    def gradient(self, q: torch.Tensor) -> torch.Tensor:
        """[R, V], in p's buffer."""
        return torch.sub(self._log_q, self._kl_q, out=self._p).mul_(q).mul_(0.5)

    @staticmethod
    def reference(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        """[R] of log-probabilities [R, V]."""
        log_m = torch.logaddexp(log_p, log_q) - _LOG_2
        return (kl_rows(log_p, log_m) + kl_rows(log_q, log_m)) / 2


DIVERGENCES: dict[Divergence, type[ForwardKL] | type[ReverseKL] | type[JensenShannon]] = {
    "forward": ForwardKL,
    "reverse": ReverseKL,
    "jensen-shannon": JensenShannon,
}

_LOG_2 = math.log(2.0)


class TopKForwardKL:
    """KL(p || q) over the teacher's top k and one event "any other id", whose probabilities are exact on both sides.

    It is the KL with a teacher to whom the other ids are as likely, relative to each other, as to the student: that
    is p, and the gradient q - p.
    """

    def __init__(self, y_s: torch.Tensor, teacher: TopK, p: torch.Tensor) -> None:
        ids = teacher.ids.long()
        self._p = p
        self._log_top, self._log_rest = teacher.log_probs.to(y_s.dtype), teacher.log_rest.to(y_s.dtype)[:, None]
        self._y_top = y_s.gather(1, ids)
        if ids.shape[1] < y_s.shape[1]:
            self._lse_others = softmax_into(p, y_s.scatter_(1, ids, -torch.inf))
            y_s.scatter_(1, ids, self._y_top)
        else:
            self._lse_others = torch.zeros_like(self._log_rest)  # of no ids; the teacher gives them nothing
        p.mul_(self._log_rest.exp()).scatter_(1, ids, self._log_top.exp())

    def value(self, q: torch.Tensor, lse_s: torch.Tensor) -> torch.Tensor:
        """[R, 1]."""
        top = (self._log_top.exp() * (self._log_top - self._y_top + lse_s)).sum(-1, keepdim=True)
        rest = self._log_rest.exp() * (self._log_rest - self._lse_others + lse_s)
        return top + torch.where(self._log_rest.isneginf(), 0.0, rest)

    def gradient(self, q: torch.Tensor) -> torch.Tensor:
        """[R, V], in p's buffer."""
        return torch.sub(q, self._p, out=self._p)


def softmax_into(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """softmax(y) into `out` (may be y); returns log-sum-exp(y) [R, 1].

    The largest probability is 1 / sum exp(y - max), so two maxima give the log-sum-exp without an exp.
    """
    largest = y.amax(-1, keepdim=True)
    torch.softmax(y, -1, out=out)
    return largest - out.amax(-1, keepdim=True).log_()


def kl_rows(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of each row, [R], in plain autograd torch."""
    return torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
