"""What a frozen teacher does on a sample of the training rows: Stage 0 keeps what matters there."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from tqdm import tqdm

from ted_ds.batch import Batch, BatchCounts
from ted_ds.config.schema import RunConfig
from ted_ds.config.sections import LossConfig
from ted_ds.data.loader import Rows
from ted_ds.errors import NotFiniteError
from ted_ds.job.world import World
from ted_ds.models.channels import Measurements
from ted_ds.models.rotation import Roles
from ted_ds.models.structure import block_input, block_output
from ted_ds.ops import Head
from ted_ds.pipeline.width_hooks import MomentSums, Narrowing, WidthPoints, WidthSums, removed_after
from ted_ds.tasks.base import Reading, RunData, Task
from ted_ds.teacher.frozen import FrozenModel

PREDICTION = LossConfig(kl_alpha=0.0, mse_alpha=0.0, balance="none", layer_fade=0.0)

MOMENTS_BYTES = 128 * 2**20
"""What second moments may take at a time, unless those of a single matrix take more."""


@dataclass(frozen=True)
class Trial:
    """The teacher without some of its blocks, on the sample.

    loss: the task's mean loss, for a causal LM nats a token. influence: by block, 1 - cosine(its input, its output),
    mean over tokens (ShortGPT, arXiv 2403.03853); of a block that is left out, on what it would have got.
    """

    left_out: frozenset[int]
    loss: float
    influence: tuple[float, ...]


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
        self.num_blocks, self.width = teacher.module.structure.num_blocks, teacher.module.structure.width
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
        points = None if narrowings is None else self._points(roles, ())
        for i in range(0, len(trials), self._copies):
            part = slice(i, i + self._copies)
            with nullcontext() if points is None else points.narrowed((narrowings or ())[part]):
                found += self._run(trials[part])
        return found

    def measure(self, roles: Roles | None, left_out: Collection[int] = ()) -> Measurements:
        """What decides on the width of the model without these blocks; a collective.

        roles: of a family whose hidden states can be rotated; None: by channels.
        """
        sums = WidthSums(
            self._points(roles, left_out), self.width, rotates=roles is not None, device=self._world.device
        )
        with self.progress(trials=1):
            self._read(sums, left_out)
        return sums.over(self._world)

    def moments(
        self, roles: Roles | None, left_out: Collection[int], sites: Mapping[str, int]
    ) -> Iterator[dict[str, torch.Tensor]]:
        """By site the mean of x x^T over tokens, [inputs, inputs] float64 on the CPU; each step is a collective.

        x: what a matrix reads that writes hidden states, or what a norm multiplies its gain by. sites: names of
        `WidthPoints` -> inputs. As many at a time as MOMENTS_BYTES hold, each time in another reading of the sample.
        """
        points = self._points(roles, left_out)
        groups: list[list[str]] = []
        room = 0
        for site, inputs in sorted(sites.items()):
            size = 8 * inputs**2
            if not groups or room < size:
                groups.append([])
                room = MOMENTS_BYTES
            groups[-1].append(site)
            room -= size
        with self.progress(trials=len(groups)):
            for group in groups:
                sums = MomentSums(points, group)
                self._read(sums, left_out)
                yield sums.over(self._world)

    def _points(self, roles: Roles | None, left_out: Collection[int]) -> WidthPoints:
        return WidthPoints.of(self._teacher.module.structure, roles, frozenset(left_out))

    def _read(self, sums: WidthSums | MomentSums, left_out: Collection[int]) -> None:
        """The sample, row by row, by the model without these blocks."""
        tokens = sum(int(BatchCounts.of(batch).tokens) for batch in self._sample)
        trial, unused = [frozenset(left_out)], torch.zeros(1, self.num_blocks, device=self._world.device)
        for batch, counted, rows in self._own_rows():
            share, mask = counted / tokens, batch.attention_mask
            with self._without(trial, mask, unused.new_tensor(share), unused), sums.watching(mask, share):
                self._teacher.stream(batch)
            self._advance(rows)

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

        with removed_after([block.register_forward_hook(hook(i), with_kwargs=True) for i, block in enumerate(blocks)]):
            yield


def _nothing(count: int) -> None:
    pass
