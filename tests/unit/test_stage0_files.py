"""Stage 0 on files whose names are not the model's, and on families whose cut needs care."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, T5Config

from ted_ds.config.student_section import InitConfig
from ted_ds.errors import ModelError
from ted_ds.models.channels import Measurements
from ted_ds.models.loading import on_meta
from ted_ds.models.probe import probe_cut, skipped_blocks
from ted_ds.models.pruning import init_student
from ted_ds.models.tiny import tiny_model
from ted_ds.models.weight_check import check_weights
from tests.plain_measurements import plain_measurements
from tests.tiny_models import tiny_model as made


def tiny(family: str, **settings: Any) -> PreTrainedModel:
    return tiny_model(on_meta(AutoConfig.for_model(family, **settings), "causal-lm"))


def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


def cut(teacher: Path, student: Path, measured: Measurements | None = None, **init: Any) -> PreTrainedModel:
    """The student of a cut, which passes the checks that a run makes of it."""
    asked = InitConfig(**init)
    probe_cut(str(teacher), asked, "causal-lm")
    init_student(str(teacher), asked, student, measured=measured)
    check_weights("student", str(student), "causal-lm")
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    return model.eval()


def assert_is_skipped(student: PreTrainedModel, teacher: PreTrainedModel, lost: set[int]) -> None:
    with skipped_blocks(teacher, lost):
        expected = logits(teacher)
    assert (logits(student) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (logits(teacher) - expected).abs().max() > 1e-3 * expected.abs().max()  # the block mattered


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("size", ["5GB", "1MB"])
def test_experts_that_files_hold_one_by_one(tmp_path: Path, family: str, size: str) -> None:
    teacher = tiny(family)
    teacher.save_pretrained(tmp_path / "t", max_shard_size=size)
    files = list((tmp_path / "t").glob("*.safetensors"))
    assert (len(files) > 1) == (size == "1MB")
    assert any(".experts.3." in name for file in files for name in load_file(file))  # as published; joined in the model
    assert_is_skipped(cut(tmp_path / "t", tmp_path / "s", blocks=(0, 2, 3)), teacher, {1})


def test_a_text_model_within_another(tmp_path: Path) -> None:
    teacher = tiny("qwen3_5_text")
    teacher.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    inner = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in tensors.items()}
    inner["model.visual.blocks.0.norm1.weight"] = torch.ones(4)
    save_file(inner, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_5", "text_config": config}))
    total = teacher.config.num_hidden_layers
    student = cut(tmp_path, tmp_path / "s", blocks=tuple(b for b in range(total) if b != 1))
    assert student.config.num_hidden_layers == total - 1
    assert not [name for name in load_file(tmp_path / "s/model.safetensors") if "visual" in name]
    assert_is_skipped(student, teacher, {1})


def test_two_stacks_that_could_be_the_blocks_are_refused(tmp_path: Path) -> None:
    teacher = made("llama", blocks=3, vocab=61)
    teacher.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors |= {f"model.tower.layers.{b}.norm.weight": torch.ones(4) for b in range(3)}
    tensors = {name.replace("model.layers", "model.text.layers"): tensor for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"more than one stack of blocks: model.t.*layers, model.t.*layers"):
        init_student(str(tmp_path), InitConfig(blocks=(0, 2)), tmp_path / "s")


def test_a_tied_file_that_holds_the_lm_head_alone(tmp_path: Path) -> None:
    teacher = made("llama", blocks=3, vocab=61, tie_word_embeddings=True)
    teacher.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_is_skipped(cut(tmp_path, tmp_path / "s", blocks=(0, 2)), teacher, {1})


def test_a_dense_first_block_that_is_lost(tmp_path: Path) -> None:
    teacher = tiny("deepseek_v3")
    teacher.save_pretrained(tmp_path)
    dense = teacher.config.first_k_dense_replace
    student = cut(tmp_path, tmp_path / "s", blocks=tuple(range(1, teacher.config.num_hidden_layers)))
    assert student.config.first_k_dense_replace == dense - 1
    assert_is_skipped(student, teacher, {0})


def test_a_residual_scale_that_depends_on_the_depth(tmp_path: Path) -> None:
    teacher = tiny("minicpm3")
    teacher.save_pretrained(tmp_path)
    assert_is_skipped(cut(tmp_path, tmp_path / "s", blocks=(0, 1, 3)), teacher, {2})


def test_an_encoder_decoder_is_no_teacher(tmp_path: Path) -> None:
    T5Config(vocab_size=61, d_model=16, d_ff=16, num_layers=1, num_heads=2).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="a t5, an encoder-decoder, has no head for causal-lm in transformers: give"):
        check_weights("teacher", str(tmp_path), "causal-lm")


@pytest.mark.parametrize(
    ("family", "init", "message"),
    [
        ("granitemoehybrid", {"intermediate_size": 32}, "no weight that ted_ds knows follows intermediate_size"),
        ("bitnet", {"num_heads": 2}, "a bitnet of this config does not run"),
        ("olmo2", {"num_heads": 1}, r"k_norm.weight would be \(256,\), the student's config wants \(128,\)"),
    ],
)
def test_a_width_that_a_family_does_not_allow(tmp_path: Path, family: str, init: dict[str, int], message: str) -> None:
    tiny(family).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=message):
        cut(tmp_path, tmp_path / "s", **init)
    assert not (tmp_path / "s").exists()


def test_the_width_of_a_hybrid_whose_norms_are_of_another_width(tmp_path: Path) -> None:
    teacher = tiny("qwen3_5_text")
    teacher.save_pretrained(tmp_path)
    measured = plain_measurements(teacher, torch.arange(8)[None])
    student = cut(tmp_path, tmp_path / "s", measured, intermediate_size=32)
    assert student.config.intermediate_size == 32 and logits(student).isfinite().all()
