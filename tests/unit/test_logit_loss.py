"""CE and KL from hidden states against plain autograd on whole logits, in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ted_ds.batch import IGNORED
from ted_ds.ops import Head, linear_cross_entropy_kl, logit_gemms, logit_loss, teacher_top_k, token_scores
from ted_ds.ops.reference import cross_entropy_sum, kl_sum, soft_capped, top_k_kl_sum

N, V, D_S, D_T = 41, 401, 19, 23
UPSTREAM = 0.37
PRED, KL = 1 / 29, 0.8 / 29


@dataclass
class Case:
    """Leaves and constants of one call; every test changes what it is about."""

    hidden_s: torch.Tensor
    head_s: Head
    targets: torch.Tensor
    hidden_t: torch.Tensor
    head_t: Head


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_()


def make_case(
    *,
    bias: bool = False,
    softcap: float | None = None,
    scale: float = 1.0,
    vocab_s: int = V,
    vocab_t: int = V,
    dtype: torch.dtype = torch.float64,
) -> Case:
    torch.manual_seed(0)
    targets = torch.randint(0, min(vocab_s, vocab_t), (N,))
    targets[::4] = IGNORED
    head_s = Head(leaf(vocab_s, D_S, dtype=dtype), leaf(vocab_s, dtype=dtype) if bias else None, softcap, scale)
    head_t = Head(leaf(vocab_t, D_T, dtype=dtype), leaf(vocab_t, dtype=dtype) if bias else None, softcap, scale)
    return Case(leaf(N, D_S, dtype=dtype), head_s, targets, leaf(N, D_T, dtype=dtype), head_t)


def logits(hidden: torch.Tensor, head: Head, vocab: int) -> torch.Tensor:
    bias = 0.0 if head.bias is None else head.bias
    return soft_capped(head.scale * (hidden @ head.weight.T + bias), head.softcap)[:, :vocab]


def expected(
    case: Case,
    pred: float,
    kl: float,
    temperature: float,
    vocab: int,
    divergence: Any = "forward",
    top_k: int | None = None,
) -> tuple[torch.Tensor, ...]:
    z_s = logits(case.hidden_s, case.head_s, vocab)
    z_t = logits(case.hidden_t, case.head_t, vocab).detach()
    ce = cross_entropy_sum(z_s, case.targets)
    if top_k is None:
        apart = kl_sum(z_s, z_t, case.targets, temperature, divergence)
    else:
        apart = top_k_kl_sum(z_s, z_t, case.targets, temperature, top_k)
    return pred * ce + kl * apart, ce.detach(), apart.detach()


def fused(case: Case, **options: Any) -> tuple[torch.Tensor, ...]:
    scales = {"pred_scale": PRED, "kl_scale": KL} | options
    return linear_cross_entropy_kl(case.hidden_s, case.head_s, case.targets, case.hidden_t, case.head_t, **scales)


def gradients(case: Case, total: torch.Tensor) -> list[torch.Tensor | None]:
    """Gradients of every leaf after backward from 0.37, cleared afterwards."""
    leaves = [case.hidden_s, case.head_s.weight, case.head_s.bias]
    teacher = [case.hidden_t, case.head_t.weight, case.head_t.bias]
    total.backward(torch.tensor(UPSTREAM, dtype=total.dtype))
    found = [None if t is None else t.grad for t in leaves]
    assert all(t is None or t.grad is None for t in teacher)
    for t in leaves:
        if t is not None:
            t.grad = None
    return found


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


def assert_equal_to_reference(
    case: Case, *, pred: float = PRED, kl: float = KL, temperature: float = 2.0, vocab: int = V, **options: Any
) -> None:
    kind = {name: options[name] for name in ("divergence", "top_k") if name in options}
    want = expected(case, pred, kl, temperature, vocab, **kind)
    want_gradients = gradients(case, want[0])
    got = fused(case, pred_scale=pred, kl_scale=kl, temperature=temperature, **options)
    got_gradients = gradients(case, got[0])
    for a, b in zip(got, want, strict=True):
        assert distance(a, b) < 1e-12
    for a, b in zip(got_gradients, want_gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert distance(a, b) < 1e-12


@pytest.mark.parametrize("temperature", [1.0, 2.0, 2.5])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
def test_losses_and_gradients(temperature: float, softcap: float | None, bias: bool) -> None:
    case = make_case(bias=bias, softcap=softcap, scale=0.7)
    assert_equal_to_reference(case, temperature=temperature, chunk_tokens=7)


@pytest.mark.parametrize("kind", [{}, {"divergence": "reverse"}, {"top_k": 5}])
def test_rows_that_stay_in_the_chunks_count_for_nothing(kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, where the host does not know which they are."""
    monkeypatch.setattr(logit_loss, "_predicted_rows", lambda targets: None)
    assert_equal_to_reference(make_case(bias=True, scale=0.7), chunk_tokens=7, **kind)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 2.5])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("kind", [{"divergence": "reverse"}, {"divergence": "jensen-shannon"}, {"top_k": 5}])
