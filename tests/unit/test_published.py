"""Checkpoints in the authors' layout: written and read bit by bit, loaded by transformers, refused where torn.

The folders are spelled out here by hand (`_published`), not by the code under test.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification, DebertaV2Config

from ted_ds.errors import CheckpointError
from ted_ds.models.filter_files import read_plan
from ted_ds.models.filters import FilterPlan
from ted_ds.models.published import is_published, read_published, unpack_published

WIDTH, OUTPUT, LABELS = 8, 6, 3
LAYER = "deberta.encoder.layer"
OF_HEAD: dict[str, Any] = {
    "SequenceClassification": AutoModelForSequenceClassification,
    "QuestionAnswering": AutoModelForQuestionAnswering,
}
Tensors = dict[str, torch.Tensor]


def _theirs(
    *, head: str = "SequenceClassification", layers: int = 3, interval: int = 1, nonlinear: bool = False, **keys: Any
) -> tuple[dict[str, Any], Tensors]:
    """A Stage I checkpoint of random tensors: its config.json and its tensors by their names."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": layers, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 12, "vocab_size": 20, "max_position_embeddings": 16, "type_vocab_size": 0}
    sizes |= {"pooler_hidden_size": WIDTH, "relative_attention": True, "position_buckets": 4, "hidden_act": "gelu"}
    sizes |= {"pos_att_type": ["p2c", "c2p"], "share_att_key": True, "norm_rel_ebd": "layer_norm"}
    sizes |= {"position_biased_input": False}
    labels = {} if head == "QuestionAnswering" else {"id2label": {str(i): f"L{i}" for i in range(LABELS)}}
    plain = OF_HEAD[head].from_config(DebertaV2Config(**sizes, **labels))
    tensors = {name: torch.randn_like(tensor) for name, tensor in plain.state_dict().items()}
    tensors["deberta.embeddings.position_ids"] = torch.arange(16)[None]
    classes = 2 if head == "QuestionAnswering" else LABELS
    output = keys["filter_output_dim"] or WIDTH if "filter_output_dim" in keys else OUTPUT
    for k, layer in enumerate(range(interval - 1, layers, interval)):
        stem = f"{LAYER}.{layer}.filter"
        if nonlinear:
            tensors |= {f"{stem}.0.weight": torch.randn(WIDTH, WIDTH), f"{stem}.0.bias": torch.randn(WIDTH)}
            stem += ".2"
        tensors |= {f"{stem}.weight": torch.randn(output, WIDTH), f"{stem}.bias": torch.randn(output)}
        tensors |= {
            f"filter_head.{k}.weight": torch.randn(classes, output),
            f"filter_head.{k}.bias": torch.randn(classes),
        }
        if head != "QuestionAnswering":
            pooler = f"filter_pooler.{k}.dense"
            tensors |= {f"{pooler}.weight": torch.randn(output, output), f"{pooler}.bias": torch.randn(output)}
    config = {"model_type": "ted-deberta-v2", "architectures": [f"TEDDebertaV2For{head}"], "torch_dtype": "float32"}
    options = {"filter_interval": interval, "filter_output_dim": OUTPUT, "filter_nonlinear": nonlinear}
    options |= {"filter_disabled": False, "train_filters": True}
    return {**sizes, **labels, **config, **options, **keys}, tensors


def _save(config: dict[str, Any], tensors: Tensors, folder: Path, kind: str = "safetensors") -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if kind == "safetensors":
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    elif kind == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        names = sorted(tensors)
        files = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(names)}
        for file in set(files.values()):
            torch.save({name: tensors[name] for name in names if files[name] == file}, folder / file)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return str(folder)


def _assert_same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


CASES: dict[str, tuple[dict[str, Any], tuple[int, ...], int]] = {
    "linear": ({}, (0, 1, 2), OUTPUT),
    "nonlinear": ({"nonlinear": True}, (0, 1, 2), OUTPUT),
    "interval": ({"layers": 5, "interval": 2}, (1, 3), OUTPUT),
    "nonlinear-interval": ({"layers": 4, "interval": 2, "nonlinear": True}, (1, 3), OUTPUT),
    "questions": ({"head": "QuestionAnswering"}, (0, 1, 2), OUTPUT),
    "width": ({"filter_output_dim": None}, (0, 1, 2), WIDTH),
    "relu": ({"nonlinear": True, "hidden_act": "relu"}, (0, 1, 2), OUTPUT),
}
"""Name -> the checkpoint, its filters' layers and F, by hand."""


