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
            self.input_ids.to(device, non_blocking=True),
            self.targets.to(device, non_blocking=True),
            None if mask is None else mask.to(device, non_blocking=True),
        )

    def counts(self) -> torch.Tensor:
        """[2] int64 on the batch's device: predicted targets, real tokens."""
        mask = self.attention_mask
        real = torch.tensor(self.input_ids.numel()) if mask is None else mask.sum()
        return torch.stack([(self.targets != IGNORED).sum(), real.to(self.targets.device)])
