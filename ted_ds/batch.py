"""The unit that travels from the data to the losses."""

from __future__ import annotations

from dataclasses import dataclass

import torch

IGNORED = -100
"""The target of a position that is not predicted (torch's own `ignore_index`)."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch of a causal language model.

    input_ids: [B, S] int64.
    targets: [B, S] int64. `targets[b, s]` is the id that position s predicts (already shifted),
        or `IGNORED`.
    attention_mask: [B, S] int64, 1 on real tokens, or None where every position is real.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    attention_mask: torch.Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`; the copy does not block the host."""
        mask = self.attention_mask
        return Batch(
            on_device(self.input_ids, device),
            on_device(self.targets, device),
            None if mask is None else on_device(mask, device),
        )

    def counts(self) -> torch.Tensor:
        """[2] int64 on the batch's device: predicted targets, real tokens."""
        mask = self.attention_mask
        predicted = (self.targets != IGNORED).sum()
        real = torch.full_like(predicted, self.input_ids.numel()) if mask is None else mask.sum()
        return torch.stack([predicted, real])


def on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` on `device`; from pinned memory where that is CUDA, since any other copy would wait for the device."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
