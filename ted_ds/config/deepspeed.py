"""A recipe and an ordinary DeepSpeed file -> the dict of one engine; the one place that solves batch sizes.

The file owns how state is sharded and moved. What a recipe decides (batch sizes, precision, optimizer,
schedule, clipping) is filled in if the file leaves it out or says "auto"; a file that says otherwise is
refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ted_ds.config.choices import Dtype
from ted_ds.config.schema import RunConfig
from ted_ds.config.shipped import find_file, shipped_folder
from ted_ds.config.tasks import KINDS
from ted_ds.errors import ConfigError

AUTO = Path("auto")
"""`deepspeed: auto`, which `ted_ds.choose_engines` replaces by a file."""

QUIET = 10**9
"""`steps_per_print` that never prints: ted_ds has its own log."""


def accumulation_steps(
    global_batch_size: int, micro_batch_size: int, world_size: int, *, section: str = "train"
) -> int:
    """Micro-batches per rank per optimizer step. Raises ConfigError if the sizes do not divide.

    section: of the recipe that names the global batch size.
    """
    together = micro_batch_size * world_size
    if global_batch_size % together:
        near = max(1, round(global_batch_size / together)) * together
        raise ConfigError(
            f"{section}.global_batch_size ({global_batch_size}) must be a multiple of train.micro_batch_size "
            f"({micro_batch_size}) * world_size ({world_size}) = {together}; {near} is the nearest"
        )
    return global_batch_size // together


def trained_engine_config(
    run: RunConfig,
    *,
    world_size: int,
    cpu: bool,
    learning_rate: float | None = None,
    weight_decay: float | None = None,
    global_batch_size: int | None = None,
) -> dict[str, Any]:
    """The DeepSpeed dict of an engine that trains: the student's, or Stage I's filters'.

    cpu: whether the accelerator is the CPU. learning_rate: the peak; the caller's scheduler scales it.
    learning_rate, weight_decay, global_batch_size (rows of a step): None is Stage II's, of the sections optimizer and
    train.
    The optimizer is torch's fused AdamW, which needs no compiler; DeepSpeed's CPUAdam (compiled at the first
    start) only if the file offloads a GPU's optimizer.
    Raises ConfigError for a file that cannot be read or contradicts the recipe.
    """
    path = find_deepspeed_file(run.deepspeed)
    config = _read_json(path)
    optimizer, train = run.optimizer, run.train
    accumulation = accumulation_steps(
        global_batch_size or train.global_batch_size,
        train.micro_batch_size,
        world_size,
        section="filters" if global_batch_size else "train",
    )
    if KINDS[run.spec.kind].compares_rows and run.loss.kl_alpha and accumulation > 1 and global_batch_size is None:
        raise ConfigError(
            f"task: {run.task} with loss.kl_alpha {run.loss.kl_alpha:g} compares a step's rows with each other, but "
            f"they are split into {accumulation} micro-batches: set train.micro_batch_size to "
            f"{train.micro_batch_size * accumulation}, or loss.kl_alpha to 0"
        )
    _refuse(path, config, "scheduler", "the recipe's optimizer.schedule decides the learning rate")
    _fill_batch_sizes(
        path,
        config,
        micro=train.micro_batch_size,
        accumulation=accumulation,
        world_size=world_size,
    )
    _fill_precision(path, config, run.student.dtype, "student.dtype")
    _fill(path, config, "gradient_clipping", optimizer.gradient_clipping, "optimizer.gradient_clipping")
    params = {
        "lr": optimizer.learning_rate if learning_rate is None else learning_rate,
        "betas": list(optimizer.betas),
        "eps": optimizer.epsilon,
        "weight_decay": optimizer.weight_decay if weight_decay is None else weight_decay,
    }
    if cpu or "offload_optimizer" not in config.get("zero_optimization", {}):
        params |= {"torch_adam": True, "fused": True}
        config["zero_force_ds_cpu_optimizer"] = False
    _fill(path, config, "optimizer", {"type": "AdamW", "params": params}, "the section optimizer")
    config.setdefault("zero_allow_untested_optimizer", True)
    # it waits for the device twice a micro-batch, for a number that nobody prints
    config.setdefault("timers", {"throughput": {"enabled": False}})
    config.setdefault("steps_per_print", QUIET)
    return _without_auto(config)


def frozen_engine_config(run: RunConfig, *, world_size: int) -> dict[str, Any]:
    """The DeepSpeed dict of the engine that shards the frozen model: ZeRO stage 3 without an optimizer.

    Raises ConfigError for a file that cannot be read, trains, or contradicts the recipe.
    """
    if run.teacher is None:
        raise ConfigError("a frozen engine needs a teacher: give teacher.model")
    path = find_deepspeed_file(run.teacher.deepspeed)
    config = _read_json(path)
    for key in ("optimizer", "scheduler", "gradient_clipping"):
        _refuse(path, config, key, "the teacher is frozen")
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage != 3:
        raise ConfigError(
            f"{path}: zero_optimization.stage is {stage}, but teacher.sharding: zero3 needs 3: "
            "set it, or choose teacher.sharding: replicated"
        )
    _fill_batch_sizes(path, config, micro=run.train.micro_batch_size, accumulation=1, world_size=world_size)
    _fill_precision(path, config, run.teacher.dtype, "teacher.dtype")
    config.setdefault("steps_per_print", QUIET)
    return _without_auto(config)


def find_deepspeed_file(path: Path) -> Path:
    """`path` from the working directory or, if it is not there, from this copy of ted_ds.

    Raises ConfigError if neither has it.
    """
    if path == AUTO:
        raise ConfigError("deepspeed: auto was not replaced: call ted_ds.choose_engines(run, world) before")
    if (found := find_file(path)) is None:
        places = f"neither in {Path.cwd()} nor in {shipped_folder()}"
        raise ConfigError(f"the DeepSpeed file {path} is {places}: give an existing one")
    return found


def _read_json(path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice = [key for key in dict.fromkeys(keys) if keys.count(key) > 1]
        if twice:
            raise ConfigError(f"{path}: the key {twice[0]!r} stands twice: remove one")
        return dict(pairs)

    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the DeepSpeed file cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: a DeepSpeed file is a JSON object, this is {config!r:.60}")
    if not isinstance(zero := config.setdefault("zero_optimization", {}), dict):
        raise ConfigError(
            f'{path}: zero_optimization is {json.dumps(zero)}: write an object with a stage, e.g. {{"stage": 3}}'
        )
    zero.setdefault("stage", 0)
    return config


def _fill_batch_sizes(path: Path, config: dict[str, Any], *, micro: int, accumulation: int, world_size: int) -> None:
    batch = micro * accumulation * world_size
    solved = f"the recipe's batch sizes on {world_size} rank{'s' * (world_size > 1)}"
    _fill(path, config, "train_micro_batch_size_per_gpu", micro, "train.micro_batch_size")
    _fill(path, config, "gradient_accumulation_steps", accumulation, solved)
    _fill(path, config, "train_batch_size", batch, solved)


def _fill_precision(path: Path, config: dict[str, Any], dtype: Dtype, origin: str) -> None:
    fp16 = config.pop("fp16", "auto")
    if isinstance(fp16, dict) and fp16.get("enabled") not in (None, False, "auto"):
        raise ConfigError(f"{path}: fp16.enabled is true, but ted_ds trains in float32 or bfloat16: remove fp16")
    _fill(path, config, "bf16", {"enabled": dtype == "bfloat16"}, f"{origin}: {dtype}")


def _fill(path: Path, config: dict[str, Any], key: str, value: Any, origin: str, *, parent: str = "") -> None:
    """Sets `key`, recursively, if the file leaves it open; other keys beside it stay the file's."""
    given = config.get(key, "auto")
    if isinstance(value, dict) and isinstance(given, dict):
        for name, part in value.items():
            _fill(path, given, name, part, origin, parent=f"{parent}{key}.")
    elif given == "auto":
        config[key] = value
    elif given != value:
        raise ConfigError(
            f"{path}: {parent}{key} is {json.dumps(given)}, but {origin} makes it {json.dumps(value)}: "
            f'write "auto" or leave {parent}{key} out, and set it in the recipe'
        )


def _without_auto(config: dict[str, Any]) -> dict[str, Any]:
    """What the recipe does not decide and the file leaves to "auto" (as files for transformers do) is DeepSpeed's."""
    kept = {key: _without_auto(value) if isinstance(value, dict) else value for key, value in config.items()}
    return {key: value for key, value in kept.items() if value != "auto"}


def _refuse(path: Path, config: dict[str, Any], key: str, reason: str) -> None:
    given = config.pop(key, "auto")
    if given != "auto":
        raise ConfigError(f"{path}: {key} is {json.dumps(given)}, but {reason}: leave {key} out")
