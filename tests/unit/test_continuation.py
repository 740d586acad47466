"""What another start on the same folder may change of a recipe, and what an earlier version wrote of it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from ted_ds.config.continuation import DECIDES, MAY_CHANGE, as_begun, deciding, first_change
from ted_ds.config.data_section import HubDataset
from ted_ds.config.load import _alternatives, dump_config, load_config
from ted_ds.config.schema import RunConfig
from ted_ds.config.sections import FiltersConfig
from ted_ds.data.manifests import entry_names, reread_names
from ted_ds.errors import CheckpointError, ConfigError
from ted_ds.pipeline.run import _claim
from ted_ds.pipeline.stage1 import ORIGIN, _learning, _refuse_other_origin

EARLIER = """
task: causal-lm
method: ted
output_dir: runs/earlier
seed: 0
deepspeed: ds_configs/zero3.json
teacher: {model: t, sharding: zero3, dtype: float32, deepspeed: ds_configs/teacher_zero3.json, cache: null,
  trust_remote_code: false}
student:
  model: null
  init: {blocks: uniform, num_blocks: 2, hidden_size: null, num_heads: null, intermediate_size: null, config: null}
  pretrained: null
  init_from_pretrained: false
  dtype: float32
  activation_checkpointing: false
  dropout: 0.0
  head_dropout: null
  trust_remote_code: false
filters: {output_dim: null, nonlinear: false, layer_map: uniform, learning_rate: {teacher: 0.01, student: 0.01},
  steps: 8, epochs: null, warmup_steps: null, global_batch_size: null, head_dropout: null, token_fraction: 1.0}
loss: {kl_alpha: 1.0, mse_alpha: 10.0, temperature: 2.0, divergence: forward, kl_top_k: null,
  layer_loss: normalized_mse, residual_dtype: same, mask_padding: true}
data:
  train: [train.txt, {hub: o/x, name: null, split: train, streaming: false}]
  validation: [validation.txt]
  extra_validation: {}
  text_column: text
  text_columns: null
  label_column: null
  labels: null
  tokenizer: t
  sequence_length: 12
  doc_stride: 128
  prepared: null
  processes: 1
  train_tokenizer: null
optimizer: {learning_rate: 0.01, weight_decay: 0.1, betas: [0.9, 0.95], epsilon: 1.0e-08, warmup_steps: 2,
  schedule: cosine, final_ratio: 0.1, gradient_clipping: 1.0}
train: {steps: 16, epochs: null, global_batch_size: 4, micro_batch_size: 1, evaluate_every: 4, save_every: 3,
  keep_last: 2, keep_every: 0, max_skipped_steps: 5, max_minutes: null, timeout_minutes: 30.0}
