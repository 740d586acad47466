"""A narrower student by rotation is its teacher where the teacher's hidden states leave directions unused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ted_ds.config.student_section import InitConfig
from ted_ds.errors import ModelError
from ted_ds.models.channels import Measurements, PartScores
from ted_ds.models.families import Part, axes_of
from ted_ds.models.pruning import init_student
from ted_ds.models.rotation import in_basis, principal_basis, rotation_roles
from tests.plain_measurements import plain_measurements
from tests.tiny_models import ROTATED, tiny_model

IDS = torch.arange(48).view(4, 12) % 90
WIDTH, NARROW = 32, 16
WRITERS = ("o_proj", "down_proj")


def teacher_of(family: str, **extra: Any) -> Any:
    """Its hidden states lie in NARROW of its WIDTH dimensions, which are no channels."""
    given: dict[str, Any] = {"granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.5}}.get(family, {})
    model: Any = tiny_model(family, blocks=3, width=WIDTH, heads=4, **given, **extra)
    used = torch.linalg.qr(torch.randn(WIDTH, NARROW, generator=torch.Generator().manual_seed(5))).Q
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding.copy_(embedding @ used @ used.T)
        for name, parameter in model.named_parameters():
            if name.split(".")[-2] in WRITERS:
                parameter.copy_(used @ (used.T @ parameter))
    return model


def narrowed(model: Any, folder: Path, **init: Any) -> Any:
    measured = plain_measurements(model, IDS)
    model.save_pretrained(folder / "teacher")
    init_student(str(folder / "teacher"), InitConfig(**init), folder / "student", measured=measured)
    student, report = AutoModelForCausalLM.from_pretrained(folder / "student", output_loading_info=True)
    assert not any(report.values()), report
    return student.eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ROTATED)
def test_unused_directions_go_and_nothing_changes(family: str, tied: bool, tmp_path: Path) -> None:
    teacher = teacher_of(family, tie_word_embeddings=tied)
    student = narrowed(teacher, tmp_path, hidden_size=NARROW)
    assert student.config.hidden_size == NARROW and not student.config.tie_word_embeddings
    with torch.no_grad():
        expected, found = teacher(IDS).logits, student(IDS).logits
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4


def test_a_direction_that_is_used_is_missed(tmp_path: Path) -> None:
    teacher = teacher_of("llama")
    student = narrowed(teacher, tmp_path, hidden_size=NARROW - 4)
    with torch.no_grad():
        expected, found = teacher(IDS).logits, student(IDS).logits
    assert float((found - expected).abs().max() / expected.abs().max()) > 1e-2


def test_depth_heads_units_and_width_together_keep_the_dtype(tmp_path: Path) -> None:
    teacher = teacher_of("llama").bfloat16()
    init = {"blocks": (0, 2), "hidden_size": NARROW, "num_heads": 2, "intermediate_size": 40}
    student = narrowed(teacher.float(), tmp_path, **init)
    assert (student.config.num_hidden_layers, student.config.intermediate_size) == (2, 40)
    teacher.bfloat16().save_pretrained(tmp_path / "half")
    init_student(str(tmp_path / "half"), InitConfig(**init), tmp_path / "s", measured=plain_measurements(teacher, IDS))
    assert {tensor.dtype for tensor in load_file(tmp_path / "s/model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize("only", ["lm_head.weight", "model.embed_tokens.weight"])
def test_a_tied_file_may_have_either_name(only: str, tmp_path: Path) -> None:
    teacher = teacher_of("llama", tie_word_embeddings=True)
    measured = plain_measurements(teacher, IDS)
    teacher.save_pretrained(tmp_path / "teacher")
    file = tmp_path / "teacher/model.safetensors"
    tensors = load_file(file)
    tensors[only] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    init_student(str(tmp_path / "teacher"), InitConfig(hidden_size=NARROW), tmp_path / "s", measured=measured)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "s").eval()
    with torch.no_grad():
        torch.testing.assert_close(student(IDS).logits, teacher(IDS).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gpt2", "ln_1 is no RMSNorm"),
        ("opt", "is no RMSNorm"),
        ("gemma2", "no matrix reads what post_attention_layernorm gives"),
        ("olmo2", "no matrix reads what"),
    ],
)
def test_families_that_cannot_be_rotated_are_named(family: str, reason: str) -> None:
    with pytest.raises(ModelError, match=rf"the hidden states of a {family} cannot be rotated: .*{reason}"):
        rotation_roles(tiny_model(family))


def test_roles_are_what_a_llama_is() -> None:
    roles = rotation_roles(tiny_model("llama"))
    assert {name for name, role in roles.by_name.items() if role.kind == "reader"} == {
        *(f"self_attn.{name}_proj.weight" for name in "qkv"),
        *("mlp.gate_proj.weight", "mlp.up_proj.weight", "lm_head.weight"),
    }
    assert {role.norm for name, role in roles.by_name.items() if "mlp" in name} == {
        None,
        "post_attention_layernorm.weight",
    }
    assert rotation_roles(tiny_model("gemma")).scaled and not roles.scaled


def test_the_basis_is_orthonormal_and_by_mean_square() -> None:
    moments = torch.diag(torch.tensor([1.0, 5.0, 3.0]).double())
    basis = principal_basis(moments)[:, :2]
    assert basis.abs().round().tolist() == [[0, 0], [1, 0], [0, 1]]


def test_activations_decide_on_heads_units_and_channels() -> None:
    sizes = {Part.CHANNEL: 3, Part.HEAD: 2, Part.KV_HEAD: 2, Part.UNIT: 4}
    energies = {"0.mlp.down_proj.weight": torch.tensor([1.0, 9.0, 1.0, 4.0]).double()}
    energies["0.self_attn.o_proj.weight"] = torch.tensor([1.0, 1.0, 3.0, 3.0]).double()
    scores = PartScores(sizes, Measurements(None, torch.tensor([2.0, 1.0, 3.0]).double(), energies))
    down = torch.ones(3, 4)
    down[:, 2] = 4.0  # 16 times the square, against 9 and 4 times the energy
    scores.add(0, "mlp.down_proj.weight", axes_of("mlp.down_proj.weight"), down)
    scores.add(0, "mlp.up_proj.weight", axes_of("mlp.up_proj.weight"), 100 * down.T)  # does not count
    scores.add(0, "self_attn.o_proj.weight", axes_of("self_attn.o_proj.weight"), torch.ones(3, 4))
    assert scores.units(0, 2).tolist() == [1, 2]
    assert scores.heads(0, 1, 1)[0].tolist() == [1]
    grouped = PartScores({Part.HEAD: 4, Part.KV_HEAD: 2}, Measurements(None, torch.ones(1), energies))
    o_proj = torch.diag(torch.tensor([2.0, 3, 1, 1.5]))
    grouped.add(0, "self_attn.o_proj.weight", axes_of("self_attn.o_proj.weight"), o_proj)
    assert [found.tolist() for found in grouped.heads(0, 2, 2)] == [[1, 3], [0, 1]]
    assert [found.tolist() for found in grouped.heads(0, 2, 1)] == [[0, 1], [0]]
    assert scores.channels(2).tolist() == [0, 2]


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (5,), (3, 5, 4)])
def test_a_tensor_goes_into_a_basis_in_parts(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ted_ds.models.rotation._ROWS_ELEMENTS", 10)  # two rows at a time
    tensor, dim, basis = torch.randn(shape), shape.index(5), torch.randn(5, 2, dtype=torch.float64)
    gain = torch.rand(5, dtype=torch.float64)
    whole = 3 * ((tensor.double().movedim(dim, -1) * gain) @ basis).movedim(-1, dim)
    found = in_basis(tensor, dim, basis, gain, 3.0)
    assert found.dtype == torch.float32 and found.is_contiguous()
    torch.testing.assert_close(found, whole.float())
