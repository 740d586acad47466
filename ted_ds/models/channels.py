"""Which channels, heads and FFN units a narrower student keeps: roles by parameter name, scores by weight norm.

Scores come from weights, not from activations: no forward of a teacher that may need many devices, no choice
of data, the same answer every time, at the cost of one more read of the checkpoint. What is lost is what data
would tell: a channel with large weights that typical inputs hardly excite is kept all the same.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import torch

from ted_ds.errors import ModelError


class Role(Enum):
    """What a dimension of a parameter counts; H heads, G key/value heads, d channels a head."""

    FIXED = auto()  # vocabulary, positions, the channels of one head: never cut
    HIDDEN = auto()  # D, the residual stream
    FFN = auto()
    QUERY = auto()  # [H, d]
    KEY = auto()  # [G, d]
    VALUE = auto()  # [G, d]
    CONTEXT = auto()  # [H, d], what attention hands to its output projection
    QKV_BY_PART = auto()  # [3, H, d]
    QKV_BY_HEAD = auto()  # [H, 3, d]


_EMBEDDINGS = ("wte", "wpe", "embed_in", "embed_tokens", "embed_positions", "lm_head")
_NORMS = (
    *("ln_1", "ln_2", "ln_f", "norm", "input_layernorm", "post_attention_layernorm", "final_layer_norm"),
    *("self_attn_layer_norm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
)
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_LINEAR: dict[str, tuple[Role, Role]] = {
    # GPT-NeoX
    "attention.query_key_value": (Role.QKV_BY_HEAD, Role.HIDDEN),
    "attention.dense": (Role.HIDDEN, Role.CONTEXT),
    "mlp.dense_h_to_4h": (Role.FFN, Role.HIDDEN),
    "mlp.dense_4h_to_h": (Role.HIDDEN, Role.FFN),
    # OPT, Llama, Mistral, Qwen2, Qwen3, Gemma-2, Gemma-3
    "self_attn.q_proj": (Role.QUERY, Role.HIDDEN),
    "self_attn.k_proj": (Role.KEY, Role.HIDDEN),
    "self_attn.v_proj": (Role.VALUE, Role.HIDDEN),
    # OPT
    "self_attn.out_proj": (Role.HIDDEN, Role.CONTEXT),
    "fc1": (Role.FFN, Role.HIDDEN),
    "fc2": (Role.HIDDEN, Role.FFN),
    # Llama and its descendants
    "self_attn.o_proj": (Role.HIDDEN, Role.CONTEXT),
    "mlp.gate_proj": (Role.FFN, Role.HIDDEN),
    "mlp.up_proj": (Role.FFN, Role.HIDDEN),
    "mlp.down_proj": (Role.HIDDEN, Role.FFN),
}
# GPT-2's Conv1D holds the transpose of a Linear's weight: [in, out]
_CONV1D: dict[str, tuple[Role, Role]] = {
    "attn.c_attn": (Role.HIDDEN, Role.QKV_BY_PART),
    "attn.c_proj": (Role.CONTEXT, Role.HIDDEN),
    "mlp.c_fc": (Role.HIDDEN, Role.FFN),
    "mlp.c_proj": (Role.FFN, Role.HIDDEN),
}
ROLES: dict[str, tuple[Role, ...]] = {
    **{f"{name}.weight": (Role.FIXED, Role.HIDDEN) for name in _EMBEDDINGS},
    **{f"{name}.{kind}": (Role.HIDDEN,) for name in _NORMS for kind in ("weight", "bias")},
    **{f"{name}.weight": (Role.FIXED,) for name in _HEAD_NORMS},
    **{f"{name}.weight": roles for name, roles in (_LINEAR | _CONV1D).items()},
    **{f"{name}.bias": (roles[0],) for name, roles in _LINEAR.items()},
    **{f"{name}.bias": (roles[1],) for name, roles in _CONV1D.items()},
}
"""Parameter name (inside its block; outside, the last two parts) -> the role of each dimension."""


@dataclass(frozen=True)
class WidthSizes:
    """The sizes of a model's blocks; head_dim is the same in teacher and student."""

    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    head_dim: int


@dataclass(frozen=True)
class KeptChannels:
    """Indices into the teacher, rising, int64: of the residual stream, and by block of heads and FFN units."""

    teacher: WidthSizes
    hidden: torch.Tensor
    heads: dict[int, torch.Tensor]
    kv_heads: dict[int, torch.Tensor]
    ffn: dict[int, torch.Tensor]

    def cut(self, block: int | None, name: str, weight: torch.Tensor) -> torch.Tensor:
        """`weight` with the kept channels alone; block: the teacher's, None outside the blocks."""
        for dim, role in enumerate(parameter_roles(name)):
            if role is not Role.FIXED:
                weight = weight.index_select(dim, self._indices(role, block))
        return weight

    def _indices(self, role: Role, block: int | None) -> torch.Tensor:
        if role is Role.HIDDEN:
            return self.hidden
        assert block is not None, role
        d, heads = self.teacher.head_dim, self.heads[block]
        if role is Role.FFN:
            return self.ffn[block]
        if role is Role.QKV_BY_HEAD:
            return _spread(heads, 3 * d)
        if role is Role.QKV_BY_PART:
            return torch.cat([_spread(heads + part * self.teacher.heads, d) for part in range(3)])
        return _spread(heads if role in (Role.QUERY, Role.CONTEXT) else self.kv_heads[block], d)


