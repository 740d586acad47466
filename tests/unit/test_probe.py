"""What ted_ds takes a model for is measured on its family's tiny model; a planted mistake shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from ted_ds.config.student_section import InitConfig
from ted_ds.errors import ModelError
from ted_ds.models import probe as probing
from ted_ds.models import structure
from ted_ds.models.loading import on_meta
from ted_ds.models.probe import probe, probe_cut
from ted_ds.models.tiny import tiny_ids, tiny_model
from tests.tiny_models import FAMILIES
from tests.tiny_models import tiny_model as made


def large(family: str, kind: Any = "causal-lm", **settings: Any) -> PreTrainedModel:
    """A model as published ones are, without weights."""
    return on_meta(AutoConfig.for_model(family, **settings), kind)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tiny_model_is_small_runs_and_is_the_same_each_time(family: str) -> None:
    first, second = (tiny_model(large(family)) for _ in range(2))
    assert sum(p.numel() for p in first.parameters()) < 30_000_000
    with torch.no_grad():
        logits, again = (model(tiny_ids(model.config)).logits for model in (first, second))
    assert torch.equal(logits, again) and logits.std() > 1e-2


@pytest.mark.parametrize("family", [*FAMILIES, "cohere", "granite", "falcon_h1", "recurrent_gemma", "nanochat"])
def test_families_that_are_known_pass(family: str) -> None:
    probe("teacher", "here", large(family), "causal-lm", layers=True)


@pytest.mark.parametrize("kind", ["classification", "question-answering"])
def test_encoders_pass(kind: Any) -> None:
    probe("teacher", "here", large("bert", kind), kind, layers=True)


def test_a_wrong_scale_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structure, "logit_scale", lambda config: 0.5)
    with pytest.raises(
        ModelError, match=r"the teacher here is a llama, .* last hidden state \(they are 2 times as large"
    ):
        probe("teacher", "here", large("llama"), "causal-lm")


def test_a_cap_that_is_not_known_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structure, "logit_softcap", lambda config: None)
    with pytest.raises(ModelError, match="its logits are not what its LM head makes of its last hidden state"):
        probe("teacher", "here", large("gemma2", final_logit_softcapping=0.5), "causal-lm")


def test_a_missing_norm_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_norm(model: Any, device: torch.device) -> Any:
        _, head = original(model, device)
        return nn.Identity(), head

    original = probing.resident_readout
    monkeypatch.setattr(probing, "resident_readout", no_norm)
    probe("student", "here", large("llama"), "causal-lm")  # whose layers nobody looks at
    with pytest.raises(ModelError, match=r"the student here .* not what its final norm and LM head make"):
        probe("student", "here", large("llama"), "causal-lm", layers=True)


def test_swapped_blocks_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def swapped(model: nn.Module, name: str) -> tuple[str, nn.ModuleList]:
        path, blocks = original(model, name)
        return path, nn.ModuleList([blocks[1], blocks[0], *blocks[2:]])

    original = structure._blocks
    monkeypatch.setattr(structure, "_blocks", swapped)
    with pytest.raises(ModelError, match=r"its blocks run in the order \[1, 0, 2, 3\]"):
        probe("teacher", "here", large("llama"), "causal-lm", layers=True)


def test_something_between_blocks_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def between(module: nn.Module, inputs: Any, named: Any) -> Any:
        return (inputs[0] * 1.01, *inputs[1:]), named

    model = tiny_model(large("llama"))
    structure.find_blocks(model).blocks[2].register_forward_pre_hook(between, with_kwargs=True, prepend=True)
    monkeypatch.setattr(probing, "tiny_model", lambda of: model)
    with pytest.raises(ModelError, match="block 2 does not read what block 1 gives"):
        probe("teacher", "here", large("llama"), "causal-lm", layers=True)


def test_a_cut_that_changes_what_a_block_computes_is_refused(tmp_path: Path) -> None:
    made("gpt2", blocks=4, scale_attn_by_inverse_layer_idx=False).save_pretrained(tmp_path / "plain")
    probe_cut(str(tmp_path / "plain"), InitConfig(blocks="uniform", num_blocks=2), "causal-lm")
    sizes: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 61}
    config = AutoConfig.for_model("diffllama", num_hidden_layers=6, intermediate_size=48, head_dim=8, **sizes)
    config.save_pretrained(tmp_path / "by number")
    teacher = str(tmp_path / "by number")
    with pytest.raises(ModelError, match=r"a diffllama what a block computes depends on its number.*use blocks: first"):
        probe_cut(teacher, InitConfig(blocks="uniform", num_blocks=3), "causal-lm")
    probe_cut(teacher, InitConfig(blocks="first", num_blocks=3), "causal-lm")


def test_a_family_that_no_tiny_model_can_be_made_of_is_let_through(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any, **named: Any) -> Any:
        raise RuntimeError("sizes do not\nfit")

    monkeypatch.setattr("ted_ds.models.tiny._build", broken)
    with caplog.at_level("WARNING", "ted_ds"):
        probe("teacher", "here", large("llama"), "causal-lm", layers=True)
    assert (
        "could not be measured: a llama of this config does not run, tried at small sizes: sizes do not fit"
        in caplog.text
    )


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_a_decoder_that_classifies_without_a_padding_id_passes(family: str) -> None:
    probe("teacher", "here", large(family, "classification", pad_token_id=None), "classification", layers=True)
