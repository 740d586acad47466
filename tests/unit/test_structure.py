"""The parts of every supported family are found, and they are the right ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DebertaV2ForSequenceClassification, OPTConfig

from ted_ds.batch import Batch, BatchCounts
from ted_ds.distill.filter_learner import FilterLearner
from ted_ds.errors import ModelError
from ted_ds.models.filters import FilterPlan
from ted_ds.models.pooler import find_pooler
from ted_ds.models.structure import block_output, find_blocks, find_structure, set_dropout
from ted_ds.tasks.classification import Classification, PoolerHead
from ted_ds.teacher.frozen import FrozenModel, FrozenModule
from tests.tiny_encoders import CLASSIFIERS, encoder_config, tiny_encoder
from tests.tiny_models import FAMILIES, tiny_config, tiny_model

SCALED: list[tuple[str, dict[str, Any]]] = [
    ("gemma2", {"final_logit_softcapping": 2.0}),
    ("granite", {"logits_scaling": 3.0}),
    ("cohere", {"logit_scale": 0.25}),
]
IDS = torch.arange(12).view(2, 6)
WORDS = IDS + 3
"""Ids without the tiny encoders' padding id 0."""

NORMED = ("modernbert", "llama", "qwen2")
"""Families with a norm behind the last block."""


@pytest.mark.parametrize(("family", "extra"), [*((f, {}) for f in FAMILIES), *SCALED])
def test_parts_compose_to_the_model(family: str, extra: dict[str, Any]) -> None:
    model = tiny_model(family, **extra)
    parts = find_structure(model)
    with torch.no_grad():
        hidden = parts.backbone(IDS).last_hidden_state
        logits = parts.lm_head(hidden) * parts.logit_scale
        if parts.logit_softcap is not None:
            logits = parts.logit_softcap * torch.tanh(logits / parts.logit_softcap)
        expected = model(IDS).logits
    torch.testing.assert_close(logits, expected)
    assert (parts.width, parts.vocab_rows, parts.num_blocks) == (16, 97, 2)
    assert model.get_submodule(parts.blocks_path) is parts.blocks


@pytest.mark.parametrize("family", FAMILIES)
def test_block_outputs_are_hidden_states(family: str) -> None:
    parts = find_structure(tiny_model(family, blocks=3))
    outputs: list[torch.Tensor] = []
    normed: list[torch.Tensor] = []
    for block in parts.blocks:
        block.register_forward_hook(lambda _m, _i, output: outputs.append(block_output(output)))
    parts.final_norm.register_forward_hook(lambda _m, _i, output: normed.append(output))
    with torch.no_grad():
        result = parts.backbone(IDS, output_hidden_states=True)
        after_norm = parts.final_norm(outputs[-1])
    for output, expected in zip(outputs[:-1], result.hidden_states[1:-1], strict=True):
        assert torch.equal(output, expected)
    # the last block's output has not passed the final norm, the last hidden state has
    assert torch.equal(normed[0], result.last_hidden_state)
    assert torch.equal(after_norm, result.last_hidden_state)


@pytest.mark.parametrize("family", FAMILIES)
def test_meta_device(family: str) -> None:
    with torch.device("meta"):
        parts = find_structure(AutoModelForCausalLM.from_config(tiny_config(family)))
    assert parts.lm_head.weight.is_meta and parts.width == 16


def test_dropout_is_set_in_every_family() -> None:
    config = tiny_config("gpt2", resid_pdrop=0.1, attn_pdrop=0.1)
    set_dropout(config, 0.0)
    assert (config.resid_pdrop, config.attn_pdrop, config.embd_pdrop) == (0.0, 0.0, 0.0)
    model = AutoModelForCausalLM.from_config(tiny_config("opt", dropout=0.3))
    assert any(getattr(m, "dropout", 0) == 0.3 for m in model.modules())


def test_project_out_is_refused() -> None:
    config = tiny_config("opt", word_embed_proj_dim=8)
    assert isinstance(config, OPTConfig)
    with torch.device("meta"), pytest.raises(ModelError, match=r"OPTForCausalLM projects.*project_out"):
        find_structure(AutoModelForCausalLM.from_config(config))


