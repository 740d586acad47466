"""Which channels, heads and FFN units stay in a narrower student, and how tensors are cut along them."""

from __future__ import annotations

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
    """How much a teacher's parts matter on a sample: residual channels of all of it, heads and FFN units by block.

    * residual channel: the mean of |norm output|, summed over norms (Minitron, arXiv 2407.14679);
    * head, FFN unit: mean square of what it adds to the hidden state, as if its numbers were uncorrelated:
      sum over them of mean square * squared norm of their column.
    """

    def __init__(self, sizes: Sizes, measured: Measurements) -> None:
        self._sizes, self._measured = sizes, measured
        self._by_block: dict[tuple[int, Part], torch.Tensor] = {}

    def add(self, block: int | None, name: str, axes: Axes, matrix: torch.Tensor) -> None:
        """Counts one matrix of block `block` (None: outside the blocks), whose axes are known; name: as of `within`."""
        energy = self._measured.energies.get(f"{block}.{name}")
        if energy is None:
            return
        assert block is not None
        for axis, squares in zip(axes, _squared_marginals(matrix), strict=True):
            if axis is not None and axis.part is not Part.CHANNEL:
                self._by_block[block, axis.part] = (squares * energy).view(self._sizes[axis.part], -1).sum(-1)

    def channels(self, keep: int) -> torch.Tensor:
        """The `keep` best residual channels, in their order; int64."""
        return _best(self._measured.channels, keep)

    def units(self, block: int, keep: int) -> torch.Tensor:
        """The `keep` best FFN units of a block, in their order."""
        return _best(self._of(block, Part.UNIT), keep)

    def heads(self, block: int, keep: int, keep_kv: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The best query heads of a block and their key-value heads, in their order.

        Where all key-value heads stay, the same number of query heads stays in each one's group; else whole
        groups stay.
        """
        kv = self._sizes[Part.KV_HEAD]
        group = self._sizes[Part.HEAD] // kv
        scores = self._of(block, Part.HEAD).view(kv, group)
        if keep_kv == kv:
            best = [_best(row, keep // kv) + i * group for i, row in enumerate(scores)]
            return torch.cat(best), torch.arange(kv)
        groups = _best(scores.sum(1), keep_kv)
        return (groups[:, None] * group + torch.arange(group)).flatten(), groups

    def _of(self, block: int, part: Part) -> torch.Tensor:
        """Alike for all if the block reads them in a matrix that the table of families does not name: a hybrid's."""
        return self._by_block.get((block, part), torch.ones(self._sizes[part], dtype=torch.float64))


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
