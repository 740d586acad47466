"""The balance in float64 on a chain of states, against the gradients written out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from ted_ds.distill.balance import DECAY, FIRST, Balance, faded

SHARE = 0.8
STATES = 3
CPU = torch.device("cpu")


class Alone:
    """A world of `size` ranks of which this one has all rows."""

    def __init__(self, size: int = 1) -> None:
        self.size = size

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values.clone()


def chain(scale: float = 1.0) -> tuple[list[torch.Tensor], torch.Tensor, list[torch.Tensor]]:
    """(states, each a function of the one before; the logits' loss; each pair's pull g_k on its state, a constant)."""
    torch.manual_seed(0)
    hidden = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    states, pulls = [], []
    for _ in range(STATES):
        hidden = torch.tanh(hidden @ torch.randn(7, 7, dtype=torch.float64)) * 2
        states.append(hidden)
        pulls.append(torch.randn_like(hidden))
    return states, scale * (states[-1] * torch.randn_like(hidden)).square().sum(), pulls


def one_step(balance: Balance, scale: float = 1.0, signs: Sequence[float] = (1.0,) * STATES) -> list[torch.Tensor]:
    """The gradients that reach the states, of a backward in which the balance takes part."""
    states, loss, pulls = chain(scale)
    for state in states:
        state.retain_grad()
    layers = sum(
        (balance.tie(k, h) * (sign * g)).sum() for k, (h, g, sign) in enumerate(zip(states, pulls, signs, strict=True))
    )
    (loss + layers).backward()
    return [state.grad for state in states if state.grad is not None]


def main_gradients(weights: Sequence[float], signs: Sequence[float] = (1.0,) * STATES) -> list[torch.Tensor]:
    """m_k written out: what reaches state k without its own pair."""
    found = []
    for k in range(STATES):
        states, loss, pulls = chain()
        above = sum((weights[j] * signs[j] * states[j] * pulls[j]).sum() for j in range(k + 1, STATES))
        found.append(torch.autograd.grad(loss + above, states[k])[0])
    return found


@pytest.mark.parametrize("opposed", [(), (1,), (0, 2)])
def test_the_pairs_together_have_the_share_of_the_logits_gradient(opposed: tuple[int, ...]) -> None:
    """Those that are not left out."""
    signs = signed(opposed)
    balance = Balance(SHARE, STATES, CPU)
    one_step(balance, signs=signs)
    balance.settle(Alone())
    balance.begin(0.5)
    _, _, pulls = chain()
    injected = math.sqrt(sum(float(g.square().sum()) for k, g in enumerate(pulls) if k not in opposed))
    (*_, top) = main_gradients([0.0] * STATES)
    assert float(balance.weight) * injected == pytest.approx(0.5 * SHARE * float(top.norm()), rel=1e-5)
    for k, weight in enumerate(balance.weights.tolist()):
        whole = float(balance.weight)
        assert 0 < weight <= 1.001 * FIRST * whole if k in opposed else weight == pytest.approx(whole)


def signed(opposed: tuple[int, ...]) -> list[float]:
    """Signs of the pulls with which these pairs alone oppose what comes from above."""
    _, _, pulls = chain()
    agree = [float((m * g).sum()) > 0 for m, g in zip(main_gradients([0.0] * STATES), pulls, strict=True)]
    return [1.0 if agrees != (k in opposed) else -1.0 for k, agrees in enumerate(agree)]


def test_gradients_are_the_main_ones_and_the_weighted_pulls() -> None:
    balance = Balance(SHARE, STATES, CPU)
    one_step(balance)
    balance.settle(Alone())
    balance.begin(1.0)
    weights = balance.weights.tolist()
    assert min(weights) < 1e-4 * max(weights)  # one pair is left out
    found = one_step(balance)
    _, _, pulls = chain()
    for total, main, pull, w in zip(found, main_gradients(weights), pulls, weights, strict=True):
        torch.testing.assert_close(total, main + w * pull, rtol=1e-6, atol=1e-9)


def test_agreements_are_cosines_and_an_opposed_pair_is_left_out() -> None:
    balance = Balance(SHARE, STATES, CPU)
    one_step(balance)
    balance.settle(Alone())
    found = balance.agreements()
    _, _, pulls = chain()
    mains = main_gradients([SHARE * FIRST] * STATES)
    wanted = [torch.cosine_similarity(m.flatten(), g.flatten(), dim=0) for m, g in zip(mains, pulls, strict=True)]
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-4, atol=1e-6)
    signs = signed((1,))

    balance = Balance(SHARE, STATES, CPU)
    for _ in range(2):
        gradients = one_step(balance, signs=signs)
        balance.settle(Alone())
        balance.begin(1.0)
    measured = balance.measured()
    assert [agreement > 0 for agreement in measured["layer_agreements"]] == [True, False, True]
    assert measured["layer_shares"][1] < 1e-5 < min(measured["layer_shares"][0], measured["layer_shares"][2])
    assert len(gradients) == STATES


def test_it_is_a_running_mean_of_the_steps_before() -> None:
    balance = Balance(SHARE, STATES, CPU)
    one_step(balance)
    balance.settle(Alone())
    first = balance.state.clone()
    balance.settle(Alone())  # nothing new was measured
    assert torch.equal(balance.state, first)
    balance.begin(1.0)
    one_step(balance, scale=3.0)
    balance.settle(Alone())
    fresh = Balance(SHARE, STATES, CPU)
    fresh.load(first.tolist())
    top = STATES - 1  # |m_K|^2
    assert float(balance.state[top]) == pytest.approx(float(first[top]) * (DECAY + (1 - DECAY) * 9.0), rel=1e-6)
    fresh.begin(1.0)
    again = Balance(SHARE, STATES, CPU)
    one_step(again)
    again.settle(Alone())
    again.begin(1.0)
    assert torch.equal(fresh.weights, again.weights)  # a checkpoint has all of it


def test_the_number_of_ranks_is_no_part_of_it() -> None:
    """`train_step` multiplies each rank's loss by it."""
    one, two = Balance(SHARE, STATES, CPU), Balance(SHARE, STATES, CPU)
    for balance, size in ((one, 1), (two, 2)):
        states, loss, pulls = chain()
        layers = sum((balance.tie(k, h) * g).sum() for k, (h, g) in enumerate(zip(states, pulls, strict=True)))
        (size * (loss + layers)).backward()
        balance.settle(Alone(size))
    torch.testing.assert_close(one.state, two.state)


