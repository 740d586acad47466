"""Batch sizes are solved and DeepSpeed files filled in one place, which refuses contradictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from ted_ds.config.choices import Sharding
from ted_ds.config.deepspeed import (
    accumulation_steps,
    find_deepspeed_file,
    frozen_engine_config,
    trained_engine_config,
)
from ted_ds.config.schema import RunConfig
from ted_ds.config.shipped import shipped_folder
from ted_ds.errors import ConfigError
from ted_ds.teacher.hosting import HOSTS


def make_run(**changes: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "output_dir": "runs/demo",
            "teacher": {"model": "gpt2", "dtype": "float32"},
            "student": {"model": "gpt2"},
            "data": {"train": ["a.txt"], "tokenizer": "gpt2"},
            "train": {"global_batch_size": 16, "micro_batch_size": 2},
        }
        | changes
    )


def trained(run: RunConfig, *, world_size: int = 2, cpu: bool = True) -> dict[str, Any]:
    return trained_engine_config(run, world_size=world_size, learning_rate=1e-3, weight_decay=0.1, cpu=cpu)


@pytest.fixture
def ds_file(tmp_path: Path):
    def write(content: dict[str, Any] | str) -> Path:
        path = tmp_path / "ds.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


@pytest.mark.parametrize(("sizes", "expected"), [((16, 4, 1), 4), ((16, 4, 2), 2), ((16, 4, 4), 1)])
def test_accumulation_fills_the_global_batch(sizes, expected):
    assert accumulation_steps(*sizes) == expected


def test_sizes_that_do_not_divide_are_shown():
    with pytest.raises(ConfigError) as caught:
        accumulation_steps(250, 4, 8)
    assert str(caught.value) == (
        "train.global_batch_size (250) must be a multiple of train.micro_batch_size (4) * world_size (8) = 32"
        "; 256 is the nearest"
    )


def test_the_recipe_fills_the_shipped_file():
    config = trained(make_run())
    shipped = json.loads((shipped_folder() / "ds_configs/zero3.json").read_text())
    assert config.pop("zero_optimization") == shipped["zero_optimization"]
    assert config == {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
        "bf16": {"enabled": True},
        "gradient_clipping": 1.0,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": 1e-3,
                "betas": [0.9, 0.95],
                "eps": 1e-8,
                "weight_decay": 0.1,
                "torch_adam": True,
                "fused": True,
            },
        },
        "timers": {"throughput": {"enabled": False}},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "data_types": {"grad_accum_dtype": "fp32"},
    }


@pytest.mark.parametrize(("name", "torchs"), [("zero3", True), ("zero3_offload", False)])
def test_a_gpus_offloaded_optimizer_alone_is_deepspeeds(name, torchs):
    config = trained(make_run(deepspeed=f"ds_configs/{name}.json"), cpu=False)
    assert ("torch_adam" in config["optimizer"]["params"]) == torchs
    assert ("zero_force_ds_cpu_optimizer" in config) == torchs


def test_the_teacher_has_its_own_precision_and_no_optimizer():
    config = frozen_engine_config(make_run(), world_size=2)
    assert config["bf16"] == {"enabled": False}
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (2, 1)
    assert config["train_batch_size"] == 4
    assert config["zero_optimization"]["stage"] == 3
    assert "optimizer" not in config and "gradient_clipping" not in config


def test_every_sharding_has_a_host_that_is_configured_early():
    assert {*HOSTS, "auto"} == set(get_args(Sharding))
    run = make_run()
    configs = {name: host.engine_config(run, 2) for name, host in HOSTS.items()}
    assert configs == {"replicated": None, "zero3": frozen_engine_config(run, world_size=2)}
    assert [name for name, host in HOSTS.items() if host.whole_copy] == ["replicated"]


@pytest.mark.parametrize("name", sorted(p.name for p in (shipped_folder() / "ds_configs").glob("*.json")))
def test_every_shipped_file_fits_a_recipe(name):
    run = make_run(deepspeed=f"ds_configs/{name}")
    assert trained(run)["train_batch_size"] == 16


def test_what_nobody_decides_is_left_to_deepspeed(ds_file):
    path = ds_file({"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}, "wall_clock_breakdown": "auto"})
    config = trained(make_run(deepspeed=path))
    assert config["zero_optimization"] == {"stage": 3} and "wall_clock_breakdown" not in config


def test_auto_equal_values_and_the_files_own_keys_are_kept(ds_file):
    path = ds_file(
        {
            "train_batch_size": 16,
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": 1,
            "bf16": {"enabled": "auto", "check_grad_overflow": False},
            "fp16": {"enabled": "auto", "loss_scale": 0},
            "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.95]}},
            "scheduler": "auto",
            "zero_optimization": {"stage": 2},
            "comms_logger": {"enabled": True},
        }
    )
    config = trained(make_run(deepspeed=path))
    assert config["bf16"] == {"enabled": True, "check_grad_overflow": False}
    assert config["optimizer"]["params"]["lr"] == 1e-3
    assert config["comms_logger"] == {"enabled": True}
    assert "fp16" not in config and "scheduler" not in config


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            {"train_batch_size": 32},
            "train_batch_size is 32, but the recipe's batch sizes on 2 ranks makes it 16",
        ),
        ({"train_micro_batch_size_per_gpu": 1}, "_per_gpu is 1, but train.micro_batch_size makes it 2"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps is 1, but"),
        (
            {"gradient_clipping": 0.5},
            "gradient_clipping is 0.5, but optimizer.gradient_clipping makes it 1.0",
        ),
        ({"bf16": {"enabled": False}}, "bf16.enabled is false, but student.dtype: bfloat16 makes it true"),
        (
            {"fp16": {"enabled": True}},
            "fp16.enabled is true, but ted_ds trains in float32 or bfloat16: remove fp16",
        ),
        (
            {"optimizer": {"type": "Lion"}},
            'optimizer.type is "Lion", but the section optimizer makes it "AdamW"',
        ),
        (
            {"optimizer": {"params": {"lr": 1}}},
            "optimizer.params.lr is 1, but the section optimizer makes it 0.001",
        ),
        ({"scheduler": {"type": "WarmupLR"}}, 'scheduler is {"type": "WarmupLR"}, but the recipe\'s'),
    ],
)
def test_contradictions_show_file_key_and_both_values(ds_file, content, expected):
    path = ds_file(content)
    with pytest.raises(ConfigError) as caught:
        trained(make_run(deepspeed=path))
    assert expected in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            {"zero_optimization": {"stage": 2}},
            "zero_optimization.stage is 2, but teacher.sharding: zero3 needs 3",
        ),
        ({}, "zero_optimization.stage is 0, but"),
        (
            {"zero_optimization": {"stage": 3}, "optimizer": {"type": "AdamW"}},
            "but the teacher is frozen: leave",
        ),
    ],
)
def test_a_teachers_file_shards_and_does_not_train(ds_file, content, expected):
    run = make_run(teacher={"model": "gpt2", "deepspeed": ds_file(content)})
    with pytest.raises(ConfigError, match=expected):
        frozen_engine_config(run, world_size=1)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{\n  "a": 1,\n  b\n}', ":3: not valid JSON"),
        ("[]", ": a DeepSpeed file is a JSON object, this is []"),
        ('{"bf16": {}, "bf16": {}}', ": the key 'bf16' stands twice: remove one"),
    ],
)
def test_unreadable_files_are_named(ds_file, content, expected):
    path = ds_file(content)
    with pytest.raises(ConfigError) as caught:
        trained(make_run(deepspeed=path))
    assert str(caught.value).startswith(f"{path}{expected}")


def test_shipped_files_are_found_from_anywhere_and_own_ones_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = Path("ds_configs/zero3.json")
    assert find_deepspeed_file(name) == shipped_folder() / name
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / name).write_text("{}")
    assert find_deepspeed_file(name) == name
    with pytest.raises(ConfigError, match=r"ds_configs/nope.json is neither in .* nor in .*: give an existing one"):
        find_deepspeed_file(Path("ds_configs/nope.json"))
