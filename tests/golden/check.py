"""Compares ted_ds with numbers of the paper's own code: `python tests/golden/check.py CASE_DIR [...]`.

A case is a folder with a teacher and a student as that code saves them, a batch, and the losses, gradients and ten
optimizer steps that the code computed on it (manifest.json, expected_*.safetensors). Prints one JSON line a case
with the largest errors; exits with 1 where one is over the tolerances.

Losses are compared relatively, gradients relative to the largest entry of the model's, states and logits absolutely.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig
from transformers.models.deberta_v2 import modeling_deberta_v2

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ted_ds.batch import Batch, BatchCounts
from ted_ds.config.sections import LossConfig
from ted_ds.distill.distillation_model import DistillationModel
from ted_ds.distill.filter_learner import FilterLearner
from ted_ds.models.filters import FilterPlan
from ted_ds.models.padding import zero_padding_context
from ted_ds.models.pooler import find_pooler
from ted_ds.models.published import read_published
from ted_ds.models.task_head import AUTO_CLASSES
from ted_ds.tasks.base import DisposableHead, Task
from ted_ds.tasks.classification import Classification, PoolerHead, Regression
from ted_ds.tasks.question_answering import QuestionAnswering, SpanHead
from ted_ds.teacher.frozen import FrozenModel, FrozenModule
from tests.project import loss_config

TOLERANCES = {
    "float32": {"loss": 1e-5, "state": 2e-5, "gradient": 1e-4, "trajectory": 1e-4},
    "float64": {"loss": 1e-9, "state": 2e-5, "gradient": 1e-4, "trajectory": 1e-7},
}
"""By dtype and what is compared. Expected states and gradients are stored in float32 alone."""

STEPS, TEMPERATURE = 10, 2.0


@dataclass
class Errors:
    """The largest error of each comparison, by its name, and what kind of comparison it is."""

    values: dict[str, float] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, kind: str, error: float) -> None:
        # `not <=` and not `max`: a nan must show
        if not error <= self.values.get(name, 0.0):
            self.values[name] = error
        self.values.setdefault(name, error)
        self.kinds[name] = kind

    def over(self, dtype: str) -> list[str]:
        return [name for name, value in self.values.items() if not value <= TOLERANCES[dtype][self.kinds[name]]]


class Case:
    """A golden case in one dtype."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.folder, self.dtype, self.name = folder, dtype, str(dtype).removeprefix("torch.")
        self.manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        self.question_answering = self.manifest["task"] == "qa"
        self.regression = not self.question_answering and self.manifest["num_labels"] == 1
        self.published = {side: read_published(str(folder / side)) for side in ("teacher", "student")}
        self.batch = self._batch()
        self.errors = Errors()

    def _batch(self) -> Batch:
        tensors = load_file(self.folder / "batch.safetensors")
        ids, mask = tensors["input_ids"], tensors["attention_mask"]
        if self.question_answering:
            return Batch(ids, tensors["start_positions"], mask, ends=tensors["end_positions"])
        labels = tensors["labels"]
        return Batch(ids, labels.to(self.dtype) if self.regression else labels, mask)

    def task(self) -> Task:
        if self.question_answering:
            return QuestionAnswering()
        if self.regression:
            return Regression(lambda predictions: predictions)
        return Classification([f"LABEL_{i}" for i in range(self.manifest["num_labels"])])

    def head(self, side: str) -> DisposableHead:
        if self.question_answering:
            return SpanHead(mask_padding=False)
        pooler = find_pooler(self.model(side).config)
        return PoolerHead(pooler, self.manifest["num_labels"], regression=self.regression)

    def model(self, side: str) -> Any:
        published = self.published[side]
        kind = "question-answering" if self.question_answering else "classification"
        labels = {} if self.question_answering else {"num_labels": self.manifest["num_labels"]}
        model = AUTO_CLASSES[kind].from_config(AutoConfig.for_model(**(published.config | labels)), dtype=self.dtype)
        there = {k: v.to(self.dtype) for k, v in published.weights.items() if k in model.state_dict()}
        model.load_state_dict(there)
        zero_padding_context(model)
        return model.eval()

    def filters(self, side: str) -> nn.ModuleList:
        published = self.published[side]
        assert published.plan is not None
        bank = published.plan.build().to(self.dtype)
        bank.load_state_dict(published.filters)
        return bank

    def theirs(self, name: str, plan: FilterPlan | None) -> str:
        """The paper's code's name of a parameter of `DistillationModel` or `FilterLearner`."""
        if name.startswith("student."):
            return name.removeprefix("student.")
        assert plan is not None
        _, k, part = name.split(".")
        heads = {"pooler": f"filter_pooler.{k}.dense", "head": f"filter_head.{k}"}
        stem, _, leaf = part.removeprefix("filter_").rpartition("_")
        if stem in heads:
            return f"{heads[stem]}.{leaf}"
        middle = {"inner": "0.", "": "2." if plan.nonlinear else ""}[stem]
        return f"deberta.encoder.layer.{plan.blocks[int(k)]}.filter.{middle}{leaf}"

    def compare_gradients(
        self, what: str, module: nn.Module, plan: FilterPlan | None, expected: Any, norms: Any
    ) -> None:
        """Against the gradients that are stored whole, and the norms of all."""
        largest = max(float(t.abs().max()) for name, t in expected.items() if name.startswith("grad."))
        largest_norm = max(value for value in norms.values() if value is not None)
        own = {self.theirs(name, plan): p.grad for name, p in module.named_parameters()}
        for name, norm in norms.items():
            gradient = own.pop(name, None)
            found = 0.0 if gradient is None else float(gradient.norm())
            self.errors.add(f"{what}_gradient", "gradient", abs(found - (norm or 0.0)) / largest_norm)
            if (stored := expected.get(f"grad.{name}")) is not None:
                error = float((gradient - stored).abs().max()) / largest
                self.errors.add(f"{what}_gradient", "gradient", error)
        for gradient in own.values():  # of parameters for which the paper's code has none
            found = 0.0 if gradient is None else float(gradient.norm())
            self.errors.add(f"{what}_gradient", "gradient", found / largest_norm)

    def compare_trajectory(self, what: str, module: nn.Module, call: Any, expected: list[float]) -> None:
        """Ten steps of AdamW on the same batch."""
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0.0)
        for step, value in enumerate(expected):
            loss, _ = call()
            self.errors.add(f"{what}_trajectory", "trajectory", _relative(loss, value))
            if step < STEPS:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    def stage1(self, side: str) -> None:
        expected = self.manifest["stage1"][side][self.name]
        published = self.published[side]
        assert published.plan is not None
        frozen = FrozenModel(FrozenModule(self.model(side), self.task()))
        learner = FilterLearner(published.plan.build(), frozen, published.plan.blocks, self.head(side)).to(self.dtype)
        self.load_probes(learner, side)
        counts = BatchCounts.of(self.batch)
        loss, _ = learner(batch=self.batch, counts=counts, step=0)
        self.errors.add("stage1_loss", "loss", _relative(loss, expected["loss"]))
        loss.backward()
        stored = load_file(self.folder / f"expected_stage1_{side}.safetensors")
        self.compare_gradients("stage1", learner, published.plan, stored, expected["grad_norms"])
        self.compare_trajectory(
            "stage1", learner, lambda: learner(batch=self.batch, counts=counts, step=0), expected["trajectory"]
        )

    def load_probes(self, learner: FilterLearner, side: str) -> None:
        """The case's own filters and heads into a learner of fresh ones."""
        published = self.published[side]
        assert published.plan is not None
        heads = dict(published.heads)
        for name, tensor in published.filters.items():
            heads[self.theirs(f"probes.{name}", published.plan)] = tensor
        with torch.no_grad():
            for name, parameter in learner.named_parameters():
                parameter.copy_(heads[self.theirs(name, published.plan)])

    def stage2(self, variant: str) -> None:
        expected = self.manifest["stage2"][variant][self.name]
        weights = loss_config(
            kl_alpha=expected["kl_alpha"], mse_alpha=expected["mse_alpha"], temperature=TEMPERATURE, mask_padding=False
        )
        model, plan, layer_map = self._distillation(variant, weights)
        counts = BatchCounts.of(self.batch)
        self._compare_states(variant, model)
        loss, terms = model(batch=self.batch, counts=counts)
        found = dict(zip(("total", "pred_loss", "kl_loss", "mse_loss"), [loss, *terms[1:4]], strict=True))
        for name, value in found.items():
            self.errors.add(f"{variant}_loss", "loss", _relative(value, expected[name]))
        for value, want in zip(terms[4:], expected["per_layer_mse"] if layer_map else [], strict=True):
            self.errors.add(f"{variant}_loss", "loss", _relative(value, want))
        loss.backward()
        stored = load_file(self.folder / f"expected_{variant}.safetensors")
        self.compare_gradients(variant, model, plan, stored, expected["grad_norms"])
        self.compare_trajectory(
            variant, model, lambda: model(batch=self.batch, counts=counts), expected["trajectory_total"]
        )
        if layer_map:
            masked = weights.model_copy(update={"mask_padding": True})
            _, terms = self._distillation(variant, masked)[0](batch=self.batch, counts=counts)
            wanted = expected["per_layer_mse_valid_tokens_only__NOT_used"]
            for value, want in zip(terms[4:], wanted, strict=True):
                self.errors.add(f"{variant}_masked_layer_loss", "loss", _relative(value, want))

    def _distillation(
        self, variant: str, weights: LossConfig
    ) -> tuple[DistillationModel, FilterPlan | None, tuple[tuple[int, int], ...]]:
        student, teacher = (self.published[side].plan for side in ("student", "teacher"))
        assert student is not None and teacher is not None
        plan: FilterPlan | None = student
        filters, filters_t = self.filters("student"), self.filters("teacher")
        layer_map = tuple(zip(student.blocks, teacher.blocks, strict=True))
        if variant == "lwd":
            filters_t = nn.ModuleList()
            plan, filters = self._lwd_filters(student)
        elif variant == "kd":
            plan, filters, filters_t, layer_map = None, nn.ModuleList(), nn.ModuleList(), ()
        model = DistillationModel(self.model("student"), filters, weights, task=self.task())
        frozen = FrozenModel(FrozenModule(self.model("teacher"), self.task(), filters_t))
        model.attach_teacher(frozen, layer_map)
        return model, plan, layer_map

    def _lwd_filters(self, student: FilterPlan) -> tuple[FilterPlan, nn.ModuleList]:
        """Filters to the teacher's width, from a file with the paper's code's names."""
        stored = load_file(self.folder / "lwd_student_filters.safetensors")
        width = int(self.published["teacher"].config["hidden_size"])
        plan = FilterPlan(student.blocks, student.width, width, student.nonlinear, student.activation)
        bank = plan.build().to(self.dtype)
        with torch.no_grad():
            for name, parameter in bank.named_parameters():
                parameter.copy_(stored[self.theirs(f"filters.{name}", plan)])
        return plan, bank

    def _compare_states(self, variant: str, model: DistillationModel) -> None:
        """Logits, filtered states and the teacher's matched states, of hooks on the blocks."""
        stored = load_file(self.folder / f"expected_{variant}.safetensors")
        teacher = model._teacher
        assert teacher is not None
        seen: dict[str, torch.Tensor] = {}
        sides = (("student", model.structure.blocks), ("teacher", teacher.sources))
        handles = []
        for side, blocks in sides:
            for k, pair in enumerate(model._collector.layer_map):

                def keep(m: Any, i: Any, out: Any, side: str = side, k: int = k) -> None:
                    hidden = out[0] if isinstance(out, tuple) else out
                    filtered = model.filters[k] if side == "student" else partial(teacher.target, k)
                    seen[f"{side}.{k}"] = filtered(hidden)

                handles.append(blocks[pair[side == "teacher"]].register_forward_hook(keep))
        with torch.no_grad():
            logits = {side: m.readout.read(self.batch) for side, m in (("student", model), ("teacher", teacher.module))}
        for handle in handles:
            handle.remove()
        for name, want in stored.items():
            if name.startswith("grad."):
                continue
            side, _, rest = name.partition("_")
            if "logits" in rest:
                found = logits[side]
                if self.question_answering:
                    found = found[:, int(rest.startswith("end"))]
                found = found.squeeze(-1) if self.regression else found
            else:
                found = seen[f"{side}.{rest.rpartition('.')[2]}"]
            self.errors.add(f"{variant}_states", "state", float((found - want).abs().max()))