logging: {every: 1, tensorboard: false}
environment: {torch: 2.13.0+cpu, deepspeed: 0.19.8, transformers: 5.23.0, commit: 859b5d4}
"""
"""config.yaml as commit 859b5d4 wrote it."""

CHANGES: dict[str, Any] = {
    "attn_implementation": "eager",
    "data.prepared": "elsewhere",
    "data.processes": 7,
    "deepspeed": "other.json",
    "logging.every": 3,
    "logging.tensorboard": True,
    "output_dir": "moved",
    "student.activation_checkpointing": True,
    "student.trust_remote_code": True,
    "teacher.cache": "cache",
    "teacher.deepspeed": "other.json",
    "teacher.sharding": "replicated",
    "teacher.trust_remote_code": True,
    "train.evaluate_every": "epoch",
    "train.keep_every": 9,
    "train.keep_last": 9,
    "train.max_minutes": 9.0,
    "train.max_skipped_steps": 9,
    "train.micro_batch_size": 2,
    "train.save_every": "epoch",
    "train.steps": 99,
    "train.timeout_minutes": 9.0,
}


def recipe(**changes: Any) -> RunConfig:
    """The recipe of the earlier run; `changes` by dotted key with `__` for the dot."""
    values = yaml.safe_load(EARLIER)
    del values["environment"]
    del values["loss"]["residual_dtype"]  # a key of that version
    values["filters"]["learn"] = "always"  # what that version did
    for dotted, value in changes.items():
        *path, last = dotted.split("__")
        place = values
        for key in path:
            place = place[key]
        place[last] = value
    return RunConfig.model_validate(values)


def keys_of_the_schema() -> Iterator[str]:
    for name, field in RunConfig.model_fields.items():
        sections = [part for part in _alternatives(field.annotation) if isinstance(part, type)]
        inner = [f"{name}.{key}" for part in sections if issubclass(part, BaseModel) for key in part.model_fields]
        yield from inner or [name]


def test_every_key_of_the_schema_either_decides_or_may_change() -> None:
    assert set(keys_of_the_schema()) == DECIDES | MAY_CHANGE, "a key of the schema has its place in one of the two sets"
    assert not DECIDES & MAY_CHANGE


def test_a_recipe_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    run = recipe(output_dir=str(tmp_path))
    (tmp_path / "config.yaml").write_text(EARLIER)
    _claim(run, export=False)
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert RunConfig.model_validate({k: v for k, v in written.items() if k != "environment"}) == run


def test_a_default_of_today_does_not_change_a_run_that_was_begun() -> None:
    values = yaml.safe_load(EARLIER)
    before = copy.deepcopy(values)
    del values["environment"], values["loss"]["residual_dtype"]
    del values["filters"]["layer_map"], values["student"]["init"]["blocks"]
    today = RunConfig.model_validate(values)
    assert today.student.init is not None and today.student.init.blocks != "uniform"
    begun = as_begun(today, before)
    assert begun.student.init is not None
    assert (begun.student.init.blocks, begun.filters.layer_map) == ("uniform", "uniform")
    assert first_change(before, begun, "config.yaml") is None
    values["filters"]["layer_map"] = "last"
    assert as_begun(RunConfig.model_validate(values), before).filters.layer_map == "last"
    before["filters"]["layer_map"] = "last"
    assert as_begun(today, before).filters.layer_map is None


def test_a_run_that_began_with_the_former_layer_loss_keeps_it() -> None:
    before = yaml.safe_load(EARLIER)
    values = recipe().model_dump(mode="json")
    for key in ("layer_loss", "mse_alpha", "balance", "layer_fade"):
        del values["loss"][key]
    today = RunConfig.model_validate(values)
    assert (today.loss.layer_loss, today.loss.mse_alpha, today.loss.balance) == ("rms_mse", 1, "gradient")
    begun = as_begun(today, before)
    loss = begun.loss
    assert (loss.layer_loss, loss.mse_alpha, loss.balance, loss.layer_fade) == ("normalized_mse", 10, "none", 0)
    assert first_change(before, begun, "config.yaml") is None
    given = RunConfig.model_validate({**values, "loss": {**values["loss"], "layer_loss": "rms_mse"}})
    change = first_change(before, as_begun(given, before), "config.yaml")
    assert change == "loss.layer_loss: normalized_mse, this recipe says rms_mse"
    written = yaml.safe_load(yaml.safe_dump(today.model_dump(mode="json")))
    assert as_begun(today, written) == today  # a run of today stays as it is


def test_a_run_that_began_with_stage_1_has_it() -> None:
    before = yaml.safe_load(EARLIER)
    values = recipe().model_dump(mode="json")
    del values["filters"]["learn"]
    today = RunConfig.model_validate(values)
    begun = as_begun(today, before)
    assert (today.filters.learn, begun.filters.learn) == ("auto", "always")
    assert first_change(before, begun, "config.yaml") is None
    given = RunConfig.model_validate({**values, "filters": {**values["filters"], "learn": "auto"}})
    assert first_change(before, as_begun(given, before), "config.yaml") is not None


def test_a_section_that_was_null_has_no_former_defaults() -> None:
    values = recipe().model_dump(mode="json")
    values["student"] = {"init": {"num_blocks": 2}}
    today = RunConfig.model_validate(values)
    assert as_begun(today, {**values, "student": {"model": "typo", "init": None}}).student == today.student


SMALL = RunConfig.model_validate(
    {
        "output_dir": "o",
        "student": {"init": {"num_blocks": None}},
        "teacher": {"model": "t"},
        "data": {"train": [{"hub": "o/x"}], "tokenizer": "t"},
    }
)
"""A recipe of defaults."""

NEEDED = ("output_dir", "student", "student.init", "teacher", "teacher.model", "data", "data.train", "data.tokenizer")


def written_keys(value: Any, before: str = "") -> Iterator[str]:
    """The dotted keys of a written recipe, sections too; Stage I's pairs {teacher, student} are one value."""
    if isinstance(value, dict) and value.keys() != {"teacher", "student"}:
        for name, inner in value.items():
            yield before + name
            yield from written_keys(inner, f"{before}{name}.")