def parameter_roles(name: str) -> tuple[Role, ...]:
    """The role of each dimension; ModelError for a parameter of an unknown name."""
    if name not in ROLES:
        raise ModelError(
            f"parameter {name!r} of the teacher is not known, so its width cannot be cut: leave out "
            "student.init.hidden_size, num_heads and intermediate_size (blocks can be cut all the same)"
        )
    return ROLES[name]


@dataclass
class ChannelScores:
    """Weight norms, added up from one parameter at a time; float64 throughout.

    Residual channel: sum of its squared weights over the matrices that read or write it, each matrix scaled
    to unit Frobenius norm, so that none dominates. Head: |values|^2 |output projection|^2. FFN unit: the
    product of the squared norms of its rows and column (gate, up, down). A product, since a head or unit
    with one side zero adds nothing to the residual stream. Biases of values and FFN units count as a column.
    """

    sizes: WidthSizes
    hidden: torch.Tensor = field(init=False)
    values: dict[int, torch.Tensor] = field(default_factory=dict)
    contexts: dict[int, torch.Tensor] = field(default_factory=dict)
    ffn: dict[int, dict[str, torch.Tensor]] = field(default_factory=lambda: defaultdict(dict))

    def __post_init__(self) -> None:
        self.hidden = torch.zeros(self.sizes.hidden, dtype=torch.float64)

    def add(self, block: int | None, name: str, weight: torch.Tensor) -> None:
        """Counts one parameter; memory: a float32 copy of it."""
        squares = weight.to(torch.float32, copy=True).square_()
        for dim, role in enumerate(parameter_roles(name)):
            if role is Role.FIXED or (role is Role.HIDDEN and weight.ndim == 1):
                continue
            others = [d for d in range(weight.ndim) if d != dim]
            energy = (squares.sum(others) if others else squares).double()
            if role is Role.HIDDEN:
                self.hidden += energy / energy.sum().clamp_min(1e-300)
            elif block is not None:
                self._add_units(block, name.rpartition(".")[0], role, energy)

    def _add_units(self, block: int, module: str, role: Role, energy: torch.Tensor) -> None:
        heads, d = self.sizes.heads, self.sizes.head_dim
        if role is Role.FFN:
            _accumulate(self.ffn[block], module, energy)
        elif role is Role.CONTEXT:
            _accumulate(self.contexts, block, energy.view(heads, d).sum(1))
        elif role is Role.VALUE:
            _accumulate(self.values, block, energy.view(self.sizes.kv_heads, d).sum(1))
        elif role is Role.QKV_BY_PART:
            _accumulate(self.values, block, energy.view(3, heads, d)[2].sum(1))
        elif role is Role.QKV_BY_HEAD:
            _accumulate(self.values, block, energy.view(heads, 3, d)[:, 2].sum(1))

    def best(self, student: WidthSizes) -> KeptChannels:
        """The channels of largest score. Every kept kv head keeps equally many of its query heads."""
        heads = {b: self._best_heads(b, student) for b in self.contexts}
        grouped = self.sizes.kv_heads == student.kv_heads
        all_kv = torch.arange(self.sizes.kv_heads)
        return KeptChannels(
            self.sizes,
            largest(self.hidden, student.hidden),
            heads,
            {b: all_kv if grouped else kept for b, kept in heads.items()},
            {b: largest(_product(parts), student.ffn) for b, parts in self.ffn.items()},
        )

    def _best_heads(self, block: int, student: WidthSizes) -> torch.Tensor:
        kv_heads = self.sizes.kv_heads
        per_group = self.sizes.heads // kv_heads
        score = self.contexts[block] * self.values[block].repeat_interleave(per_group)
        if student.kv_heads != kv_heads:
            return largest(score, student.heads)
        keep = student.heads // kv_heads
        return torch.cat([g * per_group + largest(part, keep) for g, part in enumerate(score.split(per_group))])


def largest(score: torch.Tensor, keep: int) -> torch.Tensor:
    """Indices of the `keep` largest scores, rising; of equal ones the first."""
    return score.argsort(descending=True, stable=True)[:keep].sort().values


def _spread(units: torch.Tensor, channels: int) -> torch.Tensor:
    """The channels of units that have `channels` consecutive ones each."""
    return (units[:, None] * channels + torch.arange(channels)).flatten()


def _accumulate(sums: dict[Any, torch.Tensor], key: int | str, energy: torch.Tensor) -> None:
    sums[key] = sums[key] + energy if key in sums else energy


def _product(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(parts.values())).prod(0)
