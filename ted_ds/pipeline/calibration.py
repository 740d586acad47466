"""What a frozen teacher does on a sample of the training rows: Stage 0 keeps what matters there."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
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
from ted_ds.models.structure import block_input, block_output
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

    def trials(self, left_out: Sequence[Collection[int]]) -> list[Trial]:
        """The model without each of these sets of blocks, on the sample; a collective.

        One forward serves as many trials as there are copies: what is sharded is gathered once for all of them.
        """
        trials = [frozenset(blocks) for blocks in left_out]
        parts = [trials[i : i + self._copies] for i in range(0, len(trials), self._copies)]
        return [trial for part in parts for trial in self._run(part)]

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
        count, world, sample = len(trials), self._world, self._sample
        # row by row for a trial: the loss, and the influence of each block
        sums = torch.zeros(count, 1 + self.num_blocks, dtype=torch.float64, device=world.device)
        counts = BatchCounts(torch.stack([BatchCounts.of(batch).values for batch in sample]).sum(0).to(world.device))

        for first in range(0, len(sample), world.size):
            place = first + world.rank
            batch = sample[place % len(sample)].to(world.device)
            counted = float(place < len(sample))  # a rank without a row left takes part in the gathers

            def use(output: torch.Tensor, head: Head | None, batch: Batch = batch, counted: float = counted) -> None:
                with torch.no_grad():
                    for i in range(count):
                        reading = Reading(output[i : i + 1], head)
                        loss = self._task.losses(reading, None, batch, counts, PREDICTION).pred_loss
                        sums[i, 0] += counted * loss

            copies = batch.copies(count)
            with self._without(trials, copies.attention_mask, counted / counts.tokens, sums[:, 1:]):
                self._teacher.stream(copies, use)
            self._advance(count * min(world.size, len(sample) - first))
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

        handles = [block.register_forward_hook(hook(i), with_kwargs=True) for i, block in enumerate(blocks)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _nothing(count: int) -> None:
    pass