@pytest.mark.parametrize("key", [key for key in written_keys(SMALL.model_dump(mode="json")) if key not in NEEDED])
def test_a_key_that_was_not_there_yet_has_its_default(tmp_path: Path, key: str) -> None:
    """Each key in turn is dropped from a written recipe, as if it had come later."""
    run = SMALL.model_copy(update={"output_dir": tmp_path})
    dump_config(run, tmp_path / "config.yaml", {})
    place = written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    *sections, last = key.split(".")
    for section in sections:
        place = place[section]
    del place[last]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written))
    _claim(run, export=False)
    assert load_config(tmp_path / "config.yaml") == run


def test_a_whole_section_may_have_come_later() -> None:
    written = {name: section for name, section in yaml.safe_load(EARLIER).items() if name not in ("optimizer", "loss")}
    run = recipe(optimizer={}, loss={})
    assert first_change(written, run, "config.yaml") is None


def test_what_came_later_and_is_not_the_default_is_another_run(tmp_path: Path) -> None:
    written = yaml.safe_load(EARLIER)
    del written["loss"]["divergence"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written))
    (tmp_path / "metrics.jsonl").touch()  # it has begun
    with pytest.raises(ConfigError) as error:
        _claim(recipe(output_dir=str(tmp_path), loss__divergence="reverse"), export=False)
    assert str(error.value) == (
        f"{tmp_path} holds a run with loss.divergence: forward, this recipe says reverse: give another output_dir, or "
        "delete that folder"
    )
    assert "divergence" not in (tmp_path / "config.yaml").read_text()


def test_what_only_says_how_may_change() -> None:
    assert set(CHANGES) <= MAY_CHANGE
    for key, value in CHANGES.items():
        changed = recipe(**{key.replace(".", "__"): value})
        assert changed != recipe()
        assert first_change(yaml.safe_load(EARLIER), changed, "config.yaml") is None, key


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 1),
        ("student.init", {"num_blocks": 3}),
        ("student.dtype", "bfloat16"),
        ("teacher.model", "u"),
        ("filters.learning_rate", 0.02),
        ("loss.kl_alpha", 2.0),
        ("data.train", ["train.txt"]),
        ("train.global_batch_size", 8),
    ],
)
def test_what_decides_may_not_change(key: str, value: Any) -> None:
    said = first_change(yaml.safe_load(EARLIER), recipe(**{key.replace(".", "__"): value}), "config.yaml")
    assert said is not None and said.startswith(f"{key}: ") and ", this recipe says " in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"old": 1}, "config.yaml: old: this version of ted_ds has no such key: go on with the version that wrote it"),
        ({"student": {"init": {"old": 1}}}, "config.yaml: student.init.old: this version of ted_ds has no such key"),
        (
            {"loss": {"residual_dtype": "float8"}},
            "config.yaml: loss.residual_dtype: this version of ted_ds has no such key",
        ),
        ({"seed": -1}, "config.yaml: seed: this version of ted_ds says: Input should be greater than or equal to 0"),
    ],
)
def test_what_todays_schema_cannot_read_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        first_change({**yaml.safe_load(EARLIER), **changes}, recipe(), "config.yaml")
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_recipe_in_epochs_is_the_same_once_its_steps_are_known() -> None:
    run = recipe(train={"epochs": 3, "evaluate_every": "epoch"})
    assert first_change(deciding(run.resolved(100).model_dump(mode="json")), run, "ted_ds.json") is None
    assert first_change(run.model_dump(mode="json"), run.resolved(100), "config.yaml") is None


def test_a_manifests_hub_data_sets_are_read_through_todays_schema() -> None:
    assert reread_names(['{"hub":"o/x","name":null}', "{a}.txt"]) == entry_names((HubDataset(hub="o/x"), "{a}.txt"))


def test_shared_filters_of_an_earlier_version_are_taken(tmp_path: Path) -> None:
    wanted = {"teacher.dtype": "float32", **_learning(FiltersConfig())}
    earlier = {name: value for name, value in wanted.items() if name != "filters.token_fraction"}
    (tmp_path / ORIGIN).write_text(json.dumps(earlier))
    _refuse_other_origin(tmp_path, wanted)
    with pytest.raises(CheckpointError, match=r"filters.token_fraction 1.0, this run has 0.5"):
        _refuse_other_origin(tmp_path, {**wanted, "filters.token_fraction": 0.5})
