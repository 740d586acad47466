"""Hosts of the frozen side: every rank a copy, or one copy in ZeRO-3 shards over all ranks."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch

from ted_ds.models.leaf_blocks import handle_whole_blocks
from ted_ds.teacher.frozen import FrozenModel, FrozenModule


def host_frozen(module: FrozenModule, device: torch.device, deepspeed_config: dict[str, Any] | None) -> FrozenModel:
    """`module` behind a ZeRO-3 engine without optimizer, or on this rank's device (config None)."""
    if deepspeed_config is None:
        return FrozenModel(module.to(device))
    handle_whole_blocks(module.structure, trained=False)
    engine, *_ = deepspeed.initialize(model=module, config=deepspeed_config)
    engine.eval()
    return FrozenModel(module, engine)