@pytest.mark.parametrize("kind", ["safetensors", "bin", "shards"])
@pytest.mark.parametrize("case", CASES)
def test_what_is_read_and_written_is_the_same(case: str, kind: str, tmp_path: Path) -> None:
    how, blocks, output = CASES[case]
    config, tensors = _theirs(**how)
    source = _save(config, tensors, tmp_path / "theirs", kind)
    assert is_published(source)
    state = torch.get_rng_state()
    model = read_published(source)
    assert torch.equal(torch.get_rng_state(), state)
    nonlinear, act = how.get("nonlinear", False), how.get("hidden_act", "gelu")
    assert model.plan == FilterPlan(blocks, WIDTH, output, nonlinear, act)
    assert model.config["model_type"] == "deberta-v2"
    assert model.config["architectures"] == [f"DebertaV2For{how.get('head', 'SequenceClassification')}"]
    assert not any("filter" in key for key in model.config)
    assert model.options == {key: value for key, value in config.items() if "filter" in key}
    _assert_same(model.weights, {name: t for name, t in tensors.items() if "filter" not in name})
    _assert_same(model.heads, {name: t for name, t in tensors.items() if name.startswith("filter_")})
    assert {path.name for path in tmp_path.iterdir()} == {"theirs"}


@pytest.mark.parametrize("case", CASES)
def test_filters_compute_what_theirs_compute(case: str, tmp_path: Path) -> None:
    how, blocks, _ = CASES[case]
    config, tensors = _theirs(**how)
    model = read_published(_save(config, tensors, tmp_path / "theirs"))
    assert model.plan is not None
    bank = model.plan.build()
    bank.load_state_dict(model.filters)
    hidden = torch.randn(2, 5, WIDTH)
    act = {"gelu": torch.nn.functional.gelu, "relu": torch.relu}[config["hidden_act"]]
    for own, block in zip(bank, blocks, strict=True):
        stem, states = f"{LAYER}.{block}.filter", hidden
        if config["filter_nonlinear"]:
            states = act(states @ tensors[f"{stem}.0.weight"].T + tensors[f"{stem}.0.bias"])
            stem += ".2"
        torch.testing.assert_close(own(hidden), states @ tensors[f"{stem}.weight"].T + tensors[f"{stem}.bias"])


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_what_is_unpacked(case: str, kind: str, tmp_path: Path) -> None:
    how, _, _ = CASES[case]
    config, tensors = _theirs(**how)
    source = _save(config, tensors, tmp_path / "theirs", kind)
    (tmp_path / "theirs/spm.model").write_bytes(b"pieces")
    (tmp_path / "new.tmp/of-an-interrupted-run").mkdir(parents=True)
    unpack_published(source, tmp_path / "new")
    assert {path.name for path in tmp_path.iterdir()} == {"theirs", "new"}
    auto = OF_HEAD[how.get("head", "SequenceClassification")]
    loaded: Any = auto.from_pretrained(tmp_path / "new/model", output_loading_info=True)
    student, report = loaded
    assert not any(report.values()), report
    expected = {name: t for name, t in tensors.items() if "filter" not in name and "position_ids" not in name}
    _assert_same(student.state_dict(), expected)
    _assert_same(load_file(tmp_path / "new/model/model.safetensors"), expected)
    assert student.config.num_labels == (2 if "head" in how else LABELS)
    assert (tmp_path / "new/model/spm.model").read_bytes() == b"pieces"
    model = read_published(source)
    assert read_plan(tmp_path / "new/filters") == model.plan
    _assert_same(load_file(tmp_path / "new/filters/filters.safetensors"), model.filters)


