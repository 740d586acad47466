"""Every loss in plain autograd torch: the specification that the fused functions are tested against.

These hold [N, V] tensors; training calls the functions beside this file instead.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ted_ds.batch import IGNORED


def soft_capped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """`softcap * tanh(logits / softcap)` (Gemma 2), or the logits themselves where softcap is None."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def cross_entropy_sum(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum over predicted tokens of -log softmax(logits)[target]; logits [N, V], targets [N] int64."""
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


def kl_sum(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, targets: torch.Tensor, temperature: float
) -> torch.Tensor:
    """T^2 * sum over predicted tokens of KL(softmax(z_t / T) || softmax(z_s / T)) (arXiv 2210.01351, 2.2).

    student_logits, teacher_logits: [N, V]; targets: [N] int64, whose `IGNORED` rows do not count.
    """
    log_p_student = F.log_softmax(student_logits / temperature, dim=-1)
    log_p_teacher = F.log_softmax(teacher_logits / temperature, dim=-1)
    kl = F.kl_div(log_p_student, log_p_teacher, reduction="none", log_target=True).sum(-1)
    return temperature**2 * (kl * (targets != IGNORED)).sum()


def squared_error_sum(
    filtered_student: torch.Tensor, filtered_teacher: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum of (filtered_student - filtered_teacher)^2 over unmasked tokens; both [.., F], mask [..]."""
    squared = (filtered_student - filtered_teacher).square()
    return squared.sum() if mask is None else (squared * mask.unsqueeze(-1)).sum()
