"""The run's tokenizer and packed blocks, prepared where they are not yet, checked where they are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ted_ds.config.schema import DataConfig, RunConfig
from ted_ds.data.loader import EvaluationRows, TrainingRows
from ted_ds.data.prepare import PackedBlocks, ensure_prepared
from ted_ds.data.sources import iter_pieces
from ted_ds.data.tokenizers import Tokenizer, load_tokenizer, train_sentencepiece
from ted_ds.distributed import World

SPLITS = {"train": True, "validation": False}
"""Split -> whether its last, partial block is dropped: training drops it, evaluation counts every token."""


@dataclass(frozen=True)
class RunData:
    """A run's tokenizer, and its training and held-out blocks (validation None: there are none)."""

    tokenizer: Tokenizer
    train: PackedBlocks
    validation: PackedBlocks | None

    def training_rows(self, run: RunConfig, world: World) -> TrainingRows:
        """This rank's rows of every step."""
        return TrainingRows(
            self.train,
            seed=run.seed,
            global_batch_size=run.train.global_batch_size,
            micro_batch_size=run.train.micro_batch_size,
            rank=world.rank,
            world_size=world.size,
        )

    def evaluation_rows(self, run: RunConfig, world: World) -> EvaluationRows | None:
        """This rank's share of the held-out rows."""
        if self.validation is None:
            return None
        return EvaluationRows(
            self.validation, batch_size=run.train.micro_batch_size, rank=world.rank, world_size=world.size
        )


def ensure_tokenizer(data: DataConfig) -> Tokenizer:
    """The tokenizer, trained first where the recipe says so and it is not there; on one rank."""
    if data.train_tokenizer is not None and not Path(data.tokenizer).exists():
        texts = (piece.text for piece in iter_pieces(data.train, text_column=data.text_column))
        train_sentencepiece(texts, data.train_tokenizer, Path(data.tokenizer))
    return load_tokenizer(data.tokenizer)


def prepare_data(data: DataConfig, tokenizer: Tokenizer, folder: Path) -> dict[str, PackedBlocks]:
    """Packs the splits into `folder`, as far as that is not done; on one rank."""
    return {
        split: ensure_prepared(
            getattr(data, split),
            tokenizer,
            data.sequence_length,
            folder / split,
            text_column=data.text_column,
            drop_tail=drop_tail,
            processes=data.processes,
        )
        for split, drop_tail in SPLITS.items()
        if getattr(data, split)
    }


def open_tokenizer(run: RunConfig, world: World) -> Tokenizer:
    """The run's tokenizer on every rank, trained by rank 0 where it has to be; a collective."""
    world.on_main(lambda: ensure_tokenizer(run.data).vocab_size)
    return load_tokenizer(run.data.tokenizer)


def open_data(run: RunConfig, world: World, tokenizer: Tokenizer) -> RunData:
    """The run's data on every rank, prepared by rank 0 where it has to be; a collective.

    Raises DataError, on every rank, where data are missing, unreadable or do not fit.
    """
    data, folder = run.data, run.prepared_folder
    world.on_main(lambda: len(prepare_data(data, tokenizer, folder)))
    blocks = {split: PackedBlocks(folder / split) for split in SPLITS if getattr(data, split)}
    return RunData(tokenizer, blocks["train"], blocks.get("validation"))
