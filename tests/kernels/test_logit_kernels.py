"""The logit kernel against plain autograd in float64: natively on a GPU, in Triton's interpreter without one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ted_ds.batch import IGNORED
from ted_ds.ops import Head, dispatch, linear_cross_entropy_kl, logit_loss, teacher_top_k, token_scores
from ted_ds.ops.reference import cross_entropy_sum, kl_sum, soft_capped, top_k_kl_sum
from tests.conftest import DEVICE

# the interpreter computes, with numpy, what lies beyond a row's end too, before it is masked out
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

D_S, D_T, UPSTREAM = 19, 23, 0.37
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Relative, of losses and gradients: what the GEMMs of the dtype leave."""

KINDS: dict[str, dict[str, Any]] = {
    "forward": {},
    "reverse": {"divergence": "reverse"},
    "jensen-shannon": {"divergence": "jensen-shannon"},
    "top 5": {"top_k": 5},
    "cross-entropy alone": {},
}


@pytest.fixture(autouse=True)
def kernels_serve_the_cpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "has_kernel", lambda x: True)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float((a - b).norm() / b.norm())


def rounding(z_s: torch.Tensor, z_t: torch.Tensor, temperature: float) -> float:
    """What float32 may change in the sum of a KL's terms p (log p - log q).

    Each log-probability is rounded by its own size; if p is near q, their difference, and so the KL, is far smaller.
    """
    sizes = [torch.log_softmax(z.detach() / temperature, dim=-1).abs().mean(-1).sum() for z in (z_s, z_t)]
    return temperature**2 * torch.finfo(torch.float32).eps * float(sum(sizes))


