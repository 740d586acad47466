"""A micro-batch, and the counts of the global batch by which losses are divided."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

IGNORED = -100
"""The target of a position or row that is not predicted (torch's own `ignore_index`)."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    input_ids: [B, S] int64.
    targets: what is predicted. Causal LM: [B, S] int64, the id that each position predicts (already shifted),
        or `IGNORED`. Classification: [B] int64, the label's number, or `IGNORED`. Regression: [B] float32, nan
        for a row without a target. Question answering: [B] int64, the position where the answer starts.
    attention_mask: [B, S] int64, 1 on real tokens; None if all positions are real.
    token_type_ids: [B, S] int64, 0 in the first text and 1 in the second, or None.
    ends: only question answering, [B] int64: the position of the answer's last token. A position beyond the
        sequence is not predicted.
    own: only held-out text, [B, S] bool: false if the target is the token that ends a document, not one of its own;
        None if that is not known.
    rows: [B] int64: the number of each row within its split, -1 for a filler; always on the CPU.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    attention_mask: torch.Tensor | None = None
    token_type_ids: torch.Tensor | None = None
    ends: torch.Tensor | None = None
    own: torch.Tensor | None = None
    rows: torch.Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`, except `rows`, which the host reads; the copy does not block the host."""
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "rows"}
        return replace(self, **{name: on_device(t, device) for name, t in given.items() if t is not None})

    def copies(self, count: int) -> Batch:
        """Its rows `count` times, one copy after another."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: torch.cat([t] * count) for name, t in given.items() if t is not None})


class BatchCounts:
    """The numbers that losses are divided by, of the *global* batch, so that a step does not depend on how it is split.

    values: [5] int64: targets (predicted tokens, labelled rows, or answer starts), ends (answer ends), rows,
    tokens (real ones), positions (with padding). Each is also an attribute, a scalar on the device.
    """

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values
        self.targets, self.ends, self.rows, self.tokens, self.positions = values.unbind()

    @staticmethod
    def of(batch: Batch) -> BatchCounts:
        """The counts of one batch."""
        ids, targets, mask = batch.input_ids, batch.targets, batch.attention_mask
        ends = targets.new_zeros((), dtype=torch.int64)
        if batch.ends is not None:
            predicted, ends = ((p < ids.shape[1]).sum() for p in (targets, batch.ends))
        else:
            predicted = (~targets.isnan() if targets.is_floating_point() else targets != IGNORED).sum()
        rows, positions = (torch.full_like(predicted, count) for count in (len(ids), ids.numel()))
        return BatchCounts(torch.stack([predicted, ends, rows, positions if mask is None else mask.sum(), positions]))


def on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` on `device`. To CUDA it goes from pinned memory, as another copy would wait for the device."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
