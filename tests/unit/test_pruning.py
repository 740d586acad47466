"""Stage 0 keeps the blocks and parts that it should, bit by bit, and says why where it cannot."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ted_ds.config.student_section import InitConfig
from ted_ds.config.tasks import Kind
from ted_ds.errors import ModelError
from ted_ds.models import weight_files
from ted_ds.models.channels import Measurements
from ted_ds.models.pruning import init_student
from ted_ds.models.task_head import AUTO_CLASSES
from ted_ds.models.weight_files import INDEX, SINGLE, WeightReader
from tests.plain_measurements import plain_measurements
from tests.tiny_encoders import tiny_encoder
from tests.tiny_models import FAMILIES, ROTATED, tiny_model

IDS = torch.arange(24).view(2, 12) * 4
COUPLED = ("gpt2", "gpt_neox", "opt")  # hidden_size = heads * head width
QWEN = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
FULL, SLIDING = "full_attention", "sliding_attention"
RANDOM: dict[str, Any] = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
NO_FFN = {"intermediate_size": None}
WRITERS = ("o_proj", "out_proj", "dense", "dense_4h_to_h", "down_proj", "fc2", "c_proj")
CHANNELS, HEADS = [1, 2, 4, 7, 8, 11, 13, 14], [[0, 2], [1, 2], [3, 0]]  # that are silent; heads by block
Tensors = dict[str, torch.Tensor]
QA: Kind = "question-answering"
BLOCK = re.compile(r"(?:^|(?<=\.))(\d+)(?=\.)")


def _save(model: Any, folder: Path, **how: Any) -> str:
    model.save_pretrained(folder, **how)
    return str(folder)


def _student(teacher: str, folder: Path, measured: Measurements | None = None, **init: Any) -> Any:
    """The student, loaded: no tensor is missing or left over, and nothing else lies about."""
    init_student(teacher, InitConfig(**init), folder, measured=measured)
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, report = loaded
    assert not any(report.values()), report
    assert list(folder.parent.glob(f"{folder.name}*")) == [folder] and not list(folder.glob("part-*"))
    return model.eval()


def _of_blocks(tensors: Tensors, blocks: tuple[int, ...]) -> Tensors:
    """The tensors of `blocks`, numbered anew, and those outside of all blocks."""
    numbers = {str(block): str(i) for i, block in enumerate(blocks)}
    of_block = {name: found[1] for name in tensors if (found := BLOCK.search(name))}
    return {
        BLOCK.sub(lambda found: numbers[found[1]], name): tensor
        for name, tensor in tensors.items()
        if of_block.get(name, str(blocks[0])) in numbers
    }


def _assert_same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("init", "blocks"),
    [
        ({"blocks": "uniform", "num_blocks": 2}, (0, 3)),
        ({"blocks": "first", "num_blocks": 3}, (0, 1, 2)),
        ({"blocks": "last", "num_blocks": 2}, (2, 3)),
        ({"blocks": (1, 3)}, (1, 3)),
        ({}, (0, 1, 2, 3)),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_depth(family: str, init: dict[str, Any], blocks: tuple[int, ...], tmp_path: Path) -> None:
    teacher = tiny_model(family, blocks=4)
    student = _student(_save(teacher, tmp_path / "t"), tmp_path / "s", **init)
    _assert_same(student.state_dict(), _of_blocks(teacher.state_dict(), blocks))
    if len(blocks) == 4:
        assert torch.equal(student(IDS).logits, teacher(IDS).logits)


@pytest.mark.parametrize(
    ("family", "extra", "expected"),
    [
        ("gemma2", {"layer_types": [FULL, SLIDING, SLIDING, FULL]}, {"layer_types": [SLIDING, FULL]}),
        ("gemma3_text", {"layer_types": [SLIDING, FULL, SLIDING, SLIDING]}, {"layer_types": [FULL, SLIDING]}),
        ("qwen2", QWEN, {"max_window_layers": 1, "layer_types": [FULL, SLIDING]}),
    ],
)
def test_config_by_block(family: str, extra: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    student = _student(_save(tiny_model(family, blocks=4, **extra), tmp_path / "t"), tmp_path / "s", blocks=(1, 3))
    assert {field: getattr(student.config, field) for field in expected} == expected


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "llama", "gemma2"])
def test_embeddings_stay_tied_or_untied_and_bfloat16(family: str, tied: bool, tmp_path: Path) -> None:
    teacher: Any = tiny_model(family, tie_word_embeddings=tied).bfloat16()
    measured = plain_measurements(teacher, IDS)
    student = _student(
        _save(teacher, tmp_path / "t"), tmp_path / "s", measured, blocks="first", num_blocks=1, intermediate_size=8
    )
    head, embedding = student.get_output_embeddings().weight, student.get_input_embeddings().weight
    assert (head is embedding) is tied and torch.equal(embedding, teacher.get_input_embeddings().weight)
    assert torch.equal(head, teacher.get_output_embeddings().weight)
    tensors = load_file(tmp_path / "s" / SINGLE)
    assert tied is not any(name.startswith(("lm_head", "embed_out")) for name in tensors)
    assert {tensor.dtype for tensor in tensors.values()} == {student.dtype} == {torch.bfloat16}


def _silence(model: Any, channels: list[int], heads: list[list[int]], kv: list[list[int]], units: bool) -> None:
    """Zeroes weights and biases of residual channels, of heads by block, of every second FFN unit."""
    count = model.config.num_attention_heads
    head_dim = getattr(model.config, "head_dim", None) or model.config.hidden_size // count
    outer = torch.zeros(model.config.hidden_size, dtype=torch.bool)
    outer[channels] = True
    for name, parameter in model.named_parameters():
        module, found = name.split(".")[-2], BLOCK.search(name)
        if found is None or "norm" in module or module.startswith("ln_"):
            if module not in ("q_norm", "k_norm"):
                parameter.data[..., outer] = 0
            continue
        block = int(found[1])
        if "attn" in name or "attention" in name:
            inner = torch.zeros(3, count, head_dim, dtype=torch.bool)  # q, k and v: what is silent
            inner[0, heads[block]] = True
            inner[1:, kv[block]] = True
            if module == "query_key_value":
                inner = inner.transpose(0, 1)
            elif module in ("k_proj", "v_proj"):
                inner = inner[1, : getattr(model.config, "num_key_value_heads", count)]
            elif module != "c_attn":
                inner = inner[0]
        else:
            inner = (torch.arange((4 if "c_" in module else 3) * outer.numel()) % 2 == block % 2) & units
        rows, columns = (outer, inner.flatten()) if module in WRITERS else (inner.flatten(), outer)
        matrix = parameter.data.t() if module.startswith("c_") else parameter.data  # Conv1D: [in, out]
        matrix[rows] = 0
        if matrix.ndim == 2:
            matrix[:, columns] = 0


def _without_zeros(tensor: torch.Tensor) -> torch.Tensor:
    """Without the rows and columns that are all zero."""
    for dim in range(tensor.ndim):
        used = (tensor != 0).movedim(dim, 0).reshape(tensor.shape[dim], -1).any(1)
        tensor = tensor.index_select(dim, used.nonzero().flatten())
    return tensor


@pytest.mark.parametrize("what", ["hidden_size", "num_heads", "intermediate_size", "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_width_keeps_what_is_not_silent(family: str, what: str, tmp_path: Path) -> None:
    teacher = tiny_model(family, blocks=3, heads=4)
    sizes = {"hidden_size": 8, "num_heads": 2, "intermediate_size": 32 if family == "gpt2" else 24}
    asked = sizes if what == "all" else {what: sizes[what]}
    if family in COUPLED and what == "num_heads":
        asked["hidden_size"] = 8  # one implies the other: given both, and (`hidden_size`) one alone
    if family in ROTATED:
        asked.pop("hidden_size", None)
    narrower = "hidden_size" in asked
    fewer_heads = "num_heads" in asked or (narrower and family in COUPLED)
    heads = HEADS if fewer_heads else [[]] * 3
    _silence(teacher, CHANNELS if narrower else [], heads, heads, "intermediate_size" in asked)
    blocks = (0, 2) if what == "all" else (0, 1, 2)
    measured = plain_measurements(teacher, torch.arange(960).view(80, 12) * 7 % 97)  # OPT's ReLUs: each unit once
    student = _student(_save(teacher, tmp_path / "t"), tmp_path / "s", measured, blocks=blocks, **asked)
    assert student(IDS).logits.isfinite().all()
    assert student.config.num_attention_heads == (2 if fewer_heads else 4)
    expected = {name: _without_zeros(tensor) for name, tensor in _of_blocks(teacher.state_dict(), blocks).items()}
    _assert_same(student.state_dict(), expected)
    if what != "all" and not narrower:  # norms average over the width: fewer channels change the logits
        torch.testing.assert_close(student(IDS).logits, teacher(IDS).logits)


@pytest.mark.parametrize(("silent", "kv"), [([1, 2, 5], []), ([2, 3], [1]), ([0, 1, 4, 5], [0, 2])])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text"])
def test_grouped_heads(family: str, silent: list[int], kv: list[int], tmp_path: Path) -> None:
    teacher = tiny_model(family, width=24, heads=6, num_key_value_heads=3)
    _silence(teacher, [], [silent] * 2, [kv] * 2, False)
    measured = plain_measurements(teacher, IDS)
    student = _student(_save(teacher, tmp_path / "t"), tmp_path / "s", measured, num_heads=6 - len(silent))
    assert (student.config.num_attention_heads, student.config.num_key_value_heads) == (6 - len(silent), 3 - len(kv))
    _assert_same(student.state_dict(), {name: _without_zeros(t) for name, t in teacher.state_dict().items()})
    torch.testing.assert_close(student(IDS).logits, teacher(IDS).logits)


@pytest.mark.parametrize(("family", "kind"), [("bert", "classification"), ("roberta", "classification"), ("bert", QA)])
def test_encoders(family: str, kind: Kind, tmp_path: Path) -> None:
    """What is silent goes: half of the channels, one head of two, every second FFN unit."""
    teacher = tiny_encoder(family, kind, blocks=2)
    outer, head, unit = torch.arange(16) % 2 == 0, torch.arange(16) < 8, torch.arange(48) % 2 == 0
    for name, parameter in teacher.named_parameters():
        rows, columns = outer, outer
        if ".self." in name:
            rows = head
        elif "intermediate" in name:
            rows = unit
        elif "attention.output.dense" in name:
            columns = head
        elif ".output.dense" in name:
            columns = unit
        if "embeddings.weight" in name or len(parameter) < 8:  # ids, positions, labels
            rows = torch.zeros(len(parameter), dtype=torch.bool)
        parameter.data[rows] = 0
        if parameter.ndim == 2:
            parameter.data[:, columns] = 0
    sizes = {"hidden_size": 8, "num_heads": 1, "intermediate_size": 24}
    measured, path = plain_measurements(teacher, IDS % teacher.config.vocab_size), _save(teacher, tmp_path / "t")
    init_student(path, InitConfig(**sizes), tmp_path / "s", kind=kind, measured=measured)
    loaded: Any = AUTO_CLASSES[kind].from_pretrained(tmp_path / "s", output_loading_info=True)
    student, report = loaded
    assert not any(report.values()), report
    expected = {name: _without_zeros(tensor) for name, tensor in teacher.state_dict().items()}
    _assert_same({n: t for n, t in student.state_dict().items() if n in expected}, expected)


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ({"parameters": "1K"}, "student.init.parameters needs a run's data"),
        ({"hidden_size": 8}, "what the teacher does on data decides on a narrower student"),
        ({"intermediate_size": 8}, "what the teacher does on data decides on a narrower student"),
    ],
)
def test_what_needs_data(init: dict[str, Any], message: str, tmp_path: Path) -> None:
    teacher = _save(tiny_model("llama"), tmp_path / "t")
    with pytest.raises(ModelError, match=message):
        init_student(teacher, InitConfig.model_validate(init), tmp_path / "s")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("family", "extra", "init", "message"),
    [
        (None, {}, {"num_blocks": 1}, "give teacher.model"),
        (None, {}, {"config": {"model_type": "nope"}}, r"not a causal LM of transformers: Unrecognized.*nope"),
        (None, {}, {"config": {"model_type": "vit"}}, r"not a causal LM of transformers: .*ViTConfig"),
        (None, {}, {"config": RANDOM | {"hidden_size": 15}}, r"not a causal LM of transformers: .*not a multiple"),
        ("mpt", NO_FFN, {"intermediate_size": 8}, r"intermediate_size: the teacher's config \(mpt\) names no such"),
        ("mpt", NO_FFN, {"hidden_size": 8}, "width of a mpt cannot be cut: its config names no intermediate_size"),
        ("llama", {}, {"num_heads": 3}, "num_heads is 3, the teacher has 2: it can only shrink"),
        ("llama", {"heads": 4}, {"hidden_size": 10}, r"a llama of the sizes .* cannot be: .*not a multiple"),
        ("opt", {"heads": 4}, {"num_heads": 2}, r"\(16\) must be num_heads \(2\) \* .* \(4\) = 8 in this family"),
        ("llama", {"width": 24, "heads": 6, "num_key_value_heads": 3}, {"num_heads": 5}, "multiple of 3 .* or of 2 "),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, {"blocks": "last", "num_blocks": 1}, r"blocks \[1\] would"),
        (
            "phi",
            {"num_key_value_heads": 2},
            {"hidden_size": 8},
            r"cannot be cut so: model.final_layernorm.bias would be \(16,\)",
        ),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, {}, "is quantized"),
    ],
)
def test_requests_that_do_not_fit(
    family: str | None, extra: dict[str, Any], init: dict[str, Any], message: str, tmp_path: Path
) -> None:
    teacher = None if family is None else _save(tiny_model(family, **extra), tmp_path / "t")
    with pytest.raises(ModelError, match=message):
        init_student(teacher, InitConfig(**init), tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_folders_that_do_not_serve(tmp_path: Path) -> None:
    teacher, folder = _save(tiny_model("llama"), tmp_path / "t", max_shard_size="10KB"), tmp_path / "t"

    def refused(message: str, model: str = teacher, output: Path = tmp_path / "s") -> None:
        with pytest.raises(ModelError, match=message):
            init_student(model, InitConfig(), output)

    refused(r"folder .*/t exists already", output=folder)
    refused(r"model '.*/none' could not be found", model=str(tmp_path / "none"))
    index = json.loads((folder / INDEX).read_text())
    where = index["weight_map"].pop("model.norm.weight")
    (folder / INDEX).write_text(json.dumps(index))
    refused(r"the student would lack model\.norm\.weight")
    index["weight_map"]["model.norm.weight"] = where
    (folder / INDEX).write_text(json.dumps(index))
    shard = next(folder.glob("model-00002-*"))
    shard.unlink()
    refused(f"lacks {shard.name}, which its {INDEX} names: download it again")
    (folder / INDEX).unlink()
    refused(f"has no weights: expected {SINGLE} or {INDEX}")
    (folder / "pytorch_model.bin").touch()
    refused(r"pickled weights only.*convert them .*from_pretrained\('.*/t'\)")


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma2"])
def test_shards_in_and_out(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_files, "SHARD_BYTES", 9000)
    teacher = tiny_model(family, blocks=3)
    source = _save(teacher, tmp_path / "t", max_shard_size="8KB")
    (tmp_path / "t" / "tokenizer.json").write_text("{}")
    (tmp_path / "s.tmp" / "of-an-interrupted-run").mkdir(parents=True)
    _assert_same(_student(source, tmp_path / "s").state_dict(), teacher.state_dict())
    shards = set((index := json.loads((tmp_path / "s" / INDEX).read_text()))["weight_map"].values())
    assert len(shards) > 3 and index["metadata"]["total_size"] == sum(p.nbytes for p in teacher.parameters())
    others = {path.name for path in (tmp_path / "s").iterdir()} - shards
    assert others == {INDEX, "config.json", "generation_config.json", "tokenizer.json"}
    theirs, ours = WeightReader(source), WeightReader(str(tmp_path / "s"))
    assert all(torch.equal(ours.read(name), theirs.read(name)) for name in index["weight_map"])
    assert all(sum(t.nbytes for t in load_file(tmp_path / "s" / shard).values()) <= 9000 for shard in shards)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "llama"])
def test_spellings_of_files(family: str, tmp_path: Path) -> None:
    """Without the backbone's prefix, and GPT-NeoX's embed_out or lm_head: the student follows the teacher."""
    teacher = tiny_model(family)
    source, file = _save(teacher, tmp_path / "t"), tmp_path / "t" / SINGLE
    saved = load_file(file)
    assert ("embed_out.weight" in saved) is (family == "gpt_neox")
    bare = {name.removeprefix(f"{teacher.base_model_prefix}."): tensor for name, tensor in saved.items()}
    for how, tensors in {"saved": saved, "bare": bare}.items():
        save_file(tensors, file, metadata={"format": "pt"})
        student = _student(source, tmp_path / how, blocks="last", num_blocks=1)
        _assert_same(load_file(tmp_path / how / SINGLE), _of_blocks(tensors, (1,)))
        _assert_same(student.state_dict(), _of_blocks(teacher.state_dict(), (1,)))