def _relative(value: torch.Tensor, expected: float) -> float:
    error = abs(float(torch.as_tensor(value).detach()) - expected)
    return error / abs(expected) if expected else error


@contextmanager
def exact_attention_scale() -> Iterator[None]:
    """DeBERTa's attention scale in float64: transformers takes its square root in float32, an error of 1e-8.

    The expected float64 numbers are without it.
    """
    before = modeling_deberta_v2.scaled_size_sqrt

    def sqrt(query: torch.Tensor, factor: int) -> torch.Tensor:
        return torch.sqrt(torch.tensor(query.size(-1), dtype=torch.float64) * factor)

    modeling_deberta_v2.scaled_size_sqrt = sqrt
    try:
        yield
    finally:
        modeling_deberta_v2.scaled_size_sqrt = before


def check(folder: Path) -> dict[str, Any]:
    """The largest errors of a case in both dtypes, and the names of those over the tolerances."""
    report: dict[str, Any] = {"case": folder.name}
    failed: list[str] = []
    for dtype in (torch.float32, torch.float64):
        case = Case(folder, dtype)
        with exact_attention_scale():
            for side in ("teacher", "student"):
                case.stage1(side)
            for variant in ("ted", "lwd", "kd"):
                case.stage2(variant)
        report[case.name] = case.errors.values
        failed += [f"{case.name} {name}" for name in case.errors.over(case.name)]
    return {**report, "failed": failed}


def main() -> int:
    if len(sys.argv) < 2:
        print("usage: python tests/golden/check.py CASE_DIR [...]", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    failed = False
    for folder in map(Path, sys.argv[1:]):
        try:
            report = check(folder)
        except Exception as error:  # a folder that is no case must not hide what the others say
            traceback.print_exc()
            report = {"case": folder.name, "failed": [f"{type(error).__name__}: {error}"]}
        print(json.dumps(report), flush=True)
        failed |= bool(report["failed"])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
