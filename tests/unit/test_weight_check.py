"""A model whose files lack a weight, or hold a damaged or another one, is named before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

from ted_ds.errors import ModelError
from ted_ds.models.loading import load_model
from ted_ds.models.weight_check import check_weights
from tests.tiny_encoders import tiny_encoder
from tests.tiny_models import tiny_config, tiny_model

KINDS_OF_TENSOR = {
    "embedding": "model.embed_tokens.weight",
    "norm": "model.layers.1.input_layernorm.weight",
    "q": "model.layers.0.self_attn.q_proj.weight",
    "o": "model.layers.2.self_attn.o_proj.weight",
    "up": "model.layers.1.mlp.up_proj.weight",
    "down": "model.layers.2.mlp.down_proj.weight",
    "final norm": "model.norm.weight",
    "head": "lm_head.weight",
}


@pytest.fixture(params=["one file", "several files"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    size = "20KB" if request.param == "several files" else "5GB"
    tiny_model("llama", blocks=3, vocab=61).save_pretrained(tmp_path, max_shard_size=size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (request.param == "several files")
    return tmp_path


def file_of(folder: Path, name: str) -> Path:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return folder / "model.safetensors"
    return folder / str(json.loads(index.read_text())["weight_map"][name])


def changed(folder: Path, name: str, new: dict[str, torch.Tensor]) -> None:
    """The file that holds `name` with `new` in its place, and the index after it."""
    path = file_of(folder, name)
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors | new, path, metadata={"format": "pt"})
    if (index := folder / "model.safetensors.index.json").exists():
        content = json.loads(index.read_text())
        del content["weight_map"][name]
        content["weight_map"] |= dict.fromkeys(new, path.name)
        index.write_text(json.dumps(content))


def test_whole_models_pass(folder: Path) -> None:
    check_weights("teacher", str(folder), "causal-lm")


@pytest.mark.parametrize("name", KINDS_OF_TENSOR.values(), ids=KINDS_OF_TENSOR)
def test_a_weight_that_is_not_there_is_named(folder: Path, name: str) -> None:
    changed(folder, name, {})
    with pytest.raises(
        ModelError, match=rf"the files of the student .* lack {name} \(1 of 30 weights\): give the whole"
    ):
        check_weights("student", str(folder), "causal-lm")


@pytest.mark.parametrize("name", KINDS_OF_TENSOR.values(), ids=KINDS_OF_TENSOR)
def test_a_weight_of_another_name_is_named(folder: Path, name: str) -> None:
    changed(folder, name, {f"_orig_mod.{name}": load_file(file_of(folder, name))[name]})
    with pytest.raises(ModelError, match=rf"lack {name} \(1 of 30 weights\); they have _orig_mod.{name} \(1 that"):
        check_weights("teacher", str(folder), "causal-lm")


@pytest.mark.parametrize("name", KINDS_OF_TENSOR.values(), ids=KINDS_OF_TENSOR)
def test_a_weight_of_another_shape_is_named(folder: Path, name: str) -> None:
    changed(folder, name, {name: load_file(file_of(folder, name))[name][:-1].clone()})
    with pytest.raises(
        ModelError, match=rf"the teacher .*: {name} is \(.*\) in its files, its config.json makes it \("
    ):
        check_weights("teacher", str(folder), "causal-lm")


@pytest.mark.parametrize("name", KINDS_OF_TENSOR.values(), ids=KINDS_OF_TENSOR)
def test_a_file_that_lost_its_end_is_named(folder: Path, name: str) -> None:
    path = file_of(folder, name)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"the teacher .* could not be loaded"):
        check_weights("teacher", str(folder), "causal-lm")


def test_a_weight_that_is_not_loaded_ends_the_run_too(tmp_path: Path) -> None:
    tiny_model("llama", blocks=3, vocab=61).save_pretrained(tmp_path)
    changed(tmp_path, "model.norm.weight", {})
    with pytest.raises(ModelError, match=r"transformers does not load model.norm.weight out of its files"):
        load_model(str(tmp_path), "causal-lm", dtype="float32")


def test_a_masked_lm_is_a_start_for_a_classifier(tmp_path: Path) -> None:
    config = tiny_encoder("bert").config
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path)
    check_weights("student", str(tmp_path), "classification", new_head=True)


def test_a_reward_model_is_no_teacher(tmp_path: Path) -> None:
    config = tiny_config("llama", vocab=61, tie_word_embeddings=True)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is a LlamaForSequenceClassification, trained for something else"):
        check_weights("teacher", str(tmp_path), "causal-lm")


@pytest.mark.parametrize("pickled", [True, False])
@pytest.mark.parametrize("equal", [True, False])
def test_tied_tensors_that_differ_are_refused(tmp_path: Path, equal: bool, pickled: bool) -> None:
    tiny_model("llama", vocab=61, tie_word_embeddings=True).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + (0 if equal else 1)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    if pickled:
        torch.save(tensors, tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    if equal:
        check_weights("teacher", str(tmp_path), "causal-lm")
        return
    with pytest.raises(ModelError, match=r"two different tensors for model.embed_tokens.weight and lm_head.weight"):
        check_weights("teacher", str(tmp_path), "causal-lm")


def test_an_encoder_without_the_tasks_head_is_no_model_of_the_task(tmp_path: Path) -> None:
    tiny_encoder("bert").base_model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"lack qa_outputs.bias .*: it was not fine-tuned on such a task"):
        check_weights("teacher", str(tmp_path), "question-answering")


def test_a_task_head_may_be_new_but_not_the_backbone(tmp_path: Path) -> None:
    tiny_model("llama", blocks=3, vocab=61).save_pretrained(tmp_path)
    with pytest.raises(
        ModelError, match=r"lack score.weight .* was not fine-tuned on such a task.*init_from_pretrained"
    ):
        check_weights("student", str(tmp_path), "classification")
    check_weights("student", str(tmp_path), "classification", new_head=True)
    changed(tmp_path, "model.norm.weight", {})
    with pytest.raises(ModelError, match=r"lack model.norm.weight"):
        check_weights("student", str(tmp_path), "classification", new_head=True)