def test_other_divergences(temperature: float, softcap: float | None, kind: dict[str, Any]) -> None:
    case = make_case(bias=True, softcap=softcap, scale=0.7)
    assert_equal_to_reference(case, temperature=temperature, chunk_tokens=7, **kind)


@pytest.mark.parametrize("kind", [{"divergence": "reverse"}, {"divergence": "jensen-shannon"}])
def test_other_divergences_of_large_logits(kind: dict[str, Any]) -> None:
    """Probabilities underflow on one side or on both; logarithms stay exact."""
    assert_equal_to_reference(make_case(scale=300.0), **kind)


def test_the_rest_of_a_top_k_is_exact() -> None:
    """Where the top k have all but 1e-20, a rest taken as 1 minus the others would be 0, and its KL lost."""
    case = make_case(scale=1.0)
    sure = replace(case, head_t=replace(case.head_t, scale=30.0))
    z = logits(sure.hidden_t, sure.head_t, V).detach() / 2.0
    found = teacher_top_k(sure.hidden_t, sure.head_t, 3, chunk_tokens=8)
    top = z.topk(3)
    assert torch.equal(found.ids.long(), top.indices)
    others = z.scatter(1, top.indices, -torch.inf).logsumexp(-1) - z.logsumexp(-1)
    assert float(others.detach().min()) < -45 and distance(found.log_rest, others) < 1e-12
    assert distance(found.log_probs, top.values - z.logsumexp(-1, keepdim=True)) < 1e-12


def test_all_ids_are_the_whole_kl() -> None:
    case = make_case()
    assert distance(fused(case, top_k=V)[2], fused(case)[2]) < 1e-12
    assert distance(fused(case, top_k=V + 7)[2], fused(case)[2]) < 1e-12
    whole = gradients(case, fused(case)[0])
    for a, b in zip(gradients(case, fused(case, top_k=V)[0]), whole, strict=True):
        assert (a is None) == (b is None) and (a is None or b is None or distance(a, b) < 1e-12)


@pytest.mark.parametrize("temperature", [2.0, 1.5])
def test_a_recorded_top_k_stands_for_the_teacher(temperature: float) -> None:
    case = make_case(bias=True, vocab_t=V + 4)
    live = fused(case, top_k=6, temperature=temperature, vocab_size=V)
    recorded = teacher_top_k(case.hidden_t, case.head_t, 6, temperature=temperature, vocab_size=V)
    live_gradients = gradients(case, live[0])
    options: Any = {"pred_scale": PRED, "kl_scale": KL, "temperature": temperature, "vocab_size": V}
    got = linear_cross_entropy_kl(case.hidden_s, case.head_s, case.targets, top_k=recorded, chunk_tokens=7, **options)
    for a, b in zip(got, live, strict=True):
        assert distance(a, b) < 1e-12
    for a, b in zip(gradients(case, got[0]), live_gradients, strict=True):
        assert a is not None and b is not None and distance(a, b) < 1e-12


@pytest.mark.parametrize("chunk_tokens", [1, 8, N - 1, N, 5 * N, None])
def test_chunk_size_changes_nothing(chunk_tokens: int | None) -> None:
    assert_equal_to_reference(make_case(bias=True), chunk_tokens=chunk_tokens)


@pytest.mark.parametrize(("pred", "kl"), [(PRED, 0.0), (0.0, KL), (-PRED, KL), (0.0, 0.0), (1e-6, 50.0)])
def test_any_scales(pred: float, kl: float) -> None:
    case = make_case()
    if pred == kl == 0.0:
        assert all(g is None or not g.any() for g in gradients(case, fused(case, pred_scale=0.0, kl_scale=0.0)[0]))
    else:
        assert_equal_to_reference(case, pred=pred, kl=kl)


def test_scales_may_be_tensors() -> None:
    case = make_case()
    plain, tensors = fused(case), fused(case, pred_scale=torch.tensor(PRED), kl_scale=torch.tensor([KL]))
    assert distance(tensors[0], plain[0]) < 1e-7
    assert distance(tensors[2], plain[2]) == 0.0


