"""The engine of what is trained: the student with its filters, or Stage I's filters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed
from deepspeed.accelerator import get_accelerator
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ted_ds.distill.distillation_model import DistillationModel
from ted_ds.models.leaf_blocks import handle_whole_blocks
from ted_ds.models.loading import is_sharded


def build_trained_engine(
    module: nn.Module, *, deepspeed_config: dict[str, Any], schedule: Callable[[int], float]
) -> deepspeed.DeepSpeedEngine:
    """`module` in a DeepSpeed engine with AdamW, its state sharded as `deepspeed_config` says.

    schedule: step -> multiplier of the learning rate. Matrices decay, vectors (norms, biases) do not.
    """
    # On the CPU little is gained, and a run that an earlier version began would go on with other last digits: DeepSpeed
    # adds up the norm of gradients, by which they are clipped, in another order.
    on_gpu = get_accelerator().device_name() != "cpu"
    if on_gpu and is_sharded(deepspeed_config) and isinstance(module, DistillationModel):
        handle_whole_blocks(module.structure, trained=True)
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in module.parameters():
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)
            (matrices if len(shape) > 1 else vectors).append(parameter)
    # without ZeRO, DeepSpeed's bfloat16 optimizer makes its state by a step on zero gradients: that must not decay
    stage = deepspeed_config.get("zero_optimization", {}).get("stage", 0)
    blank_step = deepspeed_config.get("bf16", {}).get("enabled", False) and not stage
    decaying = {"params": matrices, **({"weight_decay": 0.0} if blank_step else {})}
    groups: list[dict[str, Any]] = [decaying, {"params": vectors, "weight_decay": 0.0}]
    engine, *_ = deepspeed.initialize(
        model=module,
        model_parameters=[group for group in groups if group["params"]],
        config=deepspeed_config,
        lr_scheduler=lambda optimizer: LambdaLR(optimizer, schedule),
    )
    if blank_step:
        _forget_blank_step(engine, decays=bool(matrices))
    return engine


def _forget_blank_step(engine: Any, *, decays: bool) -> None:
    """As if no step had been: Adam's bias correction counts from 0; matrices, the first group, decay from now on."""
    adam = engine.optimizer.optimizer
    for state in adam.state.values():
        state["step"].zero_()
    if decays:
        adam.param_groups[0]["weight_decay"] = adam.defaults["weight_decay"]
