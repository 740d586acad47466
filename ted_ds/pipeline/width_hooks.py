"""Hooks where a teacher's width shows: at norms, and at the matrices that write hidden states."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ted_ds.job.world import World
from ted_ds.models.channels import Measurements
from ted_ds.models.families import Part, axes_of, part_read
from ted_ds.models.rotation import Roles, principal_basis, within
from ted_ds.models.structure import ModelStructure


@contextmanager
def removed_after(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    """Removes hooks at its end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Narrowing:
    """A narrower student, as what its teacher loses: the teacher then gives its logits, but for rounding.

    basis: [D, d], to which hidden states are rotated; None: they stay. units: teacher block -> the FFN units that stay;
    of a block that it does not name, all.
    """

    basis: torch.Tensor | None
    units: Mapping[int, torch.Tensor]


@dataclass(frozen=True)
class WidthPoints:
    """Where the width shows, by "BLOCK.NAME" or, outside the blocks, NAME, as of `within`.

    norms: over hidden states, those that `roles` turns or, without roles, all that the table of families knows.
    readers: the matrices that write hidden states, and read heads or units.
    """

    norms: Mapping[str, nn.Module]
    readers: Mapping[str, nn.Module]

    @staticmethod
    def of(structure: ModelStructure, roles: Roles | None, left_out: frozenset[int]) -> WidthPoints:
        """Of a model whose weights may be sharded; without those of the blocks that are left out."""
        stack = structure.blocks_path
        norms: dict[str, nn.Module] = {}
        readers: dict[str, nn.Module] = {}
        for path, module in structure.model.named_modules():
            name, own = f"{path}.weight", within(f"{path}.weight", stack)
            block = name.removeprefix(f"{stack}.").partition(".")[0]
            place = f"{block}.{own}" if block.isdecimal() else own
            weight = getattr(module, "weight", None)
            shape = tuple(getattr(weight, "ds_shape", getattr(weight, "shape", ())))  # a sharded weight is empty
            if block.isdecimal() and int(block) in left_out:
                continue
            if part_read(name) is not None:
                readers[place] = module
            elif shape == (structure.width,) and (own in roles.by_name if roles else axes_of(name)):
                norms[place] = module
        return WidthPoints(norms, readers)

    @contextmanager
    def narrowed(self, narrowings: Sequence[Narrowing]) -> Iterator[None]:
        """Within it, each copy of a row runs through a narrower model.

        A norm of the student reads what is left of hidden states in its basis: the teacher's norm reads their
        projection on it, with the same mean square times D.
        """

        def project(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            copies = [
                given
                if narrowing.basis is None
                else (given.float() @ narrowing.basis @ narrowing.basis.T).to(given.dtype)
                for given, narrowing in zip(inputs[0].unbind(), narrowings, strict=True)
            ]
            return (torch.stack(copies), *inputs[1:])

        def mask(block: int) -> Callable[..., tuple[torch.Tensor, ...]]:
            def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
                keeps = torch.ones(len(narrowings), 1, inputs[0].shape[-1], dtype=inputs[0].dtype)
                for own, narrowing in zip(keeps, narrowings, strict=True):
                    if block in narrowing.units:
                        own[:] = 0
                        own[:, narrowing.units[block]] = 1
                return (inputs[0] * keeps.to(inputs[0].device), *inputs[1:])

            return hook

        handles = [norm.register_forward_pre_hook(project) for norm in self.norms.values()]
        handles += [
            reader.register_forward_pre_hook(mask(int(name.partition(".")[0])))
            for name, reader in self.readers.items()
            if part_read(name) is Part.UNIT
        ]
        with removed_after(handles):
            yield


def _flat(states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """[tokens, ..] float32; 0 at padding."""
    states = states.detach().float()
    return (states if mask is None else states * mask[..., None]).flatten(0, -2)


def _normalized(states: torch.Tensor) -> torch.Tensor:
    """What an RMSNorm multiplies its gain by."""
    states = states.float()
    return states * states.square().mean(-1, keepdim=True).clamp_min(1e-30).rsqrt()


class WidthSums:
    """The sums of `Measurements`, by hooks on a teacher's norms and on the matrices that write hidden states."""

    def __init__(self, points: WidthPoints, width: int, *, rotates: bool, device: torch.device) -> None:
        self._points = points
        zeros = torch.zeros(width, dtype=torch.float64, device=device)
        self._channels, self._moments = zeros, zeros.new_zeros(width, width) if rotates else None
        self._energies: dict[str, torch.Tensor] = {}

    @contextmanager
    def watching(self, mask: torch.Tensor | None, scale: float) -> Iterator[None]:
        """Within it, `scale` times the sums over tokens of what passes are added."""

        def at_norm(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            self._channels += scale * _flat(output, mask).abs().sum(0)
            if self._moments is not None:
                given = _flat(_normalized(inputs[0]), mask)
                self._moments += scale * (given.T @ given)

        def at_reader(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
                energy = scale * _flat(inputs[0], mask).square().sum(0).double()
                self._energies[name] = self._energies.get(name, 0) + energy

            return hook

        handles = [norm.register_forward_hook(at_norm) for norm in self._points.norms.values()]
        handles += [reader.register_forward_pre_hook(at_reader(name)) for name, reader in self._points.readers.items()]
        with removed_after(handles):
            yield

    def over(self, world: World) -> Measurements:
        """Added up over the ranks, on the CPU; a collective."""
        moments = None if self._moments is None else world.sum(self._moments).cpu()
        energies = {name: world.sum(self._energies[name]).cpu() for name in sorted(self._energies)}
        basis = None if moments is None else principal_basis(moments)
        return Measurements(moments, world.sum(self._channels).cpu(), energies, basis)


class MomentSums:
    """The sums of `Calibration.moments` at some of the points."""

    def __init__(self, points: WidthPoints, sites: Collection[str]) -> None:
        self._norms = {site: norm for site, norm in points.norms.items() if site in sites}
        self._readers = {site: reader for site, reader in points.readers.items() if site in sites}
        self._moments: dict[str, torch.Tensor] = {}

    @contextmanager
    def watching(self, mask: torch.Tensor | None, scale: float) -> Iterator[None]:
        """As of `WidthSums`."""

        def hook(site: str, seen: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., None]:
            def add(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
                read = _flat(seen(inputs[0]), mask)
                if site not in self._moments:
                    self._moments[site] = read.new_zeros(read.shape[1], read.shape[1], dtype=torch.float64)
                self._moments[site].add_(read.T @ read, alpha=scale)

            return add

        handles = [norm.register_forward_pre_hook(hook(site, _normalized)) for site, norm in self._norms.items()]
        handles += [
            reader.register_forward_pre_hook(hook(site, torch.detach)) for site, reader in self._readers.items()
        ]
        with removed_after(handles):
            yield

    def over(self, world: World) -> dict[str, torch.Tensor]:
        """Added up over the ranks, on the CPU; a collective."""
        return {site: world.sum(self._moments.pop(site)).cpu() for site in sorted(self._moments)}
