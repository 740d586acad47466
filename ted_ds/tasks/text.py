"""Rows of text: packed blocks, read in an order of each epoch, and held-out perplexity."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ted_ds.config.data_section import DataConfig
from ted_ds.config.schema import RunConfig
from ted_ds.data.bad_rows import BadRows
from ted_ds.data.loader import EvaluationRows, TrainingRows
from ted_ds.data.packed import PackedBlocks
from ted_ds.data.prepare import prepare
from ted_ds.data.sources import iter_pieces
from ted_ds.data.tokenizer_training import train_sentencepiece
from ted_ds.data.tokenizers import Tokenizer
from ted_ds.evaluation.perplexity import held_out_perplexity
from ted_ds.job.world import World
from ted_ds.tasks.base import ONE_BY_ONE, Task, dealing

SPLITS = {"train": True, "validation": False}
"""Split -> whether its last, partial block is dropped: training drops it, evaluation counts every token."""


@dataclass(frozen=True)
class TextData:
    """A run's tokenizer, and its training and held-out blocks (validation None: there are none)."""

    tokenizer: Tokenizer
    task: Task
    train: PackedBlocks
    validation: PackedBlocks | None

    @staticmethod
    def open(run: RunConfig, tokenizer: Tokenizer, task: Task) -> TextData:
        """The blocks that `prepare_text` made."""
        blocks = {split: PackedBlocks(run.prepared_folder / split) for split in SPLITS if getattr(run.data, split)}
        return TextData(tokenizer, task, blocks["train"], blocks.get("validation"))

    @property
    def splits(self) -> dict[str, PackedBlocks]:
        """All blocks by name."""
        return {"train": self.train} | ({} if self.validation is None else {"validation": self.validation})

    @property
    def num_rows(self) -> int:
        """Training blocks."""
        return len(self.train)

    def training_rows(self, run: RunConfig, world: World, global_batch_size: int | None = None) -> TrainingRows:
        """This rank's blocks of every step."""
        return TrainingRows(self.train, **dealing(run, world, global_batch_size))

    def sample(self, run: RunConfig) -> TrainingRows:
        """Blocks, one a step."""
        return TrainingRows(self.train, seed=run.seed, **ONE_BY_ONE)

    def evaluate(self, engine: Any, run: RunConfig, world: World) -> dict[str, float]:
        """validation_loss, validation_perplexity, and a word's and byte's; nothing without held-out data."""
        if self.validation is None:
            return {}
        size = run.train.micro_batch_size
        rows = EvaluationRows(self.validation, batch_size=size, rank=world.rank, world_size=world.size)
        made = self.validation.manifest
        return held_out_perplexity(engine, rows, world, words=made.words, size=made.bytes)

    def evaluate_extra(self, engine: Any, run: RunConfig, world: World) -> dict[str, float]:
        """Nothing: a causal LM has one held-out set."""
        return {}


def train_text_tokenizer(data: DataConfig) -> None:
    """A SentencePiece model of the training texts."""
    assert data.train_tokenizer is not None
    train_sentencepiece(_all_texts(data), data.train_tokenizer, Path(data.tokenizer))


def _all_texts(data: DataConfig) -> Iterator[str]:
    # refused here, before a tokenizer is written that the next start would take as it is
    with BadRows(skip=data.skip_bad_rows) as bad:
        for piece in iter_pieces(data.train, text_column=data.text_column, bad=bad):
            yield piece.text


def prepare_text(data: DataConfig, tokenizer: Tokenizer, folder: Path) -> dict[str, PackedBlocks]:
    """Packs the splits into `folder`, as far as that is not done; on one rank."""
    return {
        split: prepare(
            getattr(data, split),
            tokenizer,
            data.sequence_length,
            folder / split,
            text_column=data.text_column,
            drop_tail=drop_tail,
            processes=data.processes,
            skip_bad_rows=data.skip_bad_rows,
        )
        for split, drop_tail in SPLITS.items()
        if getattr(data, split)
    }