def compare(
    kind: str,
    *,
    tokens: int = 5,
    vocab: int,
    temperature: float = 2.0,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float32,
    spread: float = 1.0,
    padding: int = 0,
    tolerance: float | None = None,
) -> None:
    """Losses and gradients of `kind` by the kernel, and by torch on the same (rounded) numbers in float64."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(dtype)

    hidden_s, hidden_t = draw(tokens, D_S), draw(tokens, D_T)
    weight_s = draw(vocab + padding, D_S, scale=spread * D_S**-0.5)
    weight_t = draw(vocab, D_T, scale=spread * D_T**-0.5)
    bias = draw(vocab + padding)
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    targets[1::3] = IGNORED
    options = KINDS[kind]
    pred, kl = 0.031, 0.0 if kind == "cross-entropy alone" else 0.027

    leaves = [t.double().requires_grad_() for t in (hidden_s, weight_s, bias)]
    z_s = soft_capped(leaves[0] @ leaves[1].T + leaves[2], softcap)[:, :vocab]
    z_t = soft_capped(hidden_t.double() @ weight_t.double().T, softcap)
    ce = cross_entropy_sum(z_s, targets)
    if "top_k" in options:
        apart = top_k_kl_sum(z_s, z_t, targets, temperature, options["top_k"])
    else:
        apart = kl_sum(z_s, z_t, targets, temperature, **options)
    (pred * ce + kl * apart).backward(torch.tensor(UPSTREAM, dtype=torch.float64))

    own = [t.to(DEVICE).requires_grad_() for t in (hidden_s, weight_s, bias)]
    taught = (hidden_t.to(DEVICE), Head(weight_t.to(DEVICE), None, softcap)) if kl else (None, None)
    total, ce_sum, kl_sum_ = linear_cross_entropy_kl(
        own[0],
        Head(own[1], own[2], softcap),
        targets.to(DEVICE),
        *taught,
        pred_scale=pred,
        kl_scale=kl,
        temperature=temperature,
        chunk_tokens=3,
        **options,
    )
    total.backward(torch.tensor(UPSTREAM, device=DEVICE))
    tolerance = tolerance or TOLERANCE[dtype]
    assert distance(ce_sum, ce) < tolerance
    assert not kl or distance(kl_sum_, apart) < tolerance + rounding(z_s, z_t, temperature) / float(apart.detach())
    for got, want in zip(own, leaves, strict=True):
        assert got.grad is not None and want.grad is not None
        assert got.grad.dtype == dtype and distance(got.grad, want.grad) < tolerance
        if padding and got is not own[0]:
            assert not got.grad[vocab:].any()


@pytest.mark.parametrize("temperature", [1.0, 2.0, 2.5])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_reference(kind: str, softcap: float | None, temperature: float) -> None:
    compare(kind, vocab=401, softcap=softcap, temperature=temperature)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind: str, dtype: torch.dtype) -> None:
    compare(kind, vocab=401, dtype=dtype)


@pytest.mark.parametrize(
    ("kind", "vocab", "temperature", "dtype", "tolerance"),
    [
        # in float32 the GEMM over V rounds so, in bfloat16 everything does
        *((kind, 151936, 2.5, torch.float32, 2e-4) for kind in KINDS),
        ("forward", 50257, 1.0, torch.float32, 2e-4),
        ("forward", 262144, 2.0, torch.float32, 2e-4),
        ("forward", 50257, 2.5, torch.bfloat16, 3e-2),
        ("top 5", 151936, 1.0, torch.bfloat16, 3e-2),
    ],
)
def test_large_vocabularies(kind: str, vocab: int, temperature: float, dtype: torch.dtype, tolerance: float) -> None:
    compare(kind, tokens=2, vocab=vocab, temperature=temperature, dtype=dtype, spread=3.0, tolerance=tolerance)


@pytest.mark.parametrize("vocab", [2, 2047, 2048, 2049])
def test_vocabularies_around_a_block(vocab: int) -> None:
    for kind in ("forward", "cross-entropy alone"):
        compare(kind, tokens=3, vocab=vocab)


@pytest.mark.parametrize("vocab", [401, 408, 3])
def test_gemms_have_even_sizes_and_rows_that_are_aligned(monkeypatch: pytest.MonkeyPatch, vocab: int) -> None:
    """In training, evaluation, and of a recorded teacher; what is left of an odd vocabulary goes by itself."""
    seen: set[tuple[int, int]] = set()
    gemm = logit_loss.gemm_logits

    def spy(*call: Any) -> torch.Tensor:
        logits = gemm(*call)
        widths = [part.stop - part.start for part in logit_loss.even_parts(logits)]
        assert sum(widths) == vocab and all(width % 8 == 0 or width < 8 for width in widths)
        seen.add((len(logits), logits.stride(0) % 64))
        return logits

    monkeypatch.setattr(logit_loss, "gemm_logits", spy)
    hidden, weight = torch.randn(6, 8, device=DEVICE), torch.randn(vocab, 8, device=DEVICE)
    targets = torch.tensor([0, 2, IGNORED, 1, 1, 2], device=DEVICE)
    head = Head(weight, None)
    linear_cross_entropy_kl(hidden, head, targets, pred_scale=1.0, chunk_tokens=6)
    nll, greedy = token_scores(hidden[:5], head, targets[:5], chunk_tokens=5)
    top = teacher_top_k(hidden[:4], head, 2, temperature=1.0, chunk_tokens=4)
    assert seen == {(6 if DEVICE == "cuda" else 5, 0), (4, 0)}  # rows without a target go only if the host may wait
    log_probs = (hidden.double() @ weight.double().T).log_softmax(-1)
    assert distance(nll, -log_probs[:5].gather(1, targets[:5, None].clamp_min(0))[:, 0] * (targets[:5] >= 0)) < 1e-5
    assert distance(top.log_probs, log_probs[:4].topk(2).values) < 1e-5
    assert torch.equal(greedy, targets[:5] == log_probs[:5].argmax(-1))


@pytest.mark.parametrize("kind", ["forward", "reverse", "jensen-shannon", "top 5"])
def test_probabilities_that_underflow(kind: str) -> None:
    compare(kind, vocab=401, spread=60.0)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_student_that_gives_the_rest_nothing(temperature: float) -> None:
    """All but one of its probabilities underflow; the teacher's rest still pulls at them, by the student's shares."""
    z_s, z_t = torch.full((1, 12), -130.0 * temperature), torch.zeros(1, 12)
    z_s[0, 0], z_t[0, 0], z_s[0, 5] = 0.0, 1.0, -129.0 * temperature
    z_t[0, 8] = 0.5  # no two candidates for the second place: devices break ties otherwise
    targets = torch.tensor([0])
    want = z_s.double().requires_grad_()
    loss = top_k_kl_sum(want, z_t.double(), targets, temperature, 2)
    loss.backward()
    one = torch.eye(12, device=DEVICE)
    got = z_s.to(DEVICE).requires_grad_()
    call = (got, Head(one, None), targets.to(DEVICE), z_t.to(DEVICE), Head(one, None))
    total, _, kl = linear_cross_entropy_kl(*call, pred_scale=0.0, kl_scale=1.0, temperature=temperature, top_k=2)
    total.backward()
    assert got.grad is not None and want.grad is not None
    assert distance(kl, loss) < 1e-5 and distance(got.grad, want.grad) < 1e-5


def test_all_ids_of_low_logits() -> None:
    z = torch.arange(5.0)[None] - 300.0
    got = z.to(DEVICE).requires_grad_()
    head, targets = Head(torch.eye(5, device=DEVICE), None), torch.tensor([0], device=DEVICE)
    total, ce, kl = linear_cross_entropy_kl(
        got, head, targets, got.detach().flip(1), head, pred_scale=1.0, kl_scale=1.0, top_k=5
    )
    total.backward()
    want = z.double()
    assert distance(ce, cross_entropy_sum(want, targets.cpu())) < 1e-5
    assert distance(kl, kl_sum(want, want.flip(1), targets.cpu(), 2.0)) < 1e-4
    assert got.grad is not None and got.grad.isfinite().all()


def test_rows_of_a_padded_vocabulary_get_no_gradient() -> None:
    compare("forward", vocab=401, padding=7)


def test_without_gradients_the_losses_are_the_same() -> None:
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(4, 8), torch.randn(77, 8), torch.tensor([0, 76, IGNORED, 3])
    inputs = [t.to(DEVICE) for t in (hidden, weight, targets)]
    head = Head(inputs[1].requires_grad_(), None)
    for options in ({}, {"top_k": 4}):
        call = (inputs[0], head, inputs[2], inputs[0].flip(0), head)
        with torch.no_grad():
            without = linear_cross_entropy_kl(*call, pred_scale=1.0, kl_scale=1.0, **options)
        with_ = linear_cross_entropy_kl(*call, pred_scale=1.0, kl_scale=1.0, **options)
        assert all(distance(a, b) < 1e-6 for a, b in zip(without, with_, strict=True))


def test_a_recorded_top_k_in_half_precision_serves() -> None:
    torch.manual_seed(0)
    hidden, weight = (t.to(DEVICE) for t in (torch.randn(4, 8), torch.randn(77, 8)))
    head, targets = Head(weight.requires_grad_(), None), torch.tensor([0, 76, 5, 3], device=DEVICE)
    recorded = teacher_top_k(hidden.flip(0), head, 4)
    recorded = replace(recorded, log_probs=recorded.log_probs.half())  # as a cache keeps them
    live = linear_cross_entropy_kl(hidden, head, targets, hidden.flip(0), head, pred_scale=1, kl_scale=1, top_k=4)
    got = linear_cross_entropy_kl(hidden, head, targets, pred_scale=1, kl_scale=1, top_k=recorded)
    assert distance(got[2], live[2]) < 2e-3
