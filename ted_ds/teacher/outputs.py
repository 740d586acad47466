"""What is kept of a teacher's output for the KL, one class for each way of keeping it."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from ted_ds.models.loading import DTYPES
from ted_ds.models.structure import LMStructure
from ted_ds.ops import Head, TopK, teacher_top_k
from ted_ds.teacher.cache_layout import Field


class CachedOutput(Protocol):
    """A way of keeping what `FrozenModel.stream` hands to `use_output`."""

    @property
    def fields(self) -> dict[str, Field]:
        """What is recorded."""
        ...

    @property
    def settings(self) -> dict[str, float]:
        """What it was computed with, beyond the teacher."""
        ...

    @property
    def head(self) -> dict[str, float | None] | None:
        """Softcap, scale and bytes of the teacher's LM head, where the losses need it."""
        ...

    def record(self, output: torch.Tensor, head: Head | None) -> dict[str, torch.Tensor]:
        """The fields of a batch, [B, S, width] or, of those per row, [B, width]."""
        ...

    def restore(self, values: dict[str, torch.Tensor]) -> Any:
        """What the task's losses read in place of the output, from what `record` gave."""
        ...


class LastHiddenStates:
    """A causal LM's hidden states after its final norm, [B, S, D]: with its LM head they give the live losses."""

    def __init__(self, structure: LMStructure, dtype: str) -> None:
        self.fields = {"hidden": Field(dtype, structure.width)}
        self.settings: dict[str, float] = {}
        numbers = structure.vocab_rows * (structure.width + (structure.lm_head.bias is not None))
        self.head: dict[str, float | None] = {
            "softcap": structure.logit_softcap,
            "scale": structure.logit_scale,
            "bytes": numbers * DTYPES[dtype].itemsize,
        }

    def record(self, output: torch.Tensor, head: Head | None) -> dict[str, torch.Tensor]:
        """As they are."""
        return {"hidden": output}

    def restore(self, values: dict[str, torch.Tensor]) -> torch.Tensor:
        """[B, S, D]."""
        return values["hidden"]


class RowLogits:
    """Logits of whole rows, [B, C]."""

    head = None

    def __init__(self, count: int, dtype: str) -> None:
        self.settings: dict[str, float] = {}
        self.fields = {"logits": Field(dtype, count, per_row=True)}

    def record(self, output: torch.Tensor, head: Head | None) -> dict[str, torch.Tensor]:
        """As they are."""
        return {"logits": output}

    def restore(self, values: dict[str, torch.Tensor]) -> torch.Tensor:
        """[B, C]."""
        return values["logits"]


class SpanLogits:
    """A question's logits of starts and ends, [B, 2, S]; 0 at padding, which is given probability 0 later."""

    head = None

    def __init__(self, dtype: str) -> None:
        self.settings: dict[str, float] = {}
        self.fields = {"logits": Field(dtype, 2)}

    def record(self, output: torch.Tensor, head: Head | None) -> dict[str, torch.Tensor]:
        """By token."""
        return {"logits": output.transpose(1, 2)}

    def restore(self, values: dict[str, torch.Tensor]) -> torch.Tensor:
        """[B, 2, S]."""
        return values["logits"].transpose(1, 2)


class TopLogits:
    """A causal LM's k likeliest ids of each token, their log-probabilities at the temperature, and that of the rest."""

    head = None

    def __init__(self, k: int, temperature: float, vocab_size: int) -> None:
        k = min(k, vocab_size)
        self._k, self._temperature, self._vocab_size = k, temperature, vocab_size
        self.settings: dict[str, float] = {"loss.temperature": temperature, "vocab_size": vocab_size}
        self.fields = {
            "top_ids": Field("int32", k),
            "top_log_probs": Field("float16", k),
            "top_log_rest": Field("float32", 1),
        }

    def record(self, output: torch.Tensor, head: Head | None) -> dict[str, torch.Tensor]:
        """From the last hidden states [B, S, D] and the LM head."""
        assert head is not None
        top = teacher_top_k(
            output.flatten(0, -2),
            head,
            self._k,
            temperature=self._temperature,
            vocab_size=self._vocab_size,
        )
        shape = output.shape[:-1]
        return {
            "top_ids": top.ids.view(*shape, self._k),
            "top_log_probs": top.log_probs.view(*shape, self._k),
            "top_log_rest": top.log_rest.view(*shape, 1),
        }

    def restore(self, values: dict[str, torch.Tensor]) -> TopK:
        """Of [B * S] tokens."""
        ids, log_probs = (values[name].flatten(0, 1) for name in ("top_ids", "top_log_probs"))
        return TopK(ids, log_probs.float(), values["top_log_rest"].flatten())
