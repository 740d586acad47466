"""Readouts: how a task reads a model, and in ZeRO-3's terms, where the weights of its head are whole."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import masking_utils

from ted_ds.batch import Batch
from ted_ds.models.structure import LMStructure
from ted_ds.ops import Head

T = TypeVar("T")


class Readout(nn.Module):
    """How a task reads a model: `read` runs it, the forward hands over what `read` gave, with weights at hand."""

    def read(self, batch: Batch) -> torch.Tensor:
        """What the task's losses start from."""
        raise NotImplementedError


class LogitHead(Readout):
    """A causal LM read up to its last hidden state, and its LM head, which shares the model's parameters.

    The fused losses need the head's weight itself, not the module's output. Under ZeRO-3 a weight is whole
    only inside the forward of a module that owns it; hence this owner of shared (tied) parameters.
    """

    def __init__(self, structure: LMStructure) -> None:
        super().__init__()
        self.weight = structure.lm_head.weight
        self.bias = structure.lm_head.bias
        self._softcap, self._scale = structure.logit_softcap, structure.logit_scale
        self._backbone = (structure.backbone,)  # a tuple: it belongs to the model
        backbone: Any = structure.backbone
        # GPT-2 reads ids back to warn of padding without a mask; a causal LM's rows have none
        backbone.warn_if_padding_and_no_attention_mask = _no_warning

    def read(self, batch: Batch) -> torch.Tensor:
        """[B, S, D] hidden states after the final norm, without logits and without a key-value cache."""
        with _no_packed_positions():
            output = self._backbone[0](
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, return_dict=True
            )
        hidden: torch.Tensor = output.last_hidden_state
        return hidden

    def forward(self, output: torch.Tensor, *, use: Callable[[torch.Tensor, Head], T]) -> T:
        """`use(output, head)` with `head.weight` [V, D] whole; output: of `read`."""
        return use(output, Head(self.weight, self.bias, softcap=self._softcap, scale=self._scale))


def _no_warning(*arguments: Any) -> None:
    pass


@contextmanager
def _no_packed_positions() -> Iterator[None]:
    """Spares a wait for the device in every forward.

    Without a mask transformers reads back whether position ids start anew within a row; they never do here, the model
    makes them itself.
    """
    search = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = search


class TaskReadout(Readout):
    """A model with a small task head, read up to its logits.

    order: for each label of the data the model's own number of it; None if they are the same.
    """

    def __init__(self, model: Any, order: Sequence[int] | None = None) -> None:
        super().__init__()
        self._model = (model,)  # a tuple: the engine finds the model's parameters once, under its own name
        typed = "token_type_ids" in inspect.signature(model.forward).parameters
        self._typed = typed and (getattr(model.config, "type_vocab_size", None) or 0) > 1
        self.order: torch.Tensor | None
        self.register_buffer("order", None if order is None else torch.tensor(order), persistent=False)

    def read(self, batch: Batch) -> torch.Tensor:
        """[B, C] logits in the data's order of labels; of a question answerer [B, 2, S], starts and ends."""
        types = {"token_type_ids": batch.token_type_ids} if self._typed else {}
        output = self._model[0](input_ids=batch.input_ids, attention_mask=batch.attention_mask, **types)
        if "start_logits" in output:
            return torch.stack([output.start_logits, output.end_logits], dim=1)
        logits: torch.Tensor = output.logits
        if self.order is None:
            return logits
        if self.order.device != logits.device:  # ZeRO-3 leaves buffers that it did not make where they are
            self.order = self.order.to(logits.device)
        return logits.index_select(-1, self.order)

    def forward(self, output: torch.Tensor, *, use: Callable[[torch.Tensor, None], T]) -> T:
        """`use(output, None)`: these logits need no weight any more; output: of `read`."""
        return use(output, None)
