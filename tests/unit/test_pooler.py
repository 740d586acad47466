"""Each family's pooler, rebuilt from its plan with the model's own weights, gives the model's own logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig

from ted_ds.errors import ModelError
from ted_ds.models.pooler import find_pooler, head_dropout, set_head_dropout
from tests.tiny_encoders import CLASSIFIERS, tiny_encoder

WEIGHTS = {
    "deberta-v2": ("pooler.dense", "classifier"),
    "bert": ("bert.pooler.dense", "classifier"),
    "roberta": ("classifier.dense", "classifier.out_proj"),
    "xlm-roberta": ("classifier.dense", "classifier.out_proj"),
    "electra": ("classifier.dense", "classifier.out_proj"),
    "modernbert": ("head.dense", "classifier"),
    "llama": (None, "score"),
    "qwen2": (None, "score"),
}
"""Where a family keeps its pooler's dense layer and its classifier."""

IDS = torch.tensor([[5, 7, 9, 11, 13, 15], [6, 8, 10, 12, 0, 0]])


def tensors_of(model: Any, family: str) -> dict[str, torch.Tensor]:
    dense, classifier = WEIGHTS[family]
    named = {"head": classifier} | ({"pooler": dense} if dense else {})
    named |= {"norm": "head.norm"} if family == "modernbert" else {}
    found = {}
    for name, path in named.items():
        module = model.get_submodule(path)
        found |= {f"{name}_{leaf}": tensor.detach() for leaf, tensor in module.named_parameters(recurse=False)}
    return found


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("family", CLASSIFIERS)
def test_the_plan_repeats_the_models_own_logits(family: str, pooling: str) -> None:
    model = tiny_encoder(family)
    if family == "modernbert":
        model.config.classifier_pooling = pooling
    mask = (IDS != 0).long()
    plan, tensors = find_pooler(model.config), tensors_of(model, family)
    assert plan.tensors(16).keys() == tensors.keys() - {"head_weight", "head_bias"}
    assert all(t.shape == tensors[name].shape for name, t in plan.tensors(16).items())
    with torch.no_grad():
        hidden = model.base_model(input_ids=IDS, attention_mask=mask).last_hidden_state
        pooled = plan.pool(plan.select(hidden, mask), mask, tensors)
        logits = functional.linear(pooled, tensors["head_weight"], tensors.get("head_bias"))
        torch.testing.assert_close(logits, model(input_ids=IDS, attention_mask=mask).logits)


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_without_a_mask_every_position_is_real(family: str) -> None:
    plan = find_pooler(tiny_encoder(family).config)
    hidden, ones = torch.randn(2, 6, 16), torch.ones(2, 6, dtype=torch.int64)
    tensors = {name: t.detach() for name, t in plan.tensors(16).items()}
    with_mask, without = (plan.pool(plan.select(hidden, m), m, tensors) for m in (ones, None))
    torch.testing.assert_close(with_mask, without)


def test_dropouts_are_the_familys_own_unless_given() -> None:
    config = AutoConfig.for_model("deberta-v2", pooler_dropout=0.3, hidden_dropout_prob=0.2)
    plan = find_pooler(config)
    assert (plan.dropout_before, plan.dropout_after) == (0.3, 0.2)
    set_head_dropout(config, 0.05)
    assert head_dropout(config) == config.cls_dropout == 0.05
    assert find_pooler(config, 0.4).dropout_after == 0.4
    roberta = find_pooler(AutoConfig.for_model("roberta", classifier_dropout=0.1))
    assert (roberta.dropout_before, roberta.dropout_after) == (0.1, 0.1)
    assert find_pooler(AutoConfig.for_model("llama")).dropout_after == 0.0
    assert find_pooler(AutoConfig.for_model("bert", classifier_dropout=None)).dropout_after == 0.1


def test_dropout_is_drawn_in_training_alone() -> None:
    plan = find_pooler(AutoConfig.for_model("bert"), 0.5)
    tensors = {name: t.detach() for name, t in plan.tensors(64).items()}
    states = torch.randn(3, 1, 64)
    torch.manual_seed(0)
    trained = plan.pool(states, None, tensors, training=True)
    assert 0.2 < float((trained == 0).float().mean()) < 0.8
    assert not (plan.pool(states, None, tensors) == 0).any()


def test_a_family_without_a_known_pooler_is_named() -> None:
    with pytest.raises(
        ModelError, match=r"xlnet is a model family without a pooler that Stage I knows .* lwd, kd or ce"
    ):
        find_pooler(AutoConfig.for_model("xlnet"))
