"""The balance of the layer loss against the logits: a share of the gradient, measured where the two meet.

At the hidden state of each pair two gradients meet: m_k of all that is computed from it (the logits' losses, and later
pairs), and g_k of its own pair. With K the last pair, above which only the logits are,

    weight = share * fade * |m_K| / sqrt(sum over k of |g_k|^2)

so the gradients that all pairs together inject have `share` times the norm of the logits'. A share for each block would
compound through the depth. A pair whose g_k opposes m_k is left out, of the sum too. Norms are over all tokens of the
global batch, so that the split of rows changes nothing; they are running means of the steps before, so that nothing
waits for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ted_ds.config.sections import LossConfig
from ted_ds.job.world import World

DECAY = 0.9
"""Of the running means: 10 steps, roughly."""

FIRST = 1e-6
"""For the quotient of the norms in the first step, of which nothing is known: small enough to change nothing, and no
zero, so that the pairs' gradients can be measured. A pair that is left out has this share of the weight, and can come
back."""


class Balance:
    """Weights of the pairs' gradients.

    share: see the module. num_pairs: K.
    state: [3 K] float64, running means of |m_k|^2, <m_k, g_k> and |g_k|^2 of each pair; zeros before the first step. It
    decides later steps, so that checkpoints keep it.
    weight: of the layer loss in this step, a scalar; weights: [K], of each pair.
    """

    def __init__(self, share: float, num_pairs: int, device: torch.device) -> None:
        self._share, self._pairs = share, num_pairs
        self.state = torch.zeros(3 * num_pairs, dtype=torch.float64, device=device)
        self._sums = torch.zeros(3, num_pairs, dtype=torch.float64, device=device)
        self._measured = False
        self.weight = self.weights = torch.zeros((), device=device)
        self.begin(1.0)

    @staticmethod
    def of(loss: LossConfig, num_pairs: int, device: torch.device) -> Balance | None:
        """The balance of a recipe's section loss; None if the layer loss has a constant weight, or no pairs."""
        balanced = loss.balance == "gradient" and num_pairs
        return Balance(loss.mse_alpha, num_pairs, device) if balanced else None

    def begin(self, fade: float) -> None:
        """Sets the weights of the step that begins; fade: 1 to 0."""
        main, _, squares = self.state.view(3, self._pairs)
        opposed = self.agreements() < 0
        counted = squares.masked_fill(opposed, 0.0)
        weight, of_all = (self._share * fade * _quotient(main[-1], g.sum()) for g in (counted, squares))
        self.weight, self.weights = weight.float(), torch.where(opposed, FIRST * of_all, weight).float()

    def tie(self, pair: int, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden` for its pair's loss: what flows back through it is weighted, and measured where it joins the rest.

        Of each pair the weighted gradient [tokens, D] waits until the block's backward, as autograd keeps it anyway.
        """
        branch = hidden.view_as(hidden)
        waiting: list[torch.Tensor] = []

        def weigh(gradient: torch.Tensor) -> torch.Tensor:
            weighted = gradient * self.weights[pair].to(gradient.dtype)
            waiting.append(weighted)
            return weighted

        def measure(total: torch.Tensor) -> None:
            own = waiting.pop()
            # <t, t>, <t, o>, <o, o> of the sum t = m + o and its part o = weight * g
            values = torch.stack([_dot(total, total), _dot(total, own), _dot(own, own)])
            self._sums[:, pair] += values.double()
            self._measured = True

        branch.register_hook(weigh)
        hidden.register_hook(measure)
        return branch

    def settle(self, world: World) -> None:
        """Takes what the last step measured into the running means; a collective; nothing if that was done."""
        if not self._measured:
            return
        # every rank's loss was multiplied by their number (`train_step`): another number goes on from the same state
        total, mixed, own = (world.sum(self._sums) / world.size**2).unbind()
        weights = self.weights.double().clamp_min(1e-150)
        main = (total - 2 * mixed + own).clamp_min(0)
        now = torch.cat([main, (mixed - own) / weights, own / weights.square()])
        mean = torch.where(self.state.any(), DECAY * self.state + (1 - DECAY) * now, now)
        # a step with a loss that is not finite is left out, and so is what it measured
        self.state = torch.where(torch.isfinite(now).all(), mean, self.state)
        self._sums.zero_()
        self._measured = False

    def agreements(self) -> torch.Tensor:
        """[K] cosines of m_k and g_k; 0 before the first step."""
        main, dots, squares = self.state.view(3, self._pairs)
        cosines: torch.Tensor = dots / (main * squares).sqrt().clamp_min(1e-300)
        return cosines

    def shares(self) -> torch.Tensor:
        """[K] weight |g_k| / |m_K|, of this step's weights and the running means."""
        main, _, squares = self.state.view(3, self._pairs)
        shares: torch.Tensor = self.weights * squares.sqrt() / main[-1].sqrt().clamp_min(1e-300)
        return shares

    def measured(self) -> dict[str, Any]:
        """What a line of metrics says of it; waits for the device."""
        shares, agreements = torch.stack([self.shares(), self.agreements()]).tolist()
        return {"layer_weight": self.weight.item(), "layer_shares": shares, "layer_agreements": agreements}

    def load(self, state: Sequence[float]) -> None:
        """Goes on from the state of a checkpoint."""
        self.state = torch.tensor(state, dtype=torch.float64, device=self.state.device)


def _quotient(main: torch.Tensor, injected: torch.Tensor) -> torch.Tensor:
    """The root of |m_K|^2 over the sum of |g_k|^2; `FIRST` if one of them is not known."""
    known = (main > 0) & (injected > 0)
    return torch.where(known, (main / injected.clamp_min(1e-300)).sqrt(), FIRST)


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The sum of products in float32 or wider, without a wide copy of either."""
    wide = torch.promote_types(a.dtype, torch.float32)
    total: torch.Tensor = torch.linalg.vecdot(a, b).sum(dtype=wide)
    return total


def faded(step: int, steps: int, share: float) -> float:
    """What is left of the layer loss at the 0-based `step` of `steps`: from 1 linearly to 0 over `share` of them."""
    return max(0.0, 1.0 - step / (share * steps)) if share else 1.0
