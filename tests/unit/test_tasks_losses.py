"""Classification, regression and questions: both stages against losses written out, whatever the split."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ted_ds.batch import IGNORED, Batch, BatchCounts
from ted_ds.config.sections import LossConfig
from ted_ds.distill.distillation_model import DistillationModel
from ted_ds.distill.filter_learner import FilterLearner
from ted_ds.errors import ModelError
from ted_ds.models.filters import FilterPlan
from ted_ds.models.pooler import find_pooler
from ted_ds.models.structure import block_output, find_blocks
from ted_ds.tasks.base import Reading, Task
from ted_ds.tasks.classification import Classification, PoolerHead, Regression
from ted_ds.tasks.question_answering import QuestionAnswering, SpanHead
from ted_ds.teacher.frozen import FrozenModel, FrozenModule
from tests.project import loss_config, relative
from tests.tiny_encoders import CLASSIFIERS, ENCODERS, tiny_encoder

PAIRS = ((0, 1), (1, 3))
LABELS = ("a", "b", "c")
KINDS = ("classification", "regression", "question-answering")
WEIGHTS = loss_config(kl_alpha=0.7, mse_alpha=3.0, temperature=2.5)


def a_batch(kind: str, rows: int = 5, length: int = 11) -> Batch:
    draw = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 61, (rows, length), generator=draw)
    lengths = torch.tensor([11, 4, 7, 9, 5])[:rows]
    mask = (torch.arange(length) < lengths[:, None]).long()
    ids = ids * mask
    types = (torch.arange(length) >= 3).long() * mask
    if kind == "classification":
        return Batch(ids, torch.tensor([0, 2, IGNORED, 1, 1])[:rows], mask, types)
    if kind == "regression":
        return Batch(ids, torch.tensor([0.5, -1.0, 3.0, float("nan"), 2.0]).double()[:rows], mask, types)
    starts, ends = torch.tensor([2, 0, 1, 3, 4]), torch.tensor([10, 0, 11, 3, 4])  # one end beyond the sequence
    return Batch(ids, starts[:rows], mask, types, ends=ends[:rows])


def make_task(kind: str) -> Task:
    if kind == "classification":
        return Classification(LABELS)
    return Regression(lambda y: y) if kind == "regression" else QuestionAnswering()


def models(kind: Any, family: str) -> tuple[Any, Any]:
    labels = 1 if kind == "regression" else 3
    teacher = tiny_encoder(family, kind, blocks=4, width=24, seed=1, num_labels=labels).double()
    return teacher, tiny_encoder(family, kind, blocks=2, width=16, seed=2, num_labels=labels).double()


def build(kind: str, family: str, weights: LossConfig, *, lwd: bool = False) -> tuple[DistillationModel, FrozenModel]:
    teacher, student = models(kind, family)
    torch.manual_seed(3)
    filters_t, filters_s = (FilterPlan((0, 1), w, 24 if lwd else 8, True).build().double() for w in (24, 16))
    task = make_task(kind)
    frozen = FrozenModel(FrozenModule(teacher, task, nn.ModuleList() if lwd else filters_t))
    model = DistillationModel(student, filters_s if weights.mse_alpha else nn.ModuleList(), weights, task=task)
    model.attach_teacher(frozen, PAIRS if weights.mse_alpha else ())
    return model, frozen


def states_of(model: Any, batch: Batch) -> tuple[list[torch.Tensor], Any]:
    """(the raw output of every block, the model's output), with gradients."""
    seen: list[torch.Tensor] = []
    handles = [
        block.register_forward_hook(lambda m, i, out: seen.append(block_output(out)))
        for block in find_blocks(model).blocks
    ]
    typed = (getattr(model.config, "type_vocab_size", 0) or 0) > 1
    types = {"token_type_ids": batch.token_type_ids} if typed else {}
    output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **types)
    for handle in handles:
        handle.remove()
    return seen, output


def kl(z_s: torch.Tensor, z_t: torch.Tensor, heat: float, rows: int) -> torch.Tensor:
    log_p, log_q = (F.log_softmax(z / heat, -1) for z in (z_t, z_s))
    return heat**2 * (log_p.exp() * (log_p - log_q)).sum() / rows