def test_a_step_that_is_not_finite_is_left_out() -> None:
    balance = Balance(SHARE, STATES, CPU)
    one_step(balance)
    balance.settle(Alone())
    before = balance.state.clone()
    one_step(balance, scale=float("nan"))
    balance.settle(Alone())
    balance.begin(1.0)
    assert torch.equal(balance.state, before) and balance.weights.isfinite().all()


def test_without_a_gradient_from_above_it_starts_again() -> None:
    """A head of zeros at the start must not leave the layer loss out for ever."""
    balance = Balance(SHARE, STATES, CPU)
    one_step(balance, scale=0.0)
    balance.settle(Alone())
    balance.begin(1.0)
    assert float(balance.weight) == pytest.approx(SHARE * FIRST)
    one_step(balance)
    balance.settle(Alone())
    balance.begin(1.0)
    assert float(balance.weight) > 1e3 * SHARE * FIRST


def test_the_first_step_changes_next_to_nothing() -> None:
    balance = Balance(SHARE, STATES, CPU)
    found, (mains) = one_step(balance), main_gradients([0.0] * STATES)
    for total, main in zip(found, mains, strict=True):
        torch.testing.assert_close(total, main, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("share", "wanted"), [(0.0, [1, 1, 1, 1]), (0.5, [1, 0.5, 0, 0]), (1.0, [1, 0.75, 0.5, 0.25])])
def test_it_fades_over_a_share_of_the_steps(share: float, wanted: list[float]) -> None:
    assert [faded(step, 4, share) for step in range(4)] == wanted


def test_what_is_measured_does_not_depend_on_the_weights() -> None:
    """Their own gradients are taken off what reaches a state."""
    balance = Balance(SHARE, STATES, CPU)
    one_step(balance, signs=signed(()))
    balance.settle(Alone())
    balance.begin(1.0)
    weights = balance.weights.tolist()
    balance.state.zero_()
    one_step(balance, signs=signed(()))
    balance.settle(Alone())
    _, _, pulls = chain()
    mains = main_gradients(weights, signed(()))
    pairs = [(m.flatten(), sign * g.flatten()) for m, g, sign in zip(mains, pulls, signed(()), strict=True)]
    wanted = [*(m @ m for m, _ in pairs), *(m @ g for m, g in pairs), *(g @ g for _, g in pairs)]
    torch.testing.assert_close(balance.state, torch.stack(wanted), rtol=1e-5, atol=1e-8)
