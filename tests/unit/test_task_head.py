"""Stage 0 of a task from a pre-trained model: its weights, a fresh head that the seed alone decides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoTokenizer

from ted_ds.config.tasks import TASKS
from ted_ds.data.tokenizers import Tokenizer, load_tokenizer
from ted_ds.errors import ModelError
from ted_ds.models.labels import label_order
from ted_ds.models.loading import load_model
from ted_ds.models.pooler import PoolerPlan, find_pooler, set_head_dropout
from ted_ds.models.task_head import label_fields, start_from_pretrained
from tests.task_project import write_tokenizer
from tests.tiny_encoders import CLASSIFIERS, tiny_encoder
from tests.tiny_models import tiny_model

HEADS = {
    "sst2": {"classifier.weight": (2, 16), "classifier.bias": (2,)},
    "mnli": {"classifier.weight": (3, 16), "classifier.bias": (3,)},
    "stsb": {"classifier.weight": (1, 16), "classifier.bias": (1,)},
    "squad": {"qa_outputs.weight": (2, 16), "qa_outputs.bias": (2,)},
}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    write_tokenizer(tmp_path / "tokenizer")
    return load_tokenizer(str(tmp_path / "tokenizer"))


@pytest.fixture
def pretrained(tmp_path: Path) -> Path:
    """A model without a task head."""
    tiny_encoder("bert").base_model.save_pretrained(tmp_path / "pretrained")
    return tmp_path / "pretrained"


def started(pretrained: Path | str, task: str, folder: Path, tokenizer: Tokenizer, seed: int = 1) -> Any:
    start_from_pretrained(str(pretrained), TASKS[task], folder, tokenizer=tokenizer, seed=seed, trust_remote_code=False)
    return load_file(folder / "model.safetensors")


def test_a_config_says_what_the_task_predicts() -> None:
    assert label_fields(TASKS["mnli"]) == {
        "num_labels": 3,
        "id2label": dict(enumerate(TASKS["mnli"].labels)),
        "label2id": {label: i for i, label in enumerate(TASKS["mnli"].labels)},
    }
    assert label_fields(TASKS["sst2"])["id2label"] == {0: "negative", 1: "positive"}
    assert label_fields(TASKS["stsb"]) == {"num_labels": 1}
    assert label_fields(TASKS["squad"]) == {"num_labels": 2}
    assert label_fields(TASKS["causal-lm"]) == {}


@pytest.mark.parametrize("task", HEADS)
def test_the_seed_decides_the_head_and_nothing_else(
    task: str, pretrained: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    first = started(pretrained, task, tmp_path / "first", tokenizer)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(5)  # whatever was drawn before
    again = started(pretrained, task, tmp_path / "again", tokenizer)
    other = started(pretrained, task, tmp_path / "other", tokenizer, seed=2)
    head = HEADS[task]
    assert {name: tuple(first[name].shape) for name in head} == head
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    weight = next(name for name in head if name.endswith("weight"))
    assert not torch.equal(first[weight], other[weight])
    base = load_file(pretrained / "model.safetensors")
    own = {name.removeprefix("bert."): t for name, t in first.items() if name not in head}
    # a question answerer has no pooler
    assert base.keys() - own.keys() == ({"pooler.dense.weight", "pooler.dense.bias"} if task == "squad" else set())
    for found in (first, other):
        assert all(torch.equal(found[f"bert.{name}"], base[name]) for name in own)


def test_the_folder_is_a_model_of_the_task_with_its_tokenizer(
    pretrained: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "student.tmp").mkdir()
    (tmp_path / "student.tmp/leftover").touch()
    started(pretrained, "sst2", tmp_path / "student", tokenizer)
    config = json.loads((tmp_path / "student/config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["id2label"] == {"0": "negative", "1": "positive"}
    assert config["label2id"] == {"negative": 0, "positive": 1}
    assert AutoTokenizer.from_pretrained(tmp_path / "student")("w7 w9")["input_ids"] == [2, 7, 9, 3]
    model = load_model(str(tmp_path / "student"), "classification", dtype="float32")
    assert model.config.num_labels == 2 and {p.dtype for p in model.parameters()} == {torch.float32}
    assert not (tmp_path / "student/leftover").exists() and not (tmp_path / "student.tmp").exists()


def test_a_model_in_half_precision_starts_in_full(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tiny_encoder("bert").base_model.bfloat16().save_pretrained(tmp_path / "half")
    found = started(tmp_path / "half", "sst2", tmp_path / "student", tokenizer)
    assert {t.dtype for t in found.values()} == {torch.float32}


@pytest.mark.parametrize("own", [None, 5])
def test_padding_is_the_tokenizers(own: int | None, tokenizer: Tokenizer, tmp_path: Path) -> None:
    decoder = tiny_encoder("llama").base_model
    decoder.config.pad_token_id = own
    decoder.save_pretrained(tmp_path / "decoder")
    started(tmp_path / "decoder", "sst2", tmp_path / "student", tokenizer)
    assert json.loads((tmp_path / "student/config.json").read_text())["pad_token_id"] == 0


@pytest.mark.parametrize("num_labels", [2, 3])
@pytest.mark.parametrize("family", ["bert", "deberta-v2"])
def test_a_head_of_another_task_is_not_taken_over(
    family: str, num_labels: int, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Not where its sizes happen to be the same either, nor a part of it (DeBERTa's pooler belongs to the head)."""
    model = tiny_encoder(family, num_labels=num_labels)
    model.save_pretrained(tmp_path / "other")
    model.base_model.save_pretrained(tmp_path / "bare")
    from_other, from_bare = (
        started(tmp_path / name, "sst2", tmp_path / f"from-{name}", tokenizer) for name in ("other", "bare")
    )
    assert from_other.keys() == from_bare.keys()
    assert all(torch.equal(from_other[name], from_bare[name]) for name in from_bare)
    old = dict(model.named_parameters())
    heads = [name for name in from_bare if not name.startswith(f"{model.base_model_prefix}.")]
    assert len(heads) == (2 if family == "bert" else 4)
    assert not any(torch.equal(from_other[name], old[name]) for name in heads)