@pytest.mark.parametrize(("vocab_s", "vocab_t"), [(V + 13, V), (V, V + 9), (V + 2, V + 11)])
def test_padded_vocabularies(vocab_s: int, vocab_t: int) -> None:
    case = make_case(bias=True, vocab_s=vocab_s, vocab_t=vocab_t)
    case.targets.clamp_(max=V - 1)
    assert_equal_to_reference(case, vocab_size=V)
    if V in (vocab_s, vocab_t):
        assert_equal_to_reference(case)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_without_teacher_it_is_cross_entropy(softcap: float | None) -> None:
    case = make_case(bias=True, softcap=softcap)
    z = logits(case.hidden_s, case.head_s, V)
    want = -PRED * cross_entropy_sum(z, case.targets)
    want_gradients = gradients(case, want)
    got = linear_cross_entropy_kl(case.hidden_s, case.head_s, case.targets, pred_scale=-PRED, chunk_tokens=7)
    assert distance(got[0], want) < 1e-12
    assert got[2] == 0.0
    for a, b in zip(gradients(case, got[0]), want_gradients, strict=True):
        assert a is not None and b is not None and distance(a, b) < 1e-12


@pytest.mark.parametrize("needed", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)])
def test_frozen_parts_get_no_gradient(needed: tuple[int, int, int]) -> None:
    case = make_case(bias=True)
    for tensor, need in zip((case.hidden_s, case.head_s.weight, case.head_s.bias), needed, strict=True):
        assert tensor is not None
        tensor.requires_grad_(bool(need))
    assert_equal_to_reference(case, chunk_tokens=8)


def test_all_rows_ignored() -> None:
    case = make_case()
    case.targets.fill_(IGNORED)
    total, pred, kl = fused(case)
    assert total == pred == kl == 0.0
    assert all(g is None or not g.any() for g in gradients(case, total))


def test_gradients_accumulate_over_two_calls() -> None:
    case = make_case()
    fused(case)[0].backward()
    once = case.head_s.weight.grad
    assert once is not None
    once = once.clone()
    fused(case)[0].backward()
    assert case.head_s.weight.grad is not None
    assert distance(case.head_s.weight.grad, 2 * once) < 1e-12


def test_tied_embedding_gets_both_gradients() -> None:
    case = make_case()
    ids = torch.randint(0, V, (N,))

    def weight_gradient(loss: Any) -> torch.Tensor:
        (gradient,) = torch.autograd.grad(loss(replace(case, hidden_s=case.head_s.weight[ids])), case.head_s.weight)
        return gradient

    want = weight_gradient(lambda tied: expected(tied, PRED, KL, 2.0, V)[0])
    assert distance(weight_gradient(lambda tied: fused(tied)[0]), want) < 1e-12


def test_second_backward_is_refused() -> None:
    total = fused(make_case())[0]
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran before"):
        total.backward()


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_bfloat16_is_near_float64(softcap: float | None) -> None:
    case = make_case(softcap=softcap, scale=0.25, dtype=torch.bfloat16)
    wide = replace(
        case,
        hidden_s=case.hidden_s.detach().double().requires_grad_(),
        head_s=replace(case.head_s, weight=case.head_s.weight.detach().double().requires_grad_()),
        hidden_t=case.hidden_t.detach().double(),
        head_t=replace(case.head_t, weight=case.head_t.weight.detach().double()),
    )
    want = expected(wide, PRED, KL, 2.0, V)
    want_gradients = gradients(wide, want[0])
    got = fused(case, chunk_tokens=8)
    assert all(t.dtype == torch.float32 for t in got)
    for a, b in zip(got, want, strict=True):
        assert distance(a, b) < 1e-2
    for a, b in zip(gradients(case, got[0]), want_gradients, strict=True):
        if a is not None and b is not None:
            assert a.dtype == torch.bfloat16
            assert distance(a, b) < 2e-2


def test_hidden_states_of_another_dtype_are_cast() -> None:
    case = make_case()
    single = case.hidden_s.detach().float().requires_grad_()
    fused(replace(case, hidden_s=single))[0].backward()
    fused(case)[0].backward()
    assert single.grad is not None and case.hidden_s.grad is not None
    assert single.grad.dtype == torch.float32
    assert distance(single.grad, case.hidden_s.grad) < 1e-5


def test_large_logits_stay_finite() -> None:
    """exp of a raw logit of 1e4 overflows even float64; far probabilities underflow to 0 and count 0."""
    case = make_case(scale=2000.0)
    assert_equal_to_reference(case)


