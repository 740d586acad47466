"""Every loss in plain autograd torch: the specification that the fused functions are tested against.

These hold [N, V] tensors; training calls the functions beside this file instead.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ted_ds.batch import IGNORED
from ted_ds.config.choices import Divergence
from ted_ds.ops.divergence import DIVERGENCES, kl_rows


def soft_capped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """`softcap * tanh(logits / softcap)` (Gemma 2), or the logits themselves if softcap is None."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def cross_entropy_sum(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum over predicted tokens of -log softmax(logits)[target]; logits [N, V], targets [N] int64."""
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


def kl_sum(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    divergence: Divergence = "forward",
) -> torch.Tensor:
    """T^2 * sum over predicted tokens of KL(softmax(z_t / T) || softmax(z_s / T)) (arXiv 2210.01351, 2.2).

    student_logits, teacher_logits: [N, V]; targets: [N] int64, whose `IGNORED` rows do not count.
    divergence: another one in the KL's place.
    """
    log_q = F.log_softmax(student_logits / temperature, dim=-1)
    log_p = F.log_softmax(teacher_logits / temperature, dim=-1)
    rows = DIVERGENCES[divergence].reference(log_p, log_q)
    return temperature**2 * (rows * (targets != IGNORED)).sum()


def top_k_kl_sum(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, targets: torch.Tensor, temperature: float, k: int
) -> torch.Tensor:
    """`kl_sum` over k + 1 events: the teacher's k likeliest ids, and all the others as one."""
    log_q, log_p = (F.log_softmax(z / temperature, dim=-1) for z in (student_logits, teacher_logits))
    top = log_p.topk(k).indices
    log_q, log_p = (
        torch.cat([x.gather(1, top), x.scatter(1, top, -torch.inf).logsumexp(-1, keepdim=True)], dim=1)
        for x in (log_q, log_p)
    )
    return temperature**2 * (kl_rows(log_p, log_q) * (targets != IGNORED)).sum()
