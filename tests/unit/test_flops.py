"""Counted FLOPs against counts by hand; the table of peaks against names that devices have."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ted_ds.batch import Batch
from ted_ds.models.filters import FilterPlan
from ted_ds.models.pooler import PoolerPlan
from ted_ds.models.structure import find_blocks
from ted_ds.ops import Head
from ted_ds.pipeline.batch_flops import stage1_flops, stage2_flops
from ted_ds.pipeline.stage0 import ModelPaths
from ted_ds.tasks.causal_lm import CausalLM, LMHead
from ted_ds.tasks.classification import Classification, PoolerHead
from ted_ds.teacher.frozen import FrozenModule
from ted_ds.telemetry.flops import count_flops, count_lengths, peak_flops, polynomial
from tests.tiny_encoders import CLASSIFIERS, tiny_encoder
from tests.tiny_models import FAMILIES, tiny_config, tiny_model

D, MLP, BLOCKS, VOCAB, ROWS, LENGTH = 16, 48, 2, 97, 2, 12
TASK = CausalLM(90)
"""Its tokenizer has fewer ids than the LM heads have rows."""


def meta(config: Any, auto: Any = AutoModelForCausalLM) -> PreTrainedModel:
    with torch.device("meta"):
        return auto.from_config(config)


def batch(rows: int, length: int) -> Batch:
    ids = torch.empty(rows, length, dtype=torch.int64, device="meta")
    return Batch(ids, ids)


def count(model: PreTrainedModel, task: Any, rows: int, length: int) -> int:
    module = FrozenModule(model, task)
    return count_flops(model, lambda: module(batch=batch(rows, length)))


def near(flops: float) -> Any:
    """Some versions of transformers compute the angles of rotary embeddings as a GEMM: 2 FLOPs an angle."""
    return pytest.approx(flops, rel=5e-4)


def by_hand(
    tokens: int, length: int, *, blocks: int = BLOCKS, width: int = D, keys: int | None = None, gates: int
) -> int:
    """2 a weight and token (q and o, k and v, the MLP), and 2 each a score and its use, for all heads 4 S D a token."""
    weights = 2 * width * width + 2 * width * (keys or width) + gates * width * 3 * width
    if gates == 2:  # GPT-2's MLP is 4 D wide
        weights += 2 * width * width
    return blocks * tokens * (2 * weights + 4 * length * width)


def test_llama_and_gpt2_by_hand() -> None:
    """No LM head, which is counted with the losses; heads that share keys and values have fewer weights."""
    tokens = ROWS * LENGTH
    assert count(meta(tiny_config("llama")), TASK, ROWS, LENGTH) == near(by_hand(tokens, LENGTH, gates=3))
    assert count(meta(tiny_config("gpt2")), TASK, ROWS, LENGTH) == near(by_hand(tokens, LENGTH, gates=2))
    grouped = meta(tiny_config("llama", num_key_value_heads=1))
    assert count(grouped, TASK, ROWS, LENGTH) == near(by_hand(tokens, LENGTH, keys=D // 2, gates=3))


def test_experts_cost_what_a_token_is_sent_to() -> None:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 64}
    model = meta(tiny_config("mixtral", **experts))
    tokens = ROWS * LENGTH
    router = BLOCKS * tokens * 2 * D * 4
    second = BLOCKS * tokens * 2 * 3 * D * MLP
    assert count(model, TASK, ROWS, LENGTH) == near(by_hand(tokens, LENGTH, gates=3) + second + router)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_causal_lm_is_a_quadratic_polynomial(family: str) -> None:
    values = {length: count(meta(tiny_config(family)), TASK, ROWS, length) for length in (7, 13, 26, 40)}
    assert polynomial({length: values[length] for length in (7, 13, 26)})(40) == values[40] > values[26]


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_every_classifier_is_a_quadratic_polynomial(family: str) -> None:
    model = tiny_encoder(family)
    task = Classification([model.config.id2label[i] for i in range(3)])
    with torch.device("meta"):
        blank = type(model)(model.config)
    values = {length: count(blank, task, ROWS, length) for length in (7, 13, 26, 40)}
    assert polynomial({length: values[length] for length in (7, 13, 26)})(40) == values[40] > values[26]


@pytest.mark.parametrize(("longest", "lengths"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (256, [64, 128, 256])])
def test_lengths_to_count_at(longest: int, lengths: list[int]) -> None:
    assert count_lengths(longest) == lengths


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> ModelPaths:
    folder = tmp_path_factory.mktemp("models")
    tiny_model("llama", vocab=VOCAB).save_pretrained(folder / "student")
    tiny_model("llama", vocab=VOCAB, blocks=4, width=32, heads=4).save_pretrained(folder / "teacher")
    return ModelPaths(str(folder / "student"), str(folder / "teacher"))


def recipe(
    *, kl_alpha: float = 1.0, top_k: int | None = None, cache: Path | None = None, dtype: str = "bfloat16"
) -> Any:
    """The parts of a RunConfig that count here."""
    side = {"dtype": "bfloat16", "trust_remote_code": False}
    return SimpleNamespace(
        task="causal-lm",
        spec=SimpleNamespace(kind="causal-lm"),
        student=SimpleNamespace(**side),
        teacher=SimpleNamespace(cache=cache, **(side | {"dtype": dtype})),
        loss=SimpleNamespace(kl_alpha=kl_alpha, kl_top_k=top_k),
        train=SimpleNamespace(micro_batch_size=ROWS),
        data=SimpleNamespace(sequence_length=LENGTH),
    )


TOKENS = ROWS * LENGTH
STUDENT = 3 * by_hand(TOKENS, LENGTH, gates=3)
BLOCK_T = by_hand(TOKENS, LENGTH, blocks=1, width=32, gates=3)
LOGITS_S, LOGITS_T = 3 * 2 * TOKENS * D * 90, 2 * TOKENS * 32 * 90
PAIRS = ((0, 1), (1, 2))
FILTERS = FilterPlan((0, 1), D, 24), FilterPlan((1, 2), 32, 24)
NONLINEAR = FilterPlan((0, 1), D, 24, nonlinear=True), FilterPlan((1, 2), 32, 24, nonlinear=True)
LINEAR_S, LINEAR_T = 2 * 3 * 2 * TOKENS * D * 24, 2 * 2 * TOKENS * 32 * 24
INNER_S, INNER_T = 2 * 3 * 2 * TOKENS * D * D, 2 * 2 * TOKENS * 32 * 32


@pytest.mark.parametrize(
    ("run", "pairs", "expected"),
    [
        pytest.param(recipe(kl_alpha=0), (), STUDENT + LOGITS_S, id="ce"),
        pytest.param(recipe(), (), STUDENT + LOGITS_S + 4 * BLOCK_T + LOGITS_T, id="kd"),
        pytest.param(
            recipe(),
            (PAIRS, *FILTERS),
            STUDENT + LOGITS_S + 4 * BLOCK_T + LOGITS_T + LINEAR_S + LINEAR_T,
            id="ted",
        ),
        pytest.param(
            recipe(),
            (PAIRS, *NONLINEAR),
            STUDENT + LOGITS_S + 4 * BLOCK_T + LOGITS_T + LINEAR_S + INNER_S + LINEAR_T + INNER_T,
            id="ted, nonlinear",
        ),
        pytest.param(
            recipe(kl_alpha=0),
            (PAIRS, FILTERS[0], None),
            STUDENT + LOGITS_S + 3 * BLOCK_T + LINEAR_S,
            id="lwd without a KL ends after the teacher's last pair",
        ),
        pytest.param(
            recipe(cache=Path("cache")),
            (PAIRS, *FILTERS),
            STUDENT + LOGITS_S + LOGITS_T + LINEAR_S,
            id="a cached teacher runs its LM head alone",
        ),
        pytest.param(recipe(top_k=8), (), STUDENT + LOGITS_S + 4 * BLOCK_T + LOGITS_T, id="kd, top-k"),
        pytest.param(recipe(cache=Path("cache"), top_k=8), (), STUDENT + LOGITS_S, id="cached top-k"),
    ],
)
def test_stage2_by_hand(models: ModelPaths, run: Any, pairs: Any, expected: int) -> None:
    flops = stage2_flops(run, models, TASK, None, *pairs)
    assert flops is not None and flops.dtype == torch.bfloat16
    assert flops.count(LENGTH) == near(expected)


@pytest.mark.parametrize("width", [16, 24])
@pytest.mark.parametrize("nonlinear", [False, True])
def test_stage1_by_hand(models: ModelPaths, width: int, nonlinear: bool) -> None:
    """A filter whose input is constant, in front of an LM head whose weight is; half of the positions are seen."""
    plan = FilterPlan((0, 1), D, width, nonlinear=nonlinear)
    head = LMHead(torch.nn.LayerNorm(D), Head(torch.zeros(90, D), None), vocab_size=90, token_fraction=0.5)
    flops = stage1_flops(recipe(), "student", models.student, TASK, None, plan, head)
    seen = TOKENS // 2
    filter_ = 2 * seen * ((2 * D * D + 3 * D * width) if nonlinear else 2 * D * width)
    up = 3 * 2 * seen * width * D if width != D else 0
    assert flops is not None
    assert flops.count(LENGTH) == near(STUDENT / 3 + 2 * (filter_ + up + 2 * 2 * seen * D * 90))


def test_a_pooler_sees_one_position_of_a_row(tmp_path: Path) -> None:
    model = tiny_encoder("bert")
    model.save_pretrained(tmp_path / "model")
    task = Classification([model.config.id2label[i] for i in range(3)])
    run = recipe()
    run.spec.kind, run.task, run.loss.mask_padding = "classification", "mnli", True
    tokenizer: Any = SimpleNamespace(pad_id=0)
    costs = []
    for token in ("first", "mean"):
        head = PoolerHead(PoolerPlan(token, "tanh", 0.0, 0.0), 3)
        plan = FilterPlan((0,), D, 24)
        flops = stage1_flops(run, "student", str(tmp_path / "model"), task, tokenizer, plan, head)
        assert flops is not None
        costs.append([flops.count(length) for length in (8, 12)])
    block = [by_hand(ROWS * s, s, blocks=1, gates=3) for s in (8, 12)]
    assert find_blocks(model).num_blocks == 2
    block = [b - 2 * ROWS * s * D * MLP for b, s in zip(block, (8, 12), strict=True)]  # an MLP of two matrices
    assert costs[0] == [b + 2 * 2 * ROWS * D * 24 for b in block]
    assert costs[1] == [b + 2 * 2 * ROWS * s * D * 24 for b, s in zip(block, (8, 12), strict=True)]


def test_models_of_two_dtypes_have_no_peak(models: ModelPaths) -> None:
    flops = stage2_flops(recipe(dtype="float32"), models, TASK, None)
    assert flops is not None and flops.dtype is None


def test_a_model_that_needs_values_is_not_counted(
    models: ModelPaths, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def look(self: Any, batch: Batch) -> None:
        if batch.input_ids.sum().item():
            raise AssertionError

    monkeypatch.setattr("ted_ds.models.readout.LogitHead.read", look)
    assert stage2_flops(recipe(), models, TASK, None) is None
    assert "model FLOPs are not counted, mfu is null" in caplog.text


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H800", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA GH200 144G HBM3e", 989.4),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("A100-SXM4-40GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181.05),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_peaks(name: str, teraflops: float) -> None:
    assert peak_flops(name, torch.bfloat16) == teraflops * 1e12
    assert peak_flops(name, torch.float32) is None


@pytest.mark.parametrize(
    "name",
    [
        "Tesla T4",
        "Tesla V100-SXM2-32GB",
        "NVIDIA A10G",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GH200 480GB MIG 1g.12gb",
        "NVIDIA A100-SXM-64GB",
        "GRID A100-10C",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA X9000",
        "AMD Instinct MI300X",
        "",
    ],
)
def test_what_is_not_in_the_table_has_no_peak(name: str) -> None:
    assert peak_flops(name, torch.bfloat16) is None
