"""Stage I's filters on disk: a folder of filters.safetensors and filters.json."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from ted_ds.errors import CheckpointError
from ted_ds.models.filters import FilterPlan
from ted_ds.models.loading import DTYPES, is_sharded, load_tensors, sharded_init


def new_filters(
    plan: FilterPlan, deepspeed_config: dict[str, Any] | None, dtype: str, basis: torch.Tensor | None = None
) -> nn.ModuleList:
    """Fresh filters, sharded as they are made if the configuration shards. basis: see `FilterPlan.build`."""
    with sharded_init(deepspeed_config):
        bank = plan.build(basis)
    # a sharded tensor has its dtype by the configuration, and must not be cast from outside
    return bank if is_sharded(deepspeed_config) else bank.to(DTYPES[dtype])


def load_filters(folder: Path, deepspeed_config: dict[str, Any] | None, dtype: str, *, is_main: bool) -> nn.ModuleList:
    """Stage I's filters from their folder, sharded as they are made if the configuration shards; a collective."""
    plan = read_plan(folder)
    bank = new_filters(plan, deepspeed_config, dtype)
    load_tensors(bank, folder / "filters.safetensors", is_main=is_main)
    return bank


def write_filters(bank: nn.ModuleList, plan: FilterPlan, folder: Path) -> None:
    """Writes filters as they are into a new folder, as Stage I leaves its own."""
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in bank.state_dict().items()}, folder / "filters.safetensors")
    (folder / "filters.json").write_text(json.dumps({"plan": asdict(plan)}) + "\n", encoding="utf-8")


def read_plan(folder: Path) -> FilterPlan:
    """The shape of a Stage I folder's filters; CheckpointError if the folder is not whole."""
    try:
        card = json.loads((folder / "filters.json").read_text(encoding="utf-8"))
        return FilterPlan(**{**card["plan"], "blocks": tuple(card["plan"]["blocks"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} holds no whole filters ({error}); delete it to learn them anew") from error


def copy_filters(source: Path, folder: Path) -> None:
    """Takes over filters that came with a checkpoint; renamed into place."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)
    temporary.rename(folder)