def test_missing_parts_are_named() -> None:
    with pytest.raises(ModelError, match="Linear has no backbone"):
        find_structure(nn.Linear(2, 2))
    with pytest.raises(ModelError, match="LlamaModel has no backbone"):
        find_structure(tiny_model("llama").base_model)
    model = tiny_model("llama")
    model.set_output_embeddings(nn.Identity())
    with pytest.raises(ModelError, match=r"no linear LM head .*Identity"):
        find_structure(model)
    model = tiny_model("llama")
    model.model.norm = nn.Identity()
    with pytest.raises(ModelError, match=r"final norm was not found.*there is none"):
        find_structure(model)
    model.model.norm, model.model.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
    assert find_structure(model).final_norm is model.model.norm2  # the last one, as in Bloom
    model = tiny_model("llama")
    model.model.more = nn.ModuleList([nn.Linear(1, 1)])
    with pytest.raises(ModelError, match=r"blocks were not found.*model\.layers, model\.more"):
        find_structure(model)


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_blocks_of_classifiers(family: str) -> None:
    model = tiny_encoder(family, blocks=3, width=24)
    parts = find_blocks(model)
    assert (parts.width, parts.num_blocks) == (24, 3)
    assert parts.backbone is model.base_model and model.get_submodule(parts.blocks_path) is parts.blocks
    assert parts.hidden_state_sources() == list(parts.blocks)
    outputs, states = outputs_and_states(model, parts.hidden_state_sources())
    assert len(outputs) == len(states) == 3
    assert all(torch.equal(output, state) for output, state in zip(outputs[:-1], states[:-1], strict=True))
    # behind the last block a final norm changes the state, where the family has one
    assert torch.equal(outputs[-1], states[-1]) == (family not in NORMED)


def outputs_and_states(model: Any, modules: list[nn.Module]) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
    """(what each module returned, transformers' own hidden state behind each block)."""
    seen: list[torch.Tensor] = []
    for module in modules:
        module.register_forward_hook(lambda _m, _i, output: seen.append(block_output(output)))
    with torch.no_grad():
        return seen, model(input_ids=WORDS, output_hidden_states=True).hidden_states[1:]


def convolved() -> Any:
    """A DeBERTa-v2 with the convolution over its first block's output that the xlarge models have."""
    config = AutoConfig.for_model(**encoder_config("deberta-v2"), conv_kernel_size=3, conv_act="gelu", num_labels=3)
    torch.manual_seed(0)
    return DebertaV2ForSequenceClassification(config).eval()


def test_behind_debertas_convolution_the_hidden_state_is_the_convolutions() -> None:
    model = convolved()
    parts = find_blocks(model)
    conv = model.deberta.encoder.conv
    assert parts.hidden_state_sources() == [conv, parts.blocks[1]]
    (block, convolution, last), states = outputs_and_states(model, [parts.blocks[0], conv, parts.blocks[1]])
    assert torch.equal(convolution, states[0]) and torch.equal(last, states[1])
    assert (block - states[0]).abs().max() > 0.1


def test_filters_read_the_block_and_the_plain_layer_loss_the_convolution() -> None:
    model = convolved()
    blocks, conv = find_blocks(model).blocks, model.deberta.encoder.conv
    task = Classification(("a", "b", "c"))
    plan = FilterPlan((0, 1), 16, 8)
    assert FrozenModel(FrozenModule(model, task)).sources == [conv, blocks[1]]
    assert FrozenModel(FrozenModule(model, task, plan.build())).sources == list(blocks)


def test_stage1_reads_the_block_and_not_the_convolution() -> None:
    model = convolved()
    frozen = FrozenModel(FrozenModule(model, Classification(("a", "b", "c"))))
    learner = FilterLearner(FilterPlan((0,), 16, 8).build(), frozen, (0,), PoolerHead(find_pooler(model.config), 3))
    read: list[torch.Tensor] = []
    learner.probes[0].register_forward_pre_hook(lambda _m, inputs: read.append(inputs[0]))
    batch = Batch(WORDS, torch.tensor([0, 2]))
    learner(batch=batch, counts=BatchCounts.of(batch), step=0)
    (block, convolution), _ = outputs_and_states(model, [find_blocks(model).blocks[0], model.deberta.encoder.conv])
    assert torch.equal(read[0], block[:, :1])  # the pooler's token
    assert not torch.equal(read[0], convolution[:, :1])