def written_out(kind: str, model: DistillationModel, frozen: FrozenModel, batch: Batch) -> list[torch.Tensor]:
    """[total, pred, kl, layer, each pair's layer loss] from whole models, by the formulas alone."""
    w = model.loss
    states_s, out_s = states_of(model.student, batch)
    with torch.no_grad():
        states_t, out_t = states_of(frozen.module.model, batch)
    mask, rows = batch.attention_mask.bool(), len(batch.input_ids)
    if kind == "classification":
        pred = F.cross_entropy(out_s.logits, batch.targets)
        divergence = kl(out_s.logits, out_t.logits, w.temperature, rows)
    elif kind == "regression":
        known = ~batch.targets.isnan()
        y_s, y_t = out_s.logits[:, 0], out_t.logits[:, 0]
        pred = F.mse_loss(y_s[known], batch.targets[known])
        divergence = kl(y_s, y_t, w.temperature, rows)
    else:
        parts, divergences = [], []
        for name, positions in (("start_logits", batch.targets), ("end_logits", batch.ends)):
            z_s, z_t = getattr(out_s, name), getattr(out_t, name)
            if w.mask_padding:
                z_s, z_t = (z.masked_fill(~mask, -1e30) for z in (z_s, z_t))
            known = positions < mask.shape[1]
            parts.append(F.cross_entropy(z_s[known], positions[known]))
            divergences.append(kl(z_s, z_t, w.temperature, rows))
        pred, divergence = sum(parts) / 2, sum(divergences) / 2
    each = []
    for k, (s, t) in enumerate(PAIRS if len(model.filters) else ()):
        error = (model.filters[k](states_s[s]) - frozen.target(k, states_t[t])).square()
        each.append((error[mask] if w.mask_padding else error).mean())
    layer = torch.stack(each).mean() if each else torch.zeros(())
    return [pred + w.kl_alpha * divergence + w.mse_alpha * layer, pred, divergence, layer, *each]


def worst_gradient(got: dict[str, torch.Tensor], module: nn.Module) -> float:
    want = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert got.keys() == want.keys()
    largest = max(float(t.abs().max()) for t in want.values())
    return max(float((got[name] - t).abs().max()) for name, t in want.items()) / largest


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


CASES = [
    *((kind, family, WEIGHTS, False) for kind in KINDS for family in ENCODERS),
    *(("classification", family, WEIGHTS, False) for family in CLASSIFIERS[len(ENCODERS) :]),
    *(
        (kind, "bert", loss_config(kl_alpha=0.7, mse_alpha=3.0, temperature=2.5, mask_padding=False), False)
        for kind in KINDS
    ),
    *((kind, "deberta-v2", WEIGHTS, True) for kind in KINDS),
    *((kind, "electra", loss_config(kl_alpha=1.3, mse_alpha=0.0), False) for kind in KINDS),
]


