"""What stays of a matrix's inputs makes up for what is gone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from ted_ds.config.student_section import InitConfig
from ted_ds.models import least_squares
from ted_ds.models.channels import Measurements
from ted_ds.models.cut_plan import CutPlan, plan_cut
from ted_ds.models.cut_tensors import Cut
from ted_ds.models.families import part_read
from ted_ds.models.least_squares import RIDGE, reading_basis
from ted_ds.models.pruning import init_student
from ted_ds.models.weight_files import add_weights
from tests.tiny_models import tiny_model

IDS = torch.arange(96).view(8, 12) % 90
FFN_IN = ("up_proj", "gate_proj", "c_fc", "dense_h_to_4h", "fc1")


@pytest.mark.parametrize("columns", [True, False])
def test_it_is_least_squares_of_the_sample_and_of_noise(columns: bool) -> None:
    x = torch.randn(50, 7, dtype=torch.float64) @ torch.randn(7, 7, dtype=torch.float64)
    numbers = torch.tensor([0, 3, 4, 6])
    basis = torch.linalg.qr(torch.randn(7, 4, dtype=torch.float64)).Q if columns else torch.eye(7).double()[:, numbers]
    moments = x.T @ x / len(x)
    noise = (RIDGE * len(x) * moments.diagonal().mean()).sqrt() * torch.eye(7).double()
    seen = torch.cat([x, noise])
    expected = torch.linalg.lstsq(seen @ basis, seen).solution.T
    found = reading_basis(moments, basis if columns else numbers)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    if not columns:
        torch.testing.assert_close(found[numbers], torch.eye(4).double(), rtol=0, atol=1e-9)


def test_inputs_that_are_never_seen_are_cut_plainly() -> None:
    basis = torch.linalg.qr(torch.randn(5, 2, dtype=torch.float64)).Q
    torch.testing.assert_close(reading_basis(torch.zeros(5, 5).double(), basis), basis)


def with_twins(model: Any, units: int) -> None:
    """FFN unit i + units / 2 gives what unit i gives, and counts for less."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            module = name.split(".")[-2]
            if module in FFN_IN:
                one, other = (parameter.T if module == "c_fc" and parameter.ndim == 2 else parameter).chunk(2)
                other.copy_(one)
            elif part_read(name) == "intermediate_size" and parameter.ndim == 2:
                along = parameter if module == "c_proj" else parameter.T
                along[units // 2 :].mul_(0.01)


def seen_by_readers(model: Any, stack: str) -> dict[str, torch.Tensor]:
    """ "BLOCK.NAME" -> [tokens, inputs] of the matrices that write hidden states."""
    seen: dict[str, torch.Tensor] = {}
    for path, module in model.named_modules():
        if part_read(f"{path}.weight") is not None:
            key = f"{path.removeprefix(f'{stack}.')}.weight"

            def look(module: nn.Module, inputs: tuple[torch.Tensor, ...], key: str = key) -> None:
                seen[key] = inputs[0].double().flatten(0, -2)

            module.register_forward_pre_hook(look)
    with torch.no_grad():
        model(IDS)
    return seen


def plan_cut_of(model: Any, folder: Path, **sizes: int) -> CutPlan:
    model.save_pretrained(folder / "teacher")
    return plan_cut(str(folder / "teacher"), InitConfig(**sizes), "causal-lm", False)


@pytest.mark.parametrize("corrects", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt"])
def test_what_another_unit_tells_is_not_lost(
    family: str, corrects: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(least_squares, "RIDGE", 1e-9)
    model: Any = tiny_model(family)
    plan = plan_cut_of(model, tmp_path)
    units = plan.teacher_sizes["intermediate_size"]
    with_twins(model, units)
    plan = plan_cut_of(model, tmp_path, intermediate_size=units // 2)
    seen = seen_by_readers(model, plan.stack)
    energies = {key: x.square().mean(0) for key, x in seen.items()}
    measured = Measurements(None, torch.ones(plan.sizes["hidden_size"]).double(), energies)
    student = Cut(plan, str(tmp_path / "teacher"), measured)
    assert student.sites() == {key: units for key, x in seen.items() if x.shape[1] == units}
    for site, names in student.readers.items():
        moments = seen[site].T @ seen[site] / len(seen[site])
        add_weights(tmp_path / "better", f"{site}.safetensors", {n: student.tensor(n, moments) for n in names})
    init = InitConfig(intermediate_size=units // 2)
    better = tmp_path / "better" if corrects else None
    init_student(str(tmp_path / "teacher"), init, tmp_path / "student", measured=measured, corrected=better)
    with torch.no_grad():
        expected = model(IDS).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()(IDS).logits
    assert (float((found - expected).abs().max() / expected.abs().max()) < 1e-4) == corrects


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_heads_that_stay_make_up_for_those_that_go(family: str, tmp_path: Path) -> None:
    model: Any = tiny_model(family, heads=4)
    plan = plan_cut_of(model, tmp_path, num_heads=2)
    seen = seen_by_readers(model, plan.stack)
    energies = {key: x.square().mean(0) for key, x in seen.items()}
    measured = Measurements(None, torch.ones(plan.sizes["hidden_size"]).double(), energies)
    student = Cut(plan, str(tmp_path / "teacher"), measured)
    assert len(student.readers) == len(model.model.layers)
    for site, (name,) in student.readers.items():
        whole, plain = model.state_dict()[name], student.tensor(name)
        inputs = torch.tensor([int((whole - column[:, None]).abs().sum(0).argmin()) for column in plain.T])
        assert len(inputs) == plain.shape[1] < whole.shape[1]
        moments = seen[site].T @ seen[site] / len(seen[site])
        expected = (whole.double() @ reading_basis(moments, inputs)).float()
        torch.testing.assert_close(student.tensor(name, moments), expected)
        assert float((expected - plain).abs().max()) > 0.01