class Watch(TorchDispatchMode):
    """Counts GEMMs and the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.gemms = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.gemms += func.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "matmul", "bmm")
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("with_teacher", [False, True])
def test_whole_logits_are_never_made(with_teacher: bool) -> None:
    case = make_case()
    teacher = (case.hidden_t, case.head_t) if with_teacher else (None, None)
    with Watch() as watch:
        total, _, _ = linear_cross_entropy_kl(case.hidden_s, case.head_s, case.targets, *teacher, pred_scale=1.0)
        total.backward()
        token_scores(case.hidden_s, case.head_s, case.targets)
    assert 0 < watch.largest < N * V


@pytest.mark.parametrize(("frozen", "grad_mode", "gemms"), [(0, True, 4), (1, True, 3), (2, True, 2), (0, False, 2)])
def test_only_needed_gemms_run(frozen: int, grad_mode: bool, gemms: int) -> None:
    case = make_case()
    for tensor in [case.head_s.weight, case.hidden_s][:frozen]:
        tensor.requires_grad_(False)
    with Watch() as watch, torch.set_grad_enabled(grad_mode):
        total, _, _ = fused(case, chunk_tokens=N)
        if total.requires_grad:
            total.backward()
    assert watch.gemms == gemms


@pytest.mark.parametrize("recorded", [False, True])
def test_ignored_rows_go_through_no_gemm(recorded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case()
    seen = []
    plain = logit_loss.gemm_logits
    monkeypatch.setattr(logit_loss, "gemm_logits", lambda hidden, *_: seen.append(len(hidden)) or plain(hidden, *_))
    teacher = (case.hidden_t, case.head_t)
    top_k = teacher_top_k(*teacher, 3) if recorded else None
    seen.clear()
    total, _, _ = linear_cross_entropy_kl(
        case.hidden_s, case.head_s, case.targets, *(() if recorded else teacher), pred_scale=1, kl_scale=1, top_k=top_k
    )
    predicted = int((case.targets != IGNORED).sum())
    assert sum(seen) == predicted * (1 if recorded else 2)
    total.backward()
    assert not case.hidden_s.grad[case.targets == IGNORED].any()
    seen.clear()
    token_scores(case.hidden_s, case.head_s, case.targets)
    assert sum(seen) == predicted


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_token_scores(softcap: float | None) -> None:
    case = make_case(bias=True, softcap=softcap, vocab_s=V + 5)
    z = logits(case.hidden_s, case.head_s, V).detach()
    case.targets[1::4] = z.argmax(-1)[1::4]
    nll, greedy = token_scores(case.hidden_s, case.head_s, case.targets, vocab_size=V, chunk_tokens=6)
    log_p = z.log_softmax(-1)
    for n, target in enumerate(case.targets.tolist()):
        predicted = target != IGNORED
        assert float(nll[n]) == pytest.approx(-float(log_p[n, target]) if predicted else 0.0, abs=1e-10)
        assert bool(greedy[n]) == (predicted and int(z[n].argmax()) == target)
    assert greedy.any() and not greedy.all()


def test_no_tokens() -> None:
    case = make_case()
    empty = replace(case, hidden_s=leaf(0, D_S), targets=case.targets[:0], hidden_t=case.hidden_t[:0])
    total, _, _ = fused(empty)
    total.backward()
    assert total == 0.0
    assert case.head_s.weight.grad is not None and not case.head_s.weight.grad.any()
    assert token_scores(empty.hidden_s, case.head_s, empty.targets)[0].shape == (0,)


def test_shapes_that_do_not_fit() -> None:
    case = make_case()
    with pytest.raises(ValueError, match="differ in length"):
        fused(replace(case, targets=case.targets[:-1]))
    with pytest.raises(ValueError, match="vocab_size 402 exceeds"):
        fused(case, vocab_size=V + 1)
    with pytest.raises(ValueError, match="give both or neither"):
        linear_cross_entropy_kl(case.hidden_s, case.head_s, case.targets, case.hidden_t, None, pred_scale=1.0)
    with pytest.raises(ValueError, match="top_k is for the forward KL, divergence is 'reverse'"):
        fused(case, top_k=3, divergence="reverse")
    with pytest.raises(ValueError, match="stands for hidden_t and head_t"):
        fused(case, top_k=teacher_top_k(case.hidden_t, case.head_t, 3))


@pytest.mark.parametrize("tokens", [1000, 8192, 65536])
def test_chunks_on_cuda(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an 80 GiB device with 132 multiprocessors: whole GEMM tiles, rows for all, within the share of its memory."""
    device = SimpleNamespace(total_memory=80 << 30, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    like: Any = SimpleNamespace(is_cuda=True, device=0, element_size=lambda: 2)
    chunk = logit_gemms.default_chunk_tokens(tokens, 128256, like, sides=2)
    assert chunk % 128 == 0 and 264 <= chunk < tokens
    assert chunk * 128256 * 2 * 2 <= (80 << 30) / 64 + 128 * 128256 * 2 * 2
    assert logit_gemms.default_chunk_tokens(tokens, 10**7, like, sides=2) <= 384  # the least, in whole tiles