@pytest.mark.parametrize("broken", ["nowhere", "no weights"])
def test_a_model_that_cannot_be_loaded_is_named(broken: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / broken
    if broken == "no weights":
        tiny_encoder("bert").config.save_pretrained(folder)
    with pytest.raises(ModelError, match=rf"student\.pretrained '{folder}' cannot be loaded: ") as caught:
        started(folder, "sst2", tmp_path / "student", tokenizer)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "student").exists()


def test_a_family_without_the_tasks_head_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tiny_model("cohere").base_model.save_pretrained(tmp_path / "cohere")
    with pytest.raises(ModelError, match=r"cannot be loaded: Unrecognized .*CohereConfig") as caught:
        started(tmp_path / "cohere", "squad", tmp_path / "student", tokenizer)
    assert "\n" not in str(caught.value)


DENSE = {
    "deberta-v2": "pooler.dense",
    "bert": "bert.pooler.dense",
    "modernbert": "head.dense",
    "llama": "score",  # these classify a token's state as it is
    "qwen2": "score",
}


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_stage1_s_head_drops_out_where_the_familys_own_does(family: str) -> None:
    model = tiny_encoder(family).train()
    config = model.config
    set_head_dropout(config, 0.375)
    config.pooler_dropout = 0.25  # DeBERTa's alone
    model = type(model)(config).train()
    dense = model.get_submodule(DENSE.get(family, "classifier.dense"))
    before, after = [], []
    passed = []
    dense.register_forward_hook(lambda *_: passed.append(True))
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p in (0.25, 0.375):
            module.register_forward_hook(lambda m, *_: (after if passed else before).append(m.p))
    model(input_ids=torch.tensor([[5, 6, 7]]))
    plan = find_pooler(config)
    assert (plan.dropout_before, plan.dropout_after) == (sum(before), sum(after))
    given = find_pooler(config, 0.5)
    decoder = family in ("llama", "qwen2")
    assert given.dropout_before == {"deberta-v2": 0.25}.get(family, 0.5 if before else 0.0)
    assert given.dropout_after == 0.5 and (bool(after) or decoder)
    assert find_pooler(config, 0.0).dropout_after == 0.0


@pytest.mark.parametrize(("before", "after"), [(0.5, 0.0), (0.0, 0.5)])
def test_both_dropouts_are_drawn_in_training(before: float, after: float) -> None:
    plan, states = PoolerPlan("first", None, before, after), torch.ones(2, 1, 64)
    assert set(plan.pool(states, None, {}, training=True).flatten().tolist()) == {0.0, 2.0}
    assert set(plan.pool(states, None, {}).flatten().tolist()) == {1.0}


def test_stage1_s_head_has_the_configs_activation() -> None:
    for family, name in (("deberta-v2", "pooler_hidden_act"), ("modernbert", "classifier_activation")):
        config = tiny_encoder(family).config
        setattr(config, name, "silu")
        assert find_pooler(config).activation == "silu"


@pytest.mark.parametrize(
    ("own", "labels"),
    [
        (("LABEL_0", "good"), ("bad", "good")),  # named in part: not the same as not named
        (("not good", "not_good"), ("not good", "not_good")),  # one name, read without regard to spaces
    ],
)
def test_labels_that_could_be_mistaken_are_refused(own: tuple[str, ...], labels: tuple[str, ...]) -> None:
    config = AutoConfig.for_model("bert", id2label=dict(enumerate(own)))
    with pytest.raises(ModelError, match="cannot be mapped by name"):
        label_order(config, labels)
