from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ted_ds.batch import IGNORED, Batch, BatchCounts
from ted_ds.config.sections import LossConfig
from ted_ds.distill.distillation_model import DistillationModel
from ted_ds.distill.filter_learner import FilterLearner
from ted_ds.errors import ModelError
from ted_ds.models.filters import FilterPlan
from ted_ds.models.loading import resident_readout
from ted_ds.models.structure import find_structure
from ted_ds.ops import Head, logit_gemms, logit_loss
from ted_ds.tasks.causal_lm import CausalLM, LMHead
from ted_ds.teacher.frozen import FrozenModel, FrozenModule, filtered_square_sums
from tests.project import loss_config, relative
from tests.tiny_models import FAMILIES, READS_BACK, tiny_model

PAIRS = ((0, 1), (1, 3))
VOCAB = 97


def a_batch(rows: int = 3, length: int = 10, vocab: int = VOCAB) -> Batch:
    ids = torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(7))
    targets = torch.full_like(ids, IGNORED)
    targets[:, :-1] = ids[:, 1:]
    return Batch(ids, targets)


def build(
    weights: LossConfig, *, family: str = "llama", mean_squares: torch.Tensor | None = None, **sizes: Any
) -> tuple[DistillationModel, FrozenModel]:
    teacher_vocab, vocab = sizes.pop("teacher_vocab", VOCAB), sizes.pop("vocab", VOCAB)
    teacher = tiny_model(family, blocks=4, width=24, seed=1, vocab=teacher_vocab, **sizes).double()
    student = tiny_model(family, blocks=2, width=16, seed=2, vocab=vocab, **sizes).double()
    torch.manual_seed(3)
    filters_t, filters_s = (FilterPlan((0, 1), width, 8).build().double() for width in (24, 16))
    pairs = PAIRS if weights.mse_alpha else ()
    frozen = FrozenModel(FrozenModule(teacher, CausalLM(VOCAB), filters_t))
    model = DistillationModel(student, filters_s if pairs else nn.ModuleList(), weights, task=CausalLM(VOCAB))
    model.attach_teacher(frozen, pairs, mean_squares)
    return model, frozen


