"""A micro-batch of both stages and its evaluation as on a GPU, without one: on the meta device, which has no values.

So a value that the host reads is an error, as is a tensor of the CPU among those of the device. Kernels are replaced by
what checks their arguments.
"""

from __future__ import annotations

import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import ted_ds
from ted_ds.batch import BatchCounts
from ted_ds.distill.balance import Balance
from ted_ds.distill.distillation_model import DistillationModel
from ted_ds.models.filters import FilterPlan
from ted_ds.ops import dispatch, layer_kernels, logit_kernels, logit_loss
from ted_ds.ops.divergence import TopK
from ted_ds.teacher.frozen import FrozenModel, FrozenModule
from tests.alone import Alone
from tests.both_stages import BALANCED, both_stages
from tests.project import loss_config
from tests.tiny_encoders import ENCODERS, tiny_encoder
from tests.tiny_models import FAMILIES, READS_BACK
from tests.unit.test_tasks_losses import a_batch, make_task

META = torch.device("meta")
OURS, THEIRS = (str(Path(package.__path__[0])) for package in (ted_ds, transformers))
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class Watch(TorchDispatchMode):
    """Collects what ted_ds does with tensors of both the CPU and the device. Copies wait, but those from pinned memory;
    anything else fails on a GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.faults: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [end for end in (*args, out) if isinstance(end, torch.Tensor)]
        if len({end.device for end in tensors if end.dim() or func in COPIES}) > 1:
            frames = [f for f in traceback.extract_stack() if f.filename.startswith((OURS, THEIRS))]
            if not frames or (frames[-1].filename.startswith(OURS) and frames[-1].name != "on_device"):
                self.faults.append(" < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames[:-4:-1]))
        return out


def _check_rows(x_s: torch.Tensor, teacher: Any, targets: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel of the logits' losses asks of its arguments."""
    sides = [teacher] if isinstance(teacher, torch.Tensor) else []
    others = [teacher.ids, teacher.log_probs, teacher.log_rest] if isinstance(teacher, TopK) else []
    assert all(t.is_meta for t in (x_s, targets, *sides, *others))
    assert x_s.stride(1) == 1 and x_s.stride(0) * x_s.element_size() % 16 == 0 and targets.dtype == torch.int64
    assert all(t.stride() == x_s.stride() and t.shape == x_s.shape and t.dtype == x_s.dtype for t in sides)
    ce, kl = (x_s.new_empty(len(x_s), dtype=torch.float32) for _ in range(2))
    return ce, kl


def _check_residual(output: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The same for the layer loss."""
    assert output.is_meta and target.is_meta and output.is_contiguous() and target.is_contiguous()
    assert output.dtype == target.dtype and output.shape == target.shape
    assert mask is None or (mask.is_meta and mask.dtype == torch.bool)
    return output.new_empty(len(output), dtype=torch.float32)


def _addmm(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, out_dtype: torch.dtype, **_: Any) -> torch.Tensor:
    """`addmm` into a wider total, for which torch has no fake; its checks."""
    assert a.dtype == b.dtype != out_dtype == total.dtype == torch.float32
    assert a.shape[1] == b.shape[0] and total.shape == (a.shape[0], b.shape[1])
    return total


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device is a GPU."""
    card = SimpleNamespace(total_memory=80 << 30, multi_processor_count=132)
    addmm = torch.addmm

    def dispatched(*args: Any, **options: Any) -> torch.Tensor:
        return _addmm(*args, **options) if "out_dtype" in options else addmm(*args, **options)

    monkeypatch.setattr(dispatch, "on_gpu", lambda x: x.is_meta)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch, "addmm", dispatched)
    monkeypatch.setattr(logit_kernels, "fused_losses_and_gradient", _check_rows)
    monkeypatch.setattr(layer_kernels, "subtract_in_place", _check_residual)


