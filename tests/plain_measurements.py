"""What decides on a student's width, by plain hooks, without ted_ds's calibration."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ted_ds.models.channels import Measurements
from ted_ds.models.families import axes_of, part_read
from ted_ds.models.rotation import principal_basis, within
from ted_ds.models.structure import find_blocks


def plain_measurements(model: Any, ids: torch.Tensor) -> Measurements:
    """Of a model that reads `ids`, [rows, tokens]."""
    width, stack = model.config.get_text_config().hidden_size, find_blocks(model).blocks_path
    moments, channels = torch.zeros(width, width).double(), torch.zeros(width).double()
    energies: dict[str, torch.Tensor] = {}
    handles = []

    def at_norm(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        x = inputs[0].double().flatten(0, -2)
        x = x / x.square().mean(-1, keepdim=True).sqrt()
        moments.add_(x.T @ x / len(x))
        channels.add_(output.double().abs().flatten(0, -2).mean(0))

    for path, module in model.named_modules():
        name, weight = f"{path}.weight", getattr(module, "weight", None)
        if part_read(name) is not None:
            key = f"{name.removeprefix(f'{stack}.').partition('.')[0]}.{within(name, stack)}"

            def at_reader(module: nn.Module, inputs: tuple[torch.Tensor, ...], key: str = key) -> None:
                energies[key] = inputs[0].double().square().flatten(0, -2).mean(0)

            handles.append(module.register_forward_pre_hook(at_reader))
        elif axes_of(name) and weight is not None and weight.shape == (width,):
            handles.append(module.register_forward_hook(at_norm))
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return Measurements(moments, channels, energies, principal_basis(moments))
