"""Which channels, heads and FFN units stay in a narrower student, and how tensors are cut along them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ted_ds.models.families import Axes, Part

Sizes = Mapping[Part, int]
"""How many of each part a model has (heads and units: in every block)."""


def cut(tensor: torch.Tensor, axes: Axes, kept: Mapping[Part, torch.Tensor], sizes: Sizes) -> torch.Tensor:
    """`tensor` with the parts `kept` (rising indices) alone; parts that `kept` does not name stay whole."""
    for dim, axis in enumerate(axes):
        if axis is not None and axis.part in kept:
            split = tensor.unflatten(dim, (axis.outer, sizes[axis.part], -1))
            tensor = split.index_select(dim + 1, kept[axis.part]).flatten(dim, dim + 2)
    return tensor


@dataclass(frozen=True)
class Measurements:
    """What a teacher's states are on a sample, float64.

    moments: [D, D], the mean of x x^T over tokens, summed over the norms that `rotation` turns; x: what a norm gets,
    scaled to a mean square of 1. channels: [D], the mean of |what a norm gives|, summed over the norms. energies:
    "BLOCK.NAME" -> [inputs], mean squares of what a matrix reads that writes hidden states; NAME as of `within`. basis:
    [D, D] float32, the principal directions of `moments`, the largest mean square first; kept, since another machine
    may find some of them the other way round. moments and basis: None if the model cannot be rotated.
    """

    moments: torch.Tensor | None
    channels: torch.Tensor
    energies: Mapping[str, torch.Tensor]
    basis: torch.Tensor | None = None

    def save(self, path: Path) -> None:
        """As safetensors, without the moments: nothing reads them once their directions are known."""
        basis = {} if self.basis is None else {"basis": self.basis.contiguous()}
        save_file({"channels": self.channels, **basis, **self.energies}, path)

    @staticmethod
    def load(path: Path) -> Measurements:
        """What `save` wrote."""
        found = load_file(path)
        basis = found.pop("basis", None)
        return Measurements(None, found.pop("channels"), found, basis)


class PartScores:
    """How much each part of a model matters: residual channels of the whole model, heads and FFN units by block."""

    def __init__(self, sizes: Sizes) -> None:
        self._sizes = sizes
        self._channels = torch.zeros(sizes[Part.CHANNEL], dtype=torch.float64)
        self._products: dict[tuple[int, Part], torch.Tensor] = defaultdict(lambda: torch.ones((), dtype=torch.float64))

    def add(self, block: int | None, name: str, axes: Axes, matrix: torch.Tensor) -> None:
        """Counts one matrix of block `block` (None: outside the blocks), whose axes are known; name: as of `within`."""
        raise NotImplementedError

    def channels(self, keep: int) -> torch.Tensor:
        """The `keep` best residual channels, in their order; int64."""
        return _best(self._channels, keep)

    def units(self, block: int, keep: int) -> torch.Tensor:
        """The `keep` best FFN units of a block, in their order."""
        return _best(self._products[block, Part.UNIT].expand(self._sizes[Part.UNIT]), keep)

    def heads(self, block: int, keep: int, keep_kv: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The best query heads of a block and their key-value heads, in their order.

        Where all key-value heads stay, the same number of query heads stays in each one's group; else whole
        groups stay.
        """
        kv = self._sizes[Part.KV_HEAD]
        group = self._sizes[Part.HEAD] // kv
        values = self._products[block, Part.KV_HEAD].expand(kv)
        scores = self._products[block, Part.HEAD].expand(kv * group).view(kv, group) * values[:, None]
        if keep_kv == kv:
            best = [_best(row, keep // kv) + i * group for i, row in enumerate(scores)]
            return torch.cat(best), torch.arange(kv)
        groups = _best(scores.sum(1), keep_kv)
        return (groups[:, None] * group + torch.arange(group)).flatten(), groups


class WeightScores(PartScores):
    """By weight norms alone, in one pass over the tensors: for a cut without data. Real models lose much by it.

    * residual channel: sum over all matrices that read or write it of its squared weights, each matrix
      scaled to unit Frobenius norm so that none (the embedding, say) decides alone;
    * head: |v|^2 |o|^2, the value and output weights of the head (a key-value head's v counts for each of
      its query heads); q and k are left out: they only sharpen the attention;
    * FFN unit: product of the squared norms of its up (and gate) row and its down column.
    """

    def add(self, block: int | None, name: str, axes: Axes, matrix: torch.Tensor) -> None:
        """See `PartScores`."""
        marginals = _squared_marginals(matrix)
        total = marginals[0].sum().clamp_min(torch.finfo(torch.float64).tiny)
        for axis, squares in zip(axes, marginals, strict=True):
            if axis is None or not axis.scored:
                continue
            if axis.part == Part.CHANNEL:
                self._channels += squares / total
            else:
                # of q, k, v in one tensor the last is v
                parts = squares.view(axis.outer, self._sizes[axis.part], axis.inner, -1)[-1, :, -1].sum(-1)
                assert block is not None
                self._products[block, axis.part] = self._products[block, axis.part] * parts


class ActivationScores(PartScores):
    """By what a teacher does on a sample.

    * residual channel: the mean of |norm output|, summed over norms (Minitron, arXiv 2407.14679);
    * head, FFN unit: mean square of what it adds to the hidden state, as if its numbers were uncorrelated:
      sum over them of mean square * squared norm of their column.
    """

    def __init__(self, sizes: Sizes, found: Measurements) -> None:
        super().__init__(sizes)
        self._channels, self._energies = found.channels, found.energies

    def add(self, block: int | None, name: str, axes: Axes, matrix: torch.Tensor) -> None:
        """See `PartScores`."""
        energy = self._energies.get(f"{block}.{name}")
        if energy is None:
            return
        assert block is not None
        for axis, squares in zip(axes, _squared_marginals(matrix), strict=True):
            if axis is not None and axis.part is not Part.CHANNEL:
                self._products[block, axis.part] = (squares * energy).view(self._sizes[axis.part], -1).sum(-1)


def _best(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """Stable, so that ties (and hence students) are the same everywhere."""
    return scores.argsort(descending=True, stable=True)[:keep].sort().values


def _squared_marginals(matrix: torch.Tensor, rows: int = 4096) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of squares of every row and of every column, float64; `rows` at a time, to hold no float64 copy."""
    by_row, by_column = [], torch.zeros(matrix.shape[1], dtype=torch.float64)
    for chunk in matrix.split(rows):
        squares = chunk.double().square()
        by_row.append(squares.sum(1))
        by_column += squares.sum(0)
    return torch.cat(by_row), by_column