CASES = [
    *((family, torch.bfloat16, {}) for family in FAMILIES),
    ("llama", torch.float32, {}),
    *(("llama", torch.bfloat16, {"divergence": kind}) for kind in ("reverse", "jensen-shannon")),
    ("llama", torch.bfloat16, {"kl_top_k": 5}),
    *(("llama", torch.bfloat16, options) for options in BALANCED),
]


@pytest.mark.parametrize(("family", "dtype", "options"), CASES)
def test_a_micro_batch_stays_on_the_device(
    family: str, dtype: torch.dtype, options: dict[str, Any], gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if family in READS_BACK:
        pytest.skip("transformers itself reads back")
    model, learner, batch = both_stages(family, "meta", dtype, **options)
    batch = batch.to(META)
    counts = BatchCounts.of(batch)
    for module, inputs in ((model, {}), (learner, {"step": 0})):
        with Watch() as watch:
            loss, terms = module(batch=batch, counts=counts, **inputs)
            loss.backward()
        assert loss.is_meta and terms.is_meta and loss.dtype == torch.float32
        assert all(p.grad is None or p.grad.dtype == p.dtype for p in module.parameters())
        assert not watch.faults
    model.eval()
    positions = batch.targets.numel()

    def all_but_one(targets: torch.Tensor) -> torch.Tensor | None:
        return torch.arange(positions - 1, device=META) if len(targets) == positions else None

    monkeypatch.setattr(logit_loss, "_predicted_rows", all_but_one)  # reads on the host how many have a target
    with Watch() as watch, torch.no_grad():
        scores = model(batch=batch)
    assert all(score.is_meta for score in scores) and not watch.faults


@pytest.mark.parametrize("kind", ["classification", "regression", "question-answering"])
@pytest.mark.parametrize("family", ENCODERS)
def test_a_labelled_micro_batch_stays_on_the_device(
    family: str, kind: Any, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers itself looks whether a mask has padding
    monkeypatch.setattr("transformers.masking_utils._ignore_bidirectional_mask_sdpa", lambda *_, **__: False)
    sizes = {"num_labels": 1 if kind == "regression" else 3}
    models = [tiny_encoder(family, kind, blocks=b, width=w, seed=b, **sizes) for b, w in ((4, 24), (2, 16))]
    plans = [FilterPlan((0, 1), width, 8, normalized=True) for width in (24, 16)]
    (teacher, student), (filters_t, filters_s) = (
        [module.to(META, torch.bfloat16) for module in modules] for modules in (models, [p.build() for p in plans])
    )
    task, loss = make_task(kind), loss_config(kl_alpha=0.7, mse_alpha=1.0, **BALANCED[0])
    model = DistillationModel(student.train(), filters_s, loss, task=task)
    frozen, balance = FrozenModel(FrozenModule(teacher, task, filters_t)), Balance.of(loss, 2, META)
    model.attach_teacher(frozen, ((0, 1), (1, 3)), balance=balance)
    batch = a_batch(kind).to(META)
    with Watch() as watch:
        counts = BatchCounts.of(batch)
        loss, _ = model(batch=batch, counts=counts)
        loss.backward()
    assert loss.is_meta and not watch.faults


def test_a_balance_is_settled_on_the_device(gpu: None) -> None:
    model, _, batch = both_stages("llama", "meta", torch.bfloat16, **BALANCED[0])
    batch, balance = batch.to(META), model.balance
    assert balance is not None
    with Watch() as watch:
        model(batch=batch, counts=BatchCounts.of(batch))[0].backward()
        balance.settle(Alone())  # type: ignore[arg-type]
        balance.begin(0.5)
    assert balance.weights.is_meta and not watch.faults


def test_a_fault_would_be_noticed() -> None:
    x = torch.ones(3, device=META)
    for fault in (lambda: x.sum().item(), x.nonzero, lambda: x * torch.ones(3)):
        with pytest.raises(RuntimeError, match=r"meta|device"):
            fault()
    with Watch() as watch:
        x * torch.ones(3).to(META)
        x.mul_(torch.ones(3))
    assert len(watch.faults) == 2