@pytest.mark.parametrize(("kind", "family", "weights", "lwd"), CASES)
def test_losses_and_gradients_are_those_written_out(kind: str, family: str, weights: LossConfig, lwd: bool) -> None:
    batch = a_batch(kind)
    model, frozen = build(kind, family, weights, lwd=lwd)
    loss, terms = model(batch=batch, counts=BatchCounts.of(batch))
    (0.37 * loss).backward()
    got = gradients(model)
    model.zero_grad()
    want = written_out(kind, model, frozen, batch)
    (0.37 * want[0]).backward()
    # DeBERTa's attention scale, ModernBERT's and Llama's rotary angles are float32 whatever they are given
    assert relative(terms, torch.stack(want).detach()) < 1e-9
    assert worst_gradient(got, model) < 1e-9
    assert all(p.grad is None for p in frozen.module.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_of_other_padding_add_up_to_the_batch(kind: str) -> None:
    batch = a_batch(kind)
    weights = loss_config(
        kl_alpha=0.0 if kind == "regression" else 0.7, mse_alpha=3.0
    )  # a regression's KL needs all rows at once
    model, _ = build(kind, "bert", weights)
    counts = BatchCounts.of(batch)
    loss, terms = model(batch=batch, counts=counts)
    loss.backward()
    whole = gradients(model)
    model.zero_grad()
    total: Any = 0.0
    for rows in (slice(0, 1), slice(1, 3), slice(3, 5)):
        longest = int(batch.attention_mask[rows].sum(1).max()) + 1
        longest = 11 if kind == "question-answering" else min(11, longest)  # its positions reach to 10
        part = Batch(
            batch.input_ids[rows, :longest],
            batch.targets[rows],
            batch.attention_mask[rows, :longest],
            batch.token_type_ids[rows, :longest],
            ends=None if batch.ends is None else batch.ends[rows],
        )
        loss, share = model(batch=part, counts=counts)
        loss.backward()
        total = total + share
    assert relative(total, terms) < 1e-12
    assert worst_gradient(whole, model) < 1e-12


def test_a_regressions_kl_over_ranks_is_that_of_all_rows() -> None:
    """Two 'ranks' that see each other's predictions: their shares and gradients add up to one rank's."""
    batch = a_batch("regression")
    model, _ = build("regression", "bert", loss_config(kl_alpha=2.0, mse_alpha=0.0, temperature=1.5))
    counts = BatchCounts.of(batch)
    loss, terms = model(batch=batch, counts=counts)
    loss.backward()
    whole = gradients(model)
    model.zero_grad()
    parts = [
        Batch(batch.input_ids[r], batch.targets[r], batch.attention_mask[r], batch.token_type_ids[r])
        for r in (slice(0, 2), slice(2, 5))
    ]
    with torch.no_grad():
        everything = {
            side: torch.cat([m.read(part).squeeze(-1) for part in parts])
            for side, m in (("student", model.readout), ("teacher", model._teacher.module.readout))
        }
    total: Any = 0.0
    for part in parts:
        sides = iter(("student", "teacher"))  # in the order in which the loss asks
        model.task._gather = lambda own, sides=sides: everything[next(sides)] / 1.5
        loss, share = model(batch=part, counts=counts)
        loss.backward()
        total = total + share
    assert relative(total, terms) < 1e-12
    assert worst_gradient(whole, model) < 1e-12


STAGE1 = [
    *((kind, family) for kind in KINDS[:2] for family in CLASSIFIERS),
    *((KINDS[2], family) for family in ENCODERS),
]


@pytest.mark.parametrize(("kind", "family"), STAGE1)
def test_stage1_is_plain_autograd_through_the_frozen_model(kind: str, family: str) -> None:
    model = models(kind, family)[0]
    frozen = FrozenModel(FrozenModule(model, make_task(kind)))
    outputs = 1 if kind == "regression" else 3
    pooler = find_pooler(model.config)
    head: Any = SpanHead(mask_padding=True)
    if kind != "question-answering":
        head = PoolerHead(pooler, outputs, regression=kind == "regression")
    torch.manual_seed(5)
    plan = FilterPlan((0, 2), 24, 8, nonlinear=family == "bert")
    learner = FilterLearner(plan.build(), frozen, plan.blocks, head).double()
    batch = a_batch(kind)
    loss, terms = learner(batch=batch, counts=BatchCounts.of(batch), step=0)
    (0.37 * loss).backward()
    got = gradients(learner)
    learner.zero_grad()
    states, _ = states_of(model, batch)
    mask, want = batch.attention_mask, []
    for probe, block in zip(learner.probes, plan.blocks, strict=True):
        filtered = probe.filter(states[block].detach())
        if kind == "question-answering":
            z = F.linear(filtered, probe.head_weight, probe.head_bias).masked_fill(mask[..., None] == 0, -1e30)
            known = batch.ends < mask.shape[1]
            parts = F.cross_entropy(z[..., 0], batch.targets), F.cross_entropy(z[known][..., 1], batch.ends[known])
            want.append(sum(parts) / 2)
            continue
        last = mask.sum(1) - 1
        token = filtered[torch.arange(len(last)), last] if family in ("llama", "qwen2") else filtered[:, 0]
        if family == "modernbert":
            token = (
                filtered[:, 0]
                if pooler.token == "first"
                else (filtered * mask[..., None]).sum(1) / mask.sum(1)[:, None]
            )
        if hasattr(probe, "pooler_weight"):
            token = F.linear(token, probe.pooler_weight, getattr(probe, "pooler_bias", None))
            token = token.tanh() if family in ("bert", "roberta", "xlm-roberta") else F.gelu(token)
        if hasattr(probe, "norm_weight"):
            token = F.layer_norm(token, (8,), probe.norm_weight, getattr(probe, "norm_bias", None), 1e-5)
        z = F.linear(token, probe.head_weight, probe.head_bias)
        known = ~batch.targets.isnan()
        regression = kind == "regression"
        want.append(F.mse_loss(z[known, 0], batch.targets[known]) if regression else F.cross_entropy(z, batch.targets))
    mean = torch.stack(want).mean()
    (0.37 * mean).backward()
    assert relative(terms, torch.stack([mean, *want]).detach()) < 1e-12
    assert worst_gradient(got, learner) < 1e-12


def test_models_of_other_label_orders_give_the_same_loss() -> None:
    batch = a_batch("classification")
    teacher, student = models("classification", "bert")
    order = [2, 0, 1]  # the models' number of each label
    names = {2: "a", 0: "b", 1: "c"}
    losses = []
    for turned in (False, True):
        if turned:
            for model in (teacher, student):
                model.config.id2label = names
                with torch.no_grad():
                    for tensor in model.classifier.parameters():
                        tensor.copy_(tensor[[order.index(i) for i in range(3)]])
        task = Classification(LABELS)
        distilled = DistillationModel(student, nn.ModuleList(), loss_config(kl_alpha=1.0, mse_alpha=0.0), task=task)
        distilled.attach_teacher(FrozenModel(FrozenModule(teacher, task)), ())
        losses.append(distilled(batch=batch, counts=BatchCounts.of(batch))[1])
        predicted = distilled(batch=batch)
    torch.testing.assert_close(losses[0], losses[1])
    assert predicted.shape == (5, 3)
    assert distilled.readout.order.tolist() == order


def test_padding_does_not_matter_unless_it_is_asked_for() -> None:
    short = a_batch("question-answering")
    padded = Batch(
        *(F.pad(t, (0, 5)) if t is not None and t.ndim == 2 else t for t in (short.input_ids, short.targets)),
        F.pad(short.attention_mask, (0, 5)),
        F.pad(short.token_type_ids, (0, 5)),
        ends=torch.where(short.ends >= 11, 16, short.ends),
    )
    for masked in (True, False):
        model, _ = build("question-answering", "bert", loss_config(kl_alpha=1.0, mse_alpha=1.0, mask_padding=masked))
        a, b = (model(batch=x, counts=BatchCounts.of(x))[1] for x in (short, padded))
        assert (relative(a, b) < 1e-9) == masked


def test_filters_and_targets_of_different_widths_are_refused() -> None:
    model, frozen = build("classification", "bert", WEIGHTS)
    other = DistillationModel(model.student, FilterPlan((0, 1), 16, 9).build(), WEIGHTS, task=Classification(LABELS))
    with pytest.raises(
        ModelError, match="the student's filters have width 9, the teacher's side 8: both must be one F"
    ):
        other.attach_teacher(frozen, PAIRS)


def test_a_questions_kl_is_finite_at_any_temperature() -> None:
    model, _ = build("question-answering", "bert", loss_config(kl_alpha=1.0, mse_alpha=0.0, temperature=0.01))
    batch = a_batch("question-answering")
    assert model(batch=batch, counts=BatchCounts.of(batch))[1].isfinite().all()
    logits = torch.randn(5, 2, 11)  # float32, whose range is smaller
    losses = QuestionAnswering().losses(
        Reading(logits, None), Reading(-logits, None), batch, BatchCounts.of(batch), model.loss
    )
    assert losses.kl_loss.isfinite() and losses.kl_loss > 0
