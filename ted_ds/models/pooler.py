"""How a family turns the hidden states of a sequence into the vector that its classifier reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_layers import GenericForSequenceClassification

from ted_ds.errors import ModelError
from ted_ds.models.filters import fresh_linear

Token = Literal["first", "mean", "last"]


@dataclass(frozen=True)
class PoolerPlan:
    """token -> dropout_before -> [Linear -> activation [-> LayerNorm]] -> dropout_after, then the classifier.

    token: which real token's state is taken, or their mean. activation: None leaves out the dense layer and
    the norm. norm_epsilon: None if there is no norm. bias, norm_bias: of the dense layer and the norm.
    """

    token: Token
    activation: str | None
    dropout_before: float
    dropout_after: float
    bias: bool = True
    norm_epsilon: float | None = None
    norm_bias: bool = True

    def tensors(self, width: int) -> dict[str, nn.Parameter]:
        """Fresh parameters of a pooler of `width` channels, drawn as `nn.Linear` draws them; norms start at 1."""
        if self.activation is None:
            return {}
        weight, bias = fresh_linear(width, width)
        tensors = {"pooler_weight": weight} | ({"pooler_bias": bias} if self.bias else {})
        if self.norm_epsilon is not None:
            tensors["norm_weight"] = nn.Parameter(torch.ones(width))
            if self.norm_bias:
                tensors["norm_bias"] = nn.Parameter(torch.zeros(width))
        return tensors

    def select(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The state [B, 1, D] at `token`, or for a mean all states [B, S, D]; hidden [B, S, D], mask [B, S] or None."""
        if self.token == "mean":
            return hidden
        if self.token == "first" or mask is None:
            return hidden[:, :1] if self.token == "first" else hidden[:, -1:]
        positions = torch.arange(mask.shape[1], device=mask.device)
        last = (positions * mask).argmax(-1)
        return hidden[torch.arange(len(hidden), device=hidden.device), last][:, None]

    def pool(
        self,
        states: torch.Tensor,
        mask: torch.Tensor | None,
        tensors: Mapping[str, torch.Tensor],
        *,
        training: bool = False,
    ) -> torch.Tensor:
        """[B, D], what the classifier reads. states: of `select`; tensors: named as those of `tensors`."""
        if self.token == "mean" and mask is not None:
            weights = mask[..., None].to(states.dtype)
            pooled = (states * weights).sum(1) / weights.sum(1)
        else:
            pooled = states.mean(1)  # of one token, or of all if nothing is padding
        pooled = functional.dropout(pooled, self.dropout_before, training)
        if self.activation is not None:
            pooled = functional.linear(pooled, tensors["pooler_weight"], tensors.get("pooler_bias"))
            pooled = ACT2FN[self.activation](pooled)
            if self.norm_epsilon is not None:
                weight, bias = tensors["norm_weight"], tensors.get("norm_bias")
                pooled = functional.layer_norm(pooled, weight.shape, weight, bias, self.norm_epsilon)
        return functional.dropout(pooled, self.dropout_after, training)


def find_pooler(config: PreTrainedConfig, dropout: float | None = None) -> PoolerPlan:
    """The pooler of a family's sequence classifier.

    dropout: in place of the config's dropout before the classifier (`cls_dropout`, `classifier_dropout`).
    Raises ModelError for a family whose pooler is not known here.
    """
    family, c = config.model_type, config
    head = dropout if dropout is not None else head_dropout(config)
    if family == "deberta-v2":
        return PoolerPlan("first", c.pooler_hidden_act, c.pooler_dropout, head)
    if family == "bert":
        return PoolerPlan("first", "tanh", 0.0, head)
    if family in ("roberta", "xlm-roberta"):
        return PoolerPlan("first", "tanh", head, head)
    if family == "electra":
        return PoolerPlan("first", "gelu", head, head)
    if family == "modernbert":
        token: Token = "mean" if c.classifier_pooling == "mean" else "first"
        return PoolerPlan(
            token, c.classifier_activation, 0.0, head, c.classifier_bias, norm_epsilon=c.norm_eps, norm_bias=c.norm_bias
        )
    classifier: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    if classifier is not None and issubclass(classifier, GenericForSequenceClassification):
        return PoolerPlan("last", None, 0.0, head)
    raise ModelError(
        f"{family} is a model family without a pooler that Stage I knows (deberta-v2, bert, roberta, xlm-roberta, "
        "electra, modernbert, and decoders that classify by their last token): use method: lwd, kd or ce"
    )


HEAD_DROPOUTS = ("cls_dropout", "classifier_dropout")
"""What configs call the dropout before the classifier; a null there means `hidden_dropout_prob`."""


def set_head_dropout(config: PreTrainedConfig, probability: float) -> None:
    """Sets the dropout before the classifier, whatever the family calls it; decoders have none."""
    for name in HEAD_DROPOUTS:
        if hasattr(config, name) or (name == "cls_dropout" and config.model_type == "deberta-v2"):
            setattr(config, name, probability)


def head_dropout(config: PreTrainedConfig) -> float:
    """The dropout before the classifier that a config asks for; decoders have none."""
    given = (getattr(config, name, None) for name in HEAD_DROPOUTS)
    fallback = getattr(config, "hidden_dropout_prob", 0.0)
    return float(next((value for value in given if value is not None), fallback))
