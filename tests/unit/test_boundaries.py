"""What a user gives and cannot be used is named in one sentence, and nothing of theirs is lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from ted_ds.config.load import load_config
from ted_ds.config.schema import RunConfig
from ted_ds.config.student_section import InitConfig
from ted_ds.distill.engine_config import check_engine_config
from ted_ds.errors import ConfigError, ModelError, TrainingError
from ted_ds.models.pruning import init_student
from ted_ds.models.weight_check import check_weights
from ted_ds.pipeline.export import export_student
from ted_ds.pipeline.run import run_recipe
from ted_ds.pipeline.stage0 import MODELS, ensure_models
from ted_ds.tasks.registry import open_tokenizer
from tests.alone import Alone
from tests.project import make_project, recipe, write_recipe
from tests.tiny_models import tiny_model

WORLD = cast(Any, Alone())
ZERO3 = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"zero_optimisation": {"stage": 3}}, "zero_optimisation: DeepSpeed has no such key; did you mean zero_opt"),
        ({"banana": 1}, "banana: DeepSpeed has no such key; remove it"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
            "ds.json: Assertion failed, Partial",
        ),
        ({"sparse_gradients": True}, "DeepSpeed refuses it: "),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage is 4: input should be 0, 1, 2, 3"),
        (
            {"zero_optimization": {"stage": 3, "overlap_com": True}},
            "zero_optimization.overlap_com is true: DeepSpeed has",
        ),
        ({"zero_optimization": {"offload_param": {"devise": "cpu"}}}, 'offload_param.devise is "cpu": DeepSpeed has'),
        ({"bf16": {"enabled": "perhaps"}}, 'bf16.enabled is "perhaps": input should be a valid boolean'),
    ],
)
def test_a_key_or_value_that_deepspeed_does_not_know(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_engine_config(Path("ds.json"), ZERO3 | config)
    assert str(caught.value).startswith("ds.json: ") and message in str(caught.value)


def test_a_comment_is_no_key() -> None:
    check_engine_config(Path("ds.json"), ZERO3 | {"_comment": "why", "//": "this"})


def test_the_shipped_deepspeed_files_are_known() -> None:
    for path in Path("ds_configs").glob("*.json"):
        content = json.loads(path.read_text())
        check_engine_config(path, {key: value for key, value in content.items() if value != "auto"} | ZERO3)


@pytest.mark.parametrize(
    "given", ["student.model", "teacher.model", "student.pretrained", "data.tokenizer", "data.train"]
)
@pytest.mark.parametrize("place", ["student", "initial_student/deeper", "best", "data/train"])
def test_what_the_run_would_replace_is_refused(tmp_path: Path, given: str, place: str) -> None:
    if given == "student.model" and place.startswith("initial_student"):
        return  # which the run does not make then
    path = str(tmp_path / "out" / place)
    changes: dict[str, Any] = {given.replace(".", "__"): [path] if given == "data.train" else path}
    if given == "student.model":
        changes["student__init"] = None
    if given == "student.pretrained":
        changes |= {"task": "sst2", "student__init": None, "student__init_from_pretrained": True, "method": "kd"}
        changes |= {"data__processes": None}
    run = RunConfig.model_validate(recipe(tmp_path, "out", **changes))
    with pytest.raises(ConfigError, match=rf"{given} is {path}, but the run writes .* itself: give a copy"):
        run_recipe(run, WORLD)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sharding", ["zero3", "replicated"])
@pytest.mark.parametrize("side", ["teacher", "student"])
@pytest.mark.parametrize("fault", ["gone", "renamed", "another shape"])
def test_a_wrong_model_ends_the_run_before_data_is_prepared(
    tmp_path: Path, sharding: str, side: str, fault: str
) -> None:
    project, name = make_project(tmp_path), "model.layers.1.mlp.up_proj.weight"
    shutil.copytree(project / "teacher", project / "own")
    changed = project / ("teacher" if side == "teacher" else "own") / "model.safetensors"
    tensors = load_file(changed)
    tensor = tensors.pop(name)
    if fault != "gone":
        tensors |= {f"_orig_mod.{name}": tensor} if fault == "renamed" else {name: tensor[1:].clone()}
    save_file(tensors, changed, metadata={"format": "pt"})
    changes = {"student": {"model": str(project / "own")}, "teacher__sharding": sharding}
    run = load_config(write_recipe(project, "run", **changes))
    with pytest.raises(ModelError, match=name):
        run_recipe(run, WORLD)
    assert not (project / "run/data").exists()


@pytest.mark.parametrize("pickled", [False, True])
def test_a_teacher_that_changed_between_two_starts_is_refused(tmp_path: Path, pickled: bool) -> None:
    project = make_project(tmp_path)
    run = load_config(write_recipe(project, "run", method="kd", student={"model": str(project / "teacher")}))
    weights = project / "teacher/model.safetensors"
    tensors = load_file(weights)

    def write() -> None:
        if pickled:
            torch.save(tensors, project / "teacher/pytorch_model.bin")
            weights.unlink(missing_ok=True)
        else:
            save_file(tensors, weights, metadata={"format": "pt"})

    write()
    tokenizer = open_tokenizer(run, WORLD)
    for _ in range(2):
        ensure_models(run, tokenizer, WORLD)
    assert set(json.loads((project / "run" / MODELS).read_text())) == {"teacher", "student"}
    tensors["model.norm.weight"] += 1.0
    write()
    with pytest.raises(ModelError, match=r"the teacher .*/teacher has other weights than when the run in"):
        ensure_models(run, tokenizer, WORLD)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer__learning_rate": float("inf")}, "optimizer.learning_rate: inf is not allowed"),
        ({"loss__mse_alpha": float("nan")}, "loss.mse_alpha: nan is not allowed"),
        ({"loss__temperature": float("inf")}, "loss.temperature: inf is not allowed"),
        ({"data__sequence_length": 1}, "data.sequence_length: 1 is not allowed: should be greater than or equal to 2"),
    ],
)
def test_values_that_cannot_train(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write_recipe(tmp_path, "run", **changes))
    assert message in str(caught.value)


def test_a_path_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    changes: dict[str, Any] = {"output_dir": "~/runs/a", "teacher__model": "~/teacher", "data__tokenizer": "~/tok"}
    changes |= {
        "data__train": ["~/a.txt", "b.txt"],
        "data__validation": "~/v.txt",
        "data__prepared": "~/data",
        "deepspeed": "~/ds.json",
    }
    run = RunConfig.model_validate(recipe(tmp_path, "run", **changes))
    assert run.output_dir == tmp_path / "runs/a" and run.data.prepared == tmp_path / "data"
    assert (
        run.data.validation == (f"{tmp_path}/v.txt",)
        and run.data.train == (f"{tmp_path}/a.txt", "b.txt")
        and run.data.tokenizer == f"{tmp_path}/tok"
    )
    assert (
        run.teacher is not None and run.teacher.model == f"{tmp_path}/teacher" and run.deepspeed == tmp_path / "ds.json"
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_layers": 3}, r"init.config.num_layers: a qwen2 has no such field; did you mean num_hidden_layers\?"),
        (
            {"num_attention_heads": 4, "num_key_value_heads": 3},
            "student.init.config: a qwen2 of this config does not run",
        ),
    ],
)
def test_a_config_for_a_random_start_that_cannot_be(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    sizes = {"model_type": "qwen2", "vocab_size": 61, "num_hidden_layers": 2, "hidden_size": 32}
    with pytest.raises(ModelError, match=message):
        init_student(None, InitConfig(config=sizes | config), tmp_path / "s")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama", "rope_theta": 5e5, "torch_dtype": "float32", "num_key_value_heads": 2},
        {"model_type": "gpt_neox", "rotary_pct": 0.5, "intermediate_size": 48, "use_mrope": False},
        {
            "model_type": "qwen2",
            "num_key_value_heads": 2,
            "rope_scaling": None,
            "n_ctx": 64,
            "attn_implementation": "eager",
        },
    ],
)
def test_fields_that_published_configs_have_are_taken(tmp_path: Path, config: dict[str, Any]) -> None:
    sizes = {"vocab_size": 61, "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
    init_student(None, InitConfig(config=sizes | config), tmp_path / "s")


@pytest.mark.parametrize("model_type", ["bert", "deberta-v2"])
def test_labels_are_fields_of_every_config(tmp_path: Path, model_type: str) -> None:
    sizes = {"vocab_size": 61, "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2}
    fields = {"num_labels": 3, "pad_token_id": 0}
    config = sizes | {"model_type": model_type, "position_buckets": 16}
    init_student(None, InitConfig(config=config), tmp_path / "s", kind="classification", defaults=fields)


def test_a_student_that_is_not_finite_is_not_exported(tmp_path: Path) -> None:
    student = tiny_model("llama")
    with torch.no_grad():
        student.model.norm.weight[3] = torch.nan
    with pytest.raises(
        TrainingError, match=r"is not exported to .*/student: model.norm.weight has values that are not"
    ):
        export_student(student, cast(Any, None), tmp_path / "student", WORLD)
    assert not any(tmp_path.iterdir())


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("adapter_config.json", "{}", r"is an adapter \(LoRA\), not a model: merge it"),
        ("model.gguf", "", "is a GGUF file, quantized for inference"),
        ("model.safetensors", POINTER, "model.safetensors is a pointer of git-lfs, .*: run git lfs pull"),
        ("pytorch_model.bin", POINTER, "pytorch_model.bin is a pointer of git-lfs, .*: run git lfs pull"),
        ("pytorch_model.bin", "", "pytorch_model.bin is damaged, maybe cut off"),
    ],
)
def test_what_is_no_model_is_named(tmp_path: Path, file: str, content: str, message: str) -> None:
    if file.startswith(("model.safe", "pytorch")):
        tiny_model("llama").config.save_pretrained(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(ModelError, match=message):
        check_weights("teacher", str(tmp_path), "causal-lm")