def run(model: DistillationModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    model.zero_grad()
    loss, terms = model(batch=batch, counts=BatchCounts.of(batch))
    loss.backward()
    return loss.detach(), terms


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_those_of_plain_autograd(family: str) -> None:
    batch = a_batch()
    model, frozen = build(loss_config(kl_alpha=0.7, mse_alpha=3.0, temperature=2.5), family=family)
    loss, terms = run(model, batch)
    got = {name: p.grad.clone() for name, p in model.named_parameters()}

    model.zero_grad()
    want = plain_loss(model, frozen, batch)
    want.sum_.backward()
    assert relative(loss, want.sum_.detach()) < 1e-12
    assert relative(terms[1:4], torch.stack([want.pred, want.kl, want.layer]).detach()) < 1e-6
    assert worst_gradient(got, model) < 1e-10


class Stranger:
    """A teacher written from the text of `Teacher` alone: the library's hidden states, handed over one by one."""

    target_width = 8

    def __init__(self, model: Any, filters: Any) -> None:
        self._model, self._filters = model, filters
        self.sources = {1: nn.Identity(), 2: nn.Identity()}

    def target(self, pair: int, hidden: torch.Tensor) -> torch.Tensor:
        return self._filters[pair](hidden)

    def stream(self, batch: Batch, use_output: Any = None, *, until: nn.Module | None = None) -> None:
        with torch.no_grad():
            states = self._model(batch.input_ids, output_hidden_states=True).hidden_states
            for block, source in self.sources.items():
                source(states[block + 1])
        if use_output is not None:
            use_output(states[-1], Head(self._model.lm_head.weight, None))

    def expect(self, batches: Any) -> None:
        pass


@pytest.mark.parametrize("kl_alpha", [0.7, 0.0])
def test_a_teacher_needs_no_more_than_the_contract(kl_alpha: float) -> None:
    pairs, batch = ((0, 1), (1, 2)), a_batch()
    model, frozen = build(loss_config(kl_alpha=kl_alpha, mse_alpha=3.0))
    model.attach_teacher(frozen, pairs)
    want = run(model, batch)[1]
    model.attach_teacher(Stranger(frozen.module.model, frozen.module.filters), pairs)
    assert want[3] > 0 and torch.allclose(run(model, batch)[1], want, rtol=1e-6)


def worst_gradient(got: dict[str, torch.Tensor], model: nn.Module) -> float:
    """The largest error of any gradient, over the largest gradient: some are zero by symmetry."""
    want = {name: p.grad for name, p in model.named_parameters()}
    scale = max(float(gradient.norm()) for gradient in want.values())
    return max(float((got[name] - gradient).norm()) for name, gradient in want.items()) / scale


class plain_loss:
    """The specification: both models whole, all states kept, logits whole."""

    def __init__(self, model: DistillationModel, frozen: FrozenModel, batch: Batch) -> None:
        student, teacher, weights = model.student, frozen.module.model, model.loss
        states: dict[str, list[torch.Tensor]] = {"s": [], "t": []}
        handles = [
            part.blocks[block].register_forward_hook(
                lambda m, i, out, side=side: states[side].append(out[0] if isinstance(out, tuple) else out)
            )
            for side, part, column in (("s", model.structure, 0), ("t", frozen.module.structure, 1))
            for block in (pair[column] for pair in PAIRS)
        ]
        z_s = student(batch.input_ids).logits[..., :VOCAB]
        with torch.no_grad():
            z_t = teacher(batch.input_ids).logits[..., :VOCAB]
        for handle in handles:
            handle.remove()
        keep = batch.targets != IGNORED
        heat = weights.temperature
        self.pred = F.cross_entropy(z_s[keep], batch.targets[keep])
        log_s, log_t = (F.log_softmax(z[keep] / heat, -1) for z in (z_s, z_t))
        self.kl = heat**2 * F.kl_div(log_s, log_t, log_target=True, reduction="batchmean")
        errors = [
            F.mse_loss(f_s(h_s), f_t(h_t))
            for f_s, f_t, h_s, h_t in zip(model.filters, frozen.module.filters, states["s"], states["t"], strict=True)
        ]
        self.layer = torch.stack(errors).mean()
        self.sum_ = self.pred + weights.kl_alpha * self.kl + weights.mse_alpha * self.layer


def test_normalised_and_raw_layer_loss_differ_by_the_teachers_mean_square() -> None:
    batch = a_batch()
    raw, frozen = build(loss_config(kl_alpha=1.0, mse_alpha=1.0))
    _, terms = run(raw, batch)
    squares = filtered_square_sums(frozen, (1, 3), batch) / (batch.input_ids.numel() * 8)
    scaled, _ = build(loss_config(kl_alpha=1.0, mse_alpha=1.0), mean_squares=squares)
    _, normalised = run(scaled, batch)
    assert relative(normalised[4:] * squares, terms[4:]) < 1e-6
    assert relative(normalised[3], normalised[4:].mean()) < 1e-6


def test_ted_without_layers_is_kd_and_kd_without_kl_is_ce() -> None:
    batch = a_batch()
    kd, _ = build(loss_config(kl_alpha=1.0, mse_alpha=0.0))
    ted, _ = build(loss_config(kl_alpha=1.0, mse_alpha=1e-300))
    ce = DistillationModel(kd.student, nn.ModuleList(), loss_config(kl_alpha=0.0, mse_alpha=0.0), task=CausalLM(VOCAB))
    kd_without, _ = build(loss_config(kl_alpha=0.0, mse_alpha=0.0))
    assert relative(run(ted, batch)[0], run(kd, batch)[0]) < 1e-14
    grads = [p.grad.clone() for p in kd.parameters()]
    run(ted, batch)
    assert all(relative(p.grad, g) < 1e-14 for p, g in zip(ted.student.parameters(), grads, strict=True))
    assert torch.equal(run(kd_without, batch)[0], run(ce, batch)[0])


def test_filters_read_what_the_layer_loss_compares() -> None:
    with pytest.raises(ModelError, match=r"loss\.layer_loss rms_mse wants filters that read hidden states normalised"):
        build(loss_config(kl_alpha=1.0, mse_alpha=1.0, layer_loss="rms_mse"))


@pytest.mark.parametrize("kl_alpha", [0.7, 0.0])
def test_a_layer_loss_that_has_faded_out_costs_nothing(kl_alpha: float, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = a_batch()
    kd, _ = build(loss_config(kl_alpha=kl_alpha, mse_alpha=0.0))
    wanted, _ = run(kd, batch)
    model, frozen = build(loss_config(kl_alpha=kl_alpha, mse_alpha=3.0))
    monkeypatch.setattr(frozen, "target", None)  # no pair is looked at
    loss, terms = model(batch=batch, counts=BatchCounts.of(batch), fade=0.0)
    loss.backward()
    assert relative(loss.detach(), wanted) < 1e-14 and terms[3] == 0 and len(terms) == 4
    for name, parameter in model.named_parameters():  # under ZeRO-3 gradients that are not made are the last ones
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()) == name.startswith("student."), name


@pytest.mark.parametrize("side", ["teacher_vocab", "vocab"])
def test_a_vocabulary_padded_on_one_side_changes_nothing(side: str) -> None:
    batch = a_batch()
    plain, _ = build(loss_config(kl_alpha=1.0, mse_alpha=1.0))
    loss, _ = run(plain, batch)
    padded, frozen = build(loss_config(kl_alpha=1.0, mse_alpha=1.0), **{side: 112})
    copy_common(plain.student, padded.student)
    copy_common(build(loss_config(kl_alpha=1.0, mse_alpha=1.0))[1].module.model, frozen.module.model)
    padded_loss, _ = run(padded, batch)
    assert relative(padded_loss, loss) < 1e-14
    grads = dict(plain.student.named_parameters())
    for name, parameter in padded.student.named_parameters():
        assert relative(parameter.grad[: grads[name].shape[0]], grads[name].grad) < 1e-12, name
        assert float(parameter.grad[grads[name].shape[0] :].abs().sum()) == 0.0


def copy_common(source: nn.Module, target: nn.Module) -> None:
    with torch.no_grad():
        for (_, a), (_, b) in zip(source.named_parameters(), target.named_parameters(), strict=True):
            b[: a.shape[0]] = a


def test_micro_batches_add_up_to_the_global_batch() -> None:
    batch = a_batch(rows=4)
    model, _ = build(loss_config(kl_alpha=1.0, mse_alpha=2.0))
    _, terms = run(model, batch)
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    parts = [Batch(batch.input_ids[i : i + 1], batch.targets[i : i + 1]) for i in range(4)]
    added = torch.zeros_like(terms)
    for part in parts:
        loss, share = model(batch=part, counts=BatchCounts.of(batch))
        loss.backward()
        added += share
    assert relative(added, terms) < 1e-6
    assert all(relative(p.grad, g) < 1e-12 for p, g in zip(model.parameters(), grads, strict=True))


def test_filters_and_layer_map_must_agree() -> None:
    model, frozen = build(loss_config(kl_alpha=1.0, mse_alpha=1.0))
    with pytest.raises(ModelError, match="2 student filters do not fit a layer map of 1 pairs"):
        model.attach_teacher(frozen, ((0, 1),))


class Allocations(TorchDispatchMode):
    """The largest number of elements of any tensor that an operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


def test_no_tensor_of_tokens_by_vocabulary_is_ever_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """V is chosen so large that [N, V] stands out, and the chunk budget so small that it must be cut."""
    monkeypatch.setattr(logit_gemms, "_CPU_CHUNK_BYTES", 32 * 4001 * 4 * 2)
    vocab, batch = 4001, a_batch(rows=4, length=64, vocab=4001)
    teacher, student = (tiny_model("llama", blocks=n, width=8, vocab=vocab) for n in (2, 1))
    frozen = FrozenModel(FrozenModule(teacher, CausalLM(vocab), FilterPlan((1,), 8, 8).build()))
    model = DistillationModel(
        student, FilterPlan((0,), 8, 8).build(), loss_config(kl_alpha=1.0, mse_alpha=1.0), task=CausalLM(vocab)
    )
    model.attach_teacher(frozen, ((0, 1),))
    norm, head = resident_readout(teacher, torch.device("cpu"))
    learner = FilterLearner(FilterPlan((1,), 8, 4).build(), frozen, (1,), LMHead(norm, head, vocab_size=vocab))
    for module, inputs in ((model, {}), (learner, {"step": 0})):
        with Allocations() as seen:
            loss, _ = module(batch=batch, counts=BatchCounts.of(batch), **inputs)
            loss.backward()
        assert vocab * 8 <= seen.largest <= batch.input_ids.numel() * vocab / 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("output_dim", [16, 8])
def test_stage1_is_plain_autograd_through_the_frozen_model(family: str, output_dim: int) -> None:
    model = tiny_model(family, blocks=3).double()
    frozen = FrozenModel(FrozenModule(model, CausalLM(VOCAB)))
    norm, head = resident_readout(model, torch.device("cpu"))
    torch.manual_seed(5)
    plan = FilterPlan((0, 2), 16, output_dim, nonlinear=family == "gpt2")
    learner = FilterLearner(plan.build(), frozen, plan.blocks, LMHead(norm, head, vocab_size=VOCAB)).double()
    batch = a_batch()
    loss, terms = learner(batch=batch, counts=BatchCounts.of(batch), step=0)
    (0.37 * loss).backward()
    got = {name: p.grad.clone() for name, p in learner.named_parameters()}

    learner.zero_grad()
    structure, want = find_structure(model), []
    for probe, block in zip(learner.probes, plan.blocks, strict=True):
        seen: list[torch.Tensor] = []
        handle = structure.blocks[block].register_forward_hook(
            lambda m, i, out, seen=seen: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        model(batch.input_ids)
        handle.remove()
        states = probe.filter(seen[0])
        if output_dim != 16:
            states = F.linear(states, probe.up_weight, probe.up_bias)
        logits = structure.lm_head(structure.final_norm(states)) * structure.logit_scale
        if structure.logit_softcap:
            logits = structure.logit_softcap * torch.tanh(logits / structure.logit_softcap)
        want.append(F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED))
    mean = torch.stack(want).mean()
    (0.37 * mean).backward()
    assert relative(terms, torch.stack([mean, *want]).detach()) < 1e-6
    # RMSNorm computes in float32 whatever it is given
    assert worst_gradient(got, learner) < (1e-10 if family in ("gpt2", "gpt_neox", "opt") else 1e-6)
    assert all(p.grad is None for p in model.parameters())


def test_a_token_fraction_is_unbiased() -> None:
    """Averaged over many steps, seeing a third of the positions gives the loss of all."""
    model = tiny_model("llama", blocks=1)
    frozen = FrozenModel(FrozenModule(model, CausalLM(VOCAB)))
    norm, head = resident_readout(model, torch.device("cpu"))
    batch = a_batch(length=9)

    def loss(fraction: float, step: int) -> float:
        torch.manual_seed(0)
        filters = FilterPlan((0,), 16, 16).build()
        learner = FilterLearner(
            filters, frozen, (0,), LMHead(norm, head, vocab_size=VOCAB, token_fraction=fraction, seed=1)
        )
        return float(learner(batch=batch, counts=BatchCounts.of(batch), step=step)[1][0])

    drawn = torch.tensor([loss(1 / 3, step) for step in range(400)])
    assert abs(float(drawn.mean()) - loss(1.0, 0)) < 4 * float(drawn.std()) / 400**0.5
    assert float(drawn.std()) > 0


def test_the_teachers_forward_ends_where_nothing_after_it_is_needed() -> None:
    """Without a KL no block after the last pair's runs; with one, all do; the layer losses are the same."""
    batch = a_batch()
    ran: list[int] = []
    terms = {}
    for kl_alpha in (0.0, 1.0):
        model, frozen = build(loss_config(kl_alpha=kl_alpha, mse_alpha=3.0))
        model.attach_teacher(frozen, ((0, 0), (1, 2)))
        for i, block in enumerate(frozen.module.structure.blocks):
            block.register_forward_hook(lambda m, inputs, out, i=i: ran.append(i))
        terms[kl_alpha] = run(model, batch)[1]
    assert ran == [0, 1, 2, 0, 1, 2, 3]
    assert relative(terms[0.0][3:], terms[1.0][3:]) < 1e-12
    assert not any(name.startswith("_") for name, _ in model.named_modules()), "the teacher is no part of the student"


class Reads(TorchDispatchMode):
    """Operations that on CUDA make the host wait for the device: values or shapes are read back."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *((family, {}) for family in FAMILIES),
        *(("llama", {"divergence": kind}) for kind in ("reverse", "jensen-shannon")),
        ("llama", {"kl_top_k": 5}),
        ("llama", {"temperature": 1.5}),
    ],
)
def test_a_micro_batch_reads_nothing_back(
    family: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # on a CPU nobody waits for the number of rows that have a target; a test of the losses on CUDA is in tests/kernels
    monkeypatch.setattr(logit_loss, "_predicted_rows", lambda targets: None)
    if family in READS_BACK:
        pytest.skip("transformers itself reads back")
    batch = a_batch()
    model, frozen = build(loss_config(kl_alpha=0.7, mse_alpha=3.0, **options), family=family)
    norm, head = resident_readout(frozen.module.model, torch.device("cpu"))
    head_ = LMHead(norm, head, vocab_size=VOCAB, token_fraction=0.5)
    learner = FilterLearner(FilterPlan((1,), 24, 8).build().double(), frozen, (1,), head_)
    counts = BatchCounts.of(batch)
    with Reads() as reads:
        for module, inputs in ((model, {}), (learner, {"step": 0})):
            loss, _ = module(batch=batch, counts=counts, **inputs)
            loss.backward()
    assert reads.seen == []
