"""Hosts of a frozen model, one for each value of `teacher.sharding`: how it is configured, loaded and placed.

Another host is an entry in `HOSTS` and a value of `Sharding` in the recipe's schema. Recipes are checked, models are
loaded, and memory is estimated through this table alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn

from ted_ds.config.choices import Sharding
from ted_ds.config.deepspeed import frozen_engine_config
from ted_ds.config.schema import RunConfig
from ted_ds.data.tokenizers import Tokenizer
from ted_ds.job.world import World
from ted_ds.models.filter_files import load_filters
from ted_ds.models.fit import fit_to_run
from ted_ds.models.leaf_blocks import handle_whole_blocks
from ted_ds.models.loading import load_model
from ted_ds.tasks.base import Task
from ted_ds.teacher.frozen import FrozenModel, FrozenModule

EngineConfig = dict[str, Any] | None
"""A DeepSpeed configuration; None: the model runs without an engine."""


def host_frozen(module: FrozenModule, device: torch.device, deepspeed_config: EngineConfig) -> FrozenModel:
    """`module` behind a ZeRO-3 engine without optimizer, or on this rank's device (config None)."""
    if deepspeed_config is None:
        return FrozenModel(module.to(device))
    handle_whole_blocks(module.structure, trained=False)
    engine, *_ = deepspeed.initialize(model=module, config=deepspeed_config)
    engine.eval()
    return FrozenModel(module, engine)


@dataclass(frozen=True)
class Host:
    """One way to keep a frozen model in memory.

    engine_config: (run, world_size) -> the configuration under which weights are loaded (ZeRO-3 shards them as they
    are read) and placed. Raises ConfigError if the recipe's DeepSpeed file does not fit; nothing is loaded by then.
    place: puts the loaded module where it runs; a collective. whole_copy: whether every rank holds all weights.
    """

    engine_config: Callable[[RunConfig, int], EngineConfig]
    place: Callable[[FrozenModule, torch.device, EngineConfig], FrozenModel]
    whole_copy: bool


HOSTS: dict[Sharding, Host] = {
    "replicated": Host(lambda run, world_size: None, host_frozen, whole_copy=True),
    "zero3": Host(
        lambda run, world_size: frozen_engine_config(run, world_size=world_size), host_frozen, whole_copy=False
    ),
}
"""teacher.sharding -> its host."""


def load_frozen(
    run: RunConfig,
    world: World,
    name_or_path: str,
    *,
    task: Task,
    tokenizer: Tokenizer,
    trust_remote_code: bool,
    filters: Path | None = None,
) -> FrozenModel:
    """A model frozen and hosted as `teacher.sharding` says, with Stage I's filters if given; a collective."""
    assert run.teacher is not None
    host, dtype = HOSTS[run.teacher.sharding], run.teacher.dtype
    config = host.engine_config(run, world.size)
    model = load_model(
        name_or_path,
        run.spec.kind,
        dtype=dtype,
        deepspeed_config=config,
        dropout=0.0,
        attn_implementation=run.attn_implementation,
        trust_remote_code=trust_remote_code,
    )
    fit_to_run(model, run, tokenizer)
    bank = load_filters(filters, config, dtype, is_main=world.is_main) if filters else nn.ModuleList()
    return host.place(FrozenModule(model, task, bank), world.device, config)
