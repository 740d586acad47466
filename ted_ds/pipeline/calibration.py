"""What a frozen teacher does on a sample of the training rows: Stage 0 keeps what matters there."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm

from ted_ds.batch import Batch, BatchCounts
from ted_ds.config.schema import RunConfig
from ted_ds.config.sections import LossConfig
from ted_ds.data.loader import Rows
from ted_ds.errors import NotFiniteError
from ted_ds.job.world import World
from ted_ds.models.channels import Measurements
from ted_ds.models.families import Part, axes_of, part_read
from ted_ds.models.rotation import Roles, principal_basis, within
from ted_ds.models.structure import ModelStructure, block_input, block_output
from ted_ds.ops import Head
from ted_ds.tasks.base import Reading, RunData, Task
from ted_ds.teacher.frozen import FrozenModel

PREDICTION = LossConfig(kl_alpha=0.0, mse_alpha=0.0)


@dataclass(frozen=True)
class Trial:
    """The teacher without some of its blocks, on the sample.

    loss: the task's mean loss, for a causal LM nats a token. influence: by block, 1 - cosine(its input, its output),
    mean over tokens (ShortGPT, arXiv 2403.03853); of a block that is left out, on what it would have got.
    """

    left_out: frozenset[int]
    loss: float
    influence: tuple[float, ...]


@dataclass(frozen=True)
class Narrowing:
    """A narrower student, as what its teacher loses: the teacher then gives its logits, but for rounding.

    basis: [D, d], to which hidden states are rotated; None: they stay. units: teacher block -> the FFN units that stay;
    of a block that it does not name, all.
    """

    basis: torch.Tensor | None
    units: Mapping[int, torch.Tensor]


class Calibration:
    """A frozen model and the sample that it reads: the first rows in the order of training, each by itself.

    The rows are dealt to the ranks. Statistics are sums over rows in float64, added up over ranks: they are the same
    for any number of ranks, but for the last digits.

    rows: one training row a step, on every rank alike. num_rows: size of the sample. copies: how many copies of a row
    run through the model together, which bounds the memory.
    """

    def __init__(
        self, teacher: FrozenModel, rows: Rows, task: Task, world: World, *, num_rows: int, copies: int
    ) -> None:
        self.num_blocks = teacher.module.structure.num_blocks
        self.num_rows = num_rows
        self._teacher, self._task, self._world, self._copies = teacher, task, world, copies
        self._advance: Callable[[int], object] = _nothing
        self._sample = [batch for step in range(num_rows) for batch in rows.micro_batches(step)]

    @staticmethod
    def of(run: RunConfig, world: World, data: RunData, teacher: FrozenModel, tokens: int) -> Calibration:
        """A sample of `tokens`, in rows of the run's length, at most an epoch."""
        rows = min(data.num_rows, -(-tokens // run.data.sequence_length))
        copies = run.train.micro_batch_size
        return Calibration(teacher, data.sample(run), data.task, world, num_rows=rows, copies=copies)

    def trials(
        self,
        left_out: Sequence[Collection[int]],
        narrowings: Sequence[Narrowing] | None = None,
        roles: Roles | None = None,
    ) -> list[Trial]:
        """The model without each of these sets of blocks, on the sample; a collective.

        One forward serves as many trials as there are copies: what is sharded is gathered once for all of them.

        narrowings: one for each set, if the model is narrower too; roles: see `measure`.
        """
        trials, found = [frozenset(blocks) for blocks in left_out], []
        points = None if narrowings is None else _Points.of(self._teacher.module.structure, roles, frozenset())
        for i in range(0, len(trials), self._copies):
            part = slice(i, i + self._copies)
            with nullcontext() if points is None else points.narrowed((narrowings or ())[part]):
                found += self._run(trials[part])
        return found

    def measure(self, roles: Roles | None, left_out: Collection[int] = ()) -> Measurements:
        """What decides on the width of the model without these blocks; a collective.

        roles: of a family whose hidden states can be rotated; None: by channels.
        """
        sums = _Sums(self._teacher.module.structure, roles, frozenset(left_out), self._world.device)
        tokens = sum(int(BatchCounts.of(batch).tokens) for batch in self._sample)
        trial, unused = [frozenset(left_out)], torch.zeros(1, self.num_blocks, device=self._world.device)
        with self.progress(trials=1):
            for batch, counted, rows in self._own_rows():
                share, mask = counted / tokens, batch.attention_mask
                with self._without(trial, mask, unused.new_tensor(share), unused), sums.watching(mask, share):
                    self._teacher.stream(batch)
                self._advance(rows)
        return sums.over(self._world)

    def _own_rows(self) -> Iterator[tuple[Batch, float, int]]:
        """(row, 1, rows of all ranks in this turn) of this rank; 0: it has none left, and only joins in gathers."""
        for first in range(0, len(self._sample), self._world.size):
            place = first + self._world.rank
            batch = self._sample[place % len(self._sample)].to(self._world.device)
            yield batch, float(place < len(self._sample)), min(self._world.size, len(self._sample) - first)

    @contextmanager
    def progress(self, trials: int) -> Iterator[None]:
        """Within it, a bar shows how far so many trials are."""
        quiet = not self._world.is_main
        every = 0.2 if sys.stderr.isatty() else 10.0  # seconds: a log file is not a terminal
        with tqdm(total=trials * self.num_rows, unit="row", desc="Stage 0", mininterval=every, disable=quiet) as bar:
            self._advance = bar.update
            yield
        self._advance = _nothing

    def _run(self, trials: Sequence[frozenset[int]]) -> list[Trial]:
        count, world = len(trials), self._world
        # row by row for a trial: the loss, and the influence of each block
        sums = torch.zeros(count, 1 + self.num_blocks, dtype=torch.float64, device=world.device)
        counts = BatchCounts(
            torch.stack([BatchCounts.of(batch).values for batch in self._sample]).sum(0).to(world.device)
        )

        for batch, counted, rows in self._own_rows():

            def use(output: torch.Tensor, head: Head | None, batch: Batch = batch, counted: float = counted) -> None:
                with torch.no_grad():
                    for i in range(count):
                        reading = Reading(output[i : i + 1], head)
                        loss = self._task.losses(reading, None, batch, counts, PREDICTION).pred_loss
                        sums[i, 0] += counted * loss

            copies = batch.copies(count)
            with self._without(trials, copies.attention_mask, counted / counts.tokens, sums[:, 1:]):
                self._teacher.stream(copies, use)
            self._advance(count * rows)
        found = world.sum(sums)
        if not bool(found.isfinite().all()):
            raise NotFiniteError("the teacher's loss or hidden states on the calibration sample are not finite")
        return [
            Trial(trial, loss, tuple(influence))
            for trial, (loss, *influence) in zip(trials, found.tolist(), strict=True)
        ]

    @contextmanager
    def _without(
        self,
        trials: Sequence[frozenset[int]],
        mask: torch.Tensor | None,
        scale: torch.Tensor,
        influence: torch.Tensor,
    ) -> Iterator[None]:
        """Within it, each block gives back what it was given in the copies whose trial leaves it out.

        influence: [copies, blocks], to which `scale` times the sum over tokens is added.
        """
        blocks = self._teacher.module.structure.blocks

        def hook(number: int) -> Callable[..., Any]:
            absent = torch.tensor([number in trial for trial in trials], device=influence.device)[:, None, None]
            partly = any(number in trial for trial in trials)

            def call(module: Any, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
                given, made = block_input(inputs, named), block_output(output)
                change = 1 - functional.cosine_similarity(given.float(), made.float(), dim=-1)
                influence[:, number] += scale * (change if mask is None else change * mask).sum(-1)
                if not partly:
                    return None
                made = torch.where(absent, given, made)
                return (made, *output[1:]) if isinstance(output, tuple) else made

            return call

        with _removed([block.register_forward_hook(hook(i), with_kwargs=True) for i, block in enumerate(blocks)]):
            yield


@dataclass(frozen=True)
class _Points:
    """Where the width shows. norms: over hidden states, those that `roles` turns or, without roles, all that the table
    of families knows. readers: "BLOCK.NAME" -> a matrix that writes hidden states, and reads heads or units.
    """

    norms: Sequence[nn.Module]
    readers: Mapping[str, nn.Module]

    @staticmethod
    def of(structure: ModelStructure, roles: Roles | None, left_out: frozenset[int]) -> _Points:
        """Of a model whose weights may be sharded; without those of the blocks that are left out."""
        stack, norms, readers = structure.blocks_path, [], {}
        for path, module in structure.model.named_modules():
            name, own = f"{path}.weight", within(f"{path}.weight", stack)
            block = name.removeprefix(f"{stack}.").partition(".")[0]
            weight = getattr(module, "weight", None)
            shape = tuple(getattr(weight, "ds_shape", getattr(weight, "shape", ())))  # a sharded weight is empty
            if block.isdecimal() and int(block) in left_out:
                continue
            if part_read(name) is not None:
                readers[f"{block}.{own}"] = module
            elif shape == (structure.width,) and (own in roles.by_name if roles else axes_of(name)):
                norms.append(module)
        return _Points(norms, readers)

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

        handles = [norm.register_forward_pre_hook(project) for norm in self.norms]
        handles += [
            reader.register_forward_pre_hook(mask(int(name.partition(".")[0])))
            for name, reader in self.readers.items()
            if part_read(name) is Part.UNIT
        ]
        with _removed(handles):
            yield


class _Sums:
    """The sums of `Measurements`, by hooks on a teacher's norms and on the matrices that write hidden states."""

    def __init__(
        self, structure: ModelStructure, roles: Roles | None, left_out: frozenset[int], device: torch.device
    ) -> None:
        self._points = _Points.of(structure, roles, left_out)
        width = structure.width
        zeros = torch.zeros(width, dtype=torch.float64, device=device)
        self._channels, self._moments = zeros, None if roles is None else zeros.new_zeros(width, width)
        self._energies: dict[str, torch.Tensor] = {}

    @contextmanager
    def watching(self, mask: torch.Tensor | None, scale: float) -> Iterator[None]:
        """Within it, `scale` times the sums over tokens of what passes are added."""

        def flat(states: torch.Tensor) -> torch.Tensor:
            states = states.detach().float()
            return (states if mask is None else states * mask[..., None]).flatten(0, -2)

        def at_norm(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            self._channels += scale * flat(output).abs().sum(0)
            if self._moments is not None:
                given = inputs[0].float()
                given = flat(given * given.square().mean(-1, keepdim=True).clamp_min(1e-30).rsqrt())
                self._moments += scale * (given.T @ given)

        def at_reader(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
                energy = scale * flat(inputs[0]).square().sum(0).double()
                self._energies[name] = self._energies.get(name, 0) + energy

            return hook

        handles = [norm.register_forward_hook(at_norm) for norm in self._points.norms]
        handles += [reader.register_forward_pre_hook(at_reader(name)) for name, reader in self._points.readers.items()]
        with _removed(handles):
            yield

    def over(self, world: World) -> Measurements:
        """Added up over the ranks, on the CPU; a collective."""
        moments = None if self._moments is None else world.sum(self._moments).cpu()
        energies = {name: world.sum(self._energies[name]).cpu() for name in sorted(self._energies)}
        basis = None if moments is None else principal_basis(moments)
        return Measurements(moments, world.sum(self._channels).cpu(), energies, basis)


@contextmanager
def _removed(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    """Removes hooks at its end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _nothing(count: int) -> None:
    pass