@pytest.mark.parametrize("stage", ["disabled", "none"])
def test_without_filters(stage: str, tmp_path: Path) -> None:
    config, tensors = _theirs(filter_disabled=stage == "disabled", train_filters=False)
    tensors = {name: t for name, t in tensors.items() if "filter" not in name}
    source = _save(config, tensors, tmp_path / "theirs")
    model = read_published(source)
    assert model.plan is None and not model.filters and not model.heads
    unpack_published(source, tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model"]


def test_stage_two_has_filters_but_no_heads_and_absent_options_have_their_defaults(tmp_path: Path) -> None:
    config, tensors = _theirs(filter_output_dim=None)
    config = {key: value for key, value in config.items() if "filter" not in key}
    tensors = {name: t for name, t in tensors.items() if not name.startswith("filter_")}
    model = read_published(_save(config, tensors, tmp_path / "theirs"))
    assert model.plan == FilterPlan((0, 1, 2), WIDTH, WIDTH) and not model.heads and not model.options


def test_tensors_that_are_views_are_written(tmp_path: Path) -> None:
    config, tensors = _theirs()
    tensors = {name: t.T.contiguous().T if t.ndim == 2 else t for name, t in tensors.items()}
    source = _save(config, tensors, tmp_path / "theirs", "bin")
    assert not all(t.is_contiguous() for t in read_published(source).filters.values())
    unpack_published(source, tmp_path / "new")
    _assert_same(load_file(tmp_path / "new/filters/filters.safetensors"), read_published(source).filters)


def _drop(*names: str) -> Callable[[dict[str, Any], Tensors], None]:
    def change(_: dict[str, Any], tensors: Tensors) -> None:
        for name in [n for n in tensors if n.startswith(names)]:
            del tensors[name]

    return change


def _set(**keys: Any) -> Callable[[dict[str, Any], Tensors], None]:
    return lambda config, _: config.update(keys)


def _one_nonlinear(_: dict[str, Any], tensors: Tensors) -> None:
    stem = f"{LAYER}.1.filter"
    for leaf in ("weight", "bias"):
        tensors[f"{stem}.2.{leaf}"] = tensors.pop(f"{stem}.{leaf}")
    tensors |= {f"{stem}.0.weight": torch.zeros(WIDTH, WIDTH), f"{stem}.0.bias": torch.zeros(WIDTH)}


def _one_narrower(_: dict[str, Any], tensors: Tensors) -> None:
    tensors[f"{LAYER}.1.filter.weight"] = torch.zeros(OUTPUT - 1, WIDTH)
    tensors[f"{LAYER}.1.filter.bias"] = torch.zeros(OUTPUT - 1)


CONTRADICTIONS: list[tuple[Callable[[dict[str, Any], Tensors], None], str]] = [
    (_drop(f"{LAYER}.1.filter"), r"filter_interval 1\) filters are on layers \[0, 1, 2\], by its weights \[0, 2\]"),
    (_set(filter_interval=2), r"filter_interval 2\) filters are on layers \[1\], by its weights \[0, 1, 2\]"),
    (_set(filter_disabled=True), r"filter_disabled True\) filters are on layers \[\], by its weights \[0, 1, 2\]"),
    (_drop(f"{LAYER}.1.filter.bias"), r"layer 1 has the tensors \['bias', 'weight'\], by its weights \['weight'\]"),
    (
        _set(filter_nonlinear=True),
        r"filter_nonlinear True\) the filter of layer 0 has .*'2.weight'\], by its weights \['bias', 'weight'\]",
    ),
    (
        _one_nonlinear,
        r"filter_nonlinear False\) the filter of layer 1 has .* \['bias', 'weight'\], by its weights \['0.bias',",
    ),
    (
        _one_narrower,
        r"filter_output_dim 6, .*layer\.1\.filter\.weight has the shape \(6, 8\), by its weights \(5, 8\)",
    ),
    (
        _set(filter_output_dim=7),
        r"filter_output_dim 7, .*layer\.0\.filter\.weight .* \(7, 8\), by its weights \(6, 8\)",
    ),
    (_set(filter_output_dim=None), r"filter_output_dim None, hidden_size 8\) .* \(8, 8\), by its weights \(6, 8\)"),
    (_set(hidden_size=None), r"config\.json has hidden_size None, expected a number"),
    (
        _drop(f"{LAYER}.0.filter", f"{LAYER}.1.filter", f"{LAYER}.2.filter"),
        r"has filter heads \(filter_head\.0\.bias\)",
    ),
]


@pytest.mark.parametrize(("change", "message"), CONTRADICTIONS)
def test_config_and_weights_that_do_not_belong_together(
    change: Callable[[dict[str, Any], Tensors], None], message: str, tmp_path: Path
) -> None:
    config, tensors = _theirs()
    change(config, tensors)
    source = _save(config, tensors, tmp_path / "theirs")
    with pytest.raises(CheckpointError, match=f"^{re.escape(source)}.*{message}"):
        unpack_published(source, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


@pytest.mark.parametrize(("part", "shape"), [("weight", (7, 8)), ("bias", (7,))])
def test_inner_tensors_of_another_width(part: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    config, tensors = _theirs(nonlinear=True)
    tensors[f"{LAYER}.2.filter.0.{part}"] = torch.zeros(shape)
    message = rf"hidden_size 8\) .*layer\.2\.filter\.0\.{part} has .*, by its weights {re.escape(str(shape))}"
    with pytest.raises(CheckpointError, match=message):
        read_published(_save(config, tensors, tmp_path / "theirs"))


def test_folders_that_are_not_whole(tmp_path: Path) -> None:
    def refused(message: str, source: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            read_published(source)

    config, tensors = _theirs()
    folder = tmp_path / "theirs"
    source = _save(config, tensors, folder)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9])
    refused(r"^the safetensors of .*/theirs are torn \(.+\): copy or download", source)
    (folder / "model.safetensors").unlink()
    refused(r"/theirs has no weights: expected model\.safetensors or pytorch_model\.bin", source)
    for content in (b"", b"no pickle", b"PK\x03\x04"):
        (folder / "pytorch_model.bin").write_bytes(content)
        refused(r"^.*/theirs/pytorch_model\.bin is torn, or holds more than tensors.*: convert it to", source)
    torch.save({"w": torch.nn.Linear(2, 2)}, folder / "pytorch_model.bin")  # a class: only an unsafe load takes it
    refused(r"pytorch_model\.bin is torn, or holds more than tensors.*: convert it to model\.safetensors", source)
    for other in ([torch.zeros(1)], {"model": tensors, "step": 3}):
        torch.save(other, folder / "pytorch_model.bin")
        refused(r"pytorch_model\.bin does not hold tensors by name alone", source)
    (folder / "pytorch_model.bin").unlink()
    (folder / "config.json").write_text("{")
    refused(r"/theirs/config\.json is not valid JSON \(.+\)", source)
    assert not is_published(source)
    (folder / "config.json").write_text("[]")
    refused(r"has model_type None, not 'ted-deberta-v2'", source)
    (folder / "config.json").write_text('{"model_type": "deberta-v2"}')
    refused(r"/theirs has model_type 'deberta-v2', not 'ted-deberta-v2': load it as a plain model", source)
    assert not is_published(source)
    (folder / "config.json").unlink()
    refused(r"/theirs has no config\.json", source)
    assert not is_published(source)
    refused(r"/none has no config\.json", str(tmp_path / "none"))
    assert not is_published(str(tmp_path / "none"))
    sharded = Path(_save(config, tensors, tmp_path / "shards", "shards"))
    next(sharded.glob("*00002-of*")).unlink()
    refused(r"/shards lacks pytorch_model-00002-of-00002\.bin, which its pytorch_model\.bin\.index\.json", str(sharded))


def test_a_folder_that_exists_is_not_written_over(tmp_path: Path) -> None:
    config, tensors = _theirs()
    source = _save(config, tensors, tmp_path / "theirs")
    with pytest.raises(CheckpointError, match=r"/theirs exists already: delete it, or choose another folder"):
        unpack_published(source, tmp_path / "theirs")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]
    _assert_same(load_file(tmp_path / "theirs/model.safetensors"), tensors)
