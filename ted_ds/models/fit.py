"""Whether a model fits the run's task, data and tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ted_ds.config.schema import RunConfig
from ted_ds.config.tasks import KINDS, Kind, TaskSpec
from ted_ds.data.encoded import EncodedRows
from ted_ds.data.packed import PackedBlocks
from ted_ds.data.tokenizers import Tokenizer, holds_tokenizer, load_tokenizer
from ted_ds.errors import ModelError
from ted_ds.job.world import logger
from ted_ds.models.families import row_limit
from ted_ds.models.labels import label_order
from ted_ds.models.padding import zero_padding_context
from ted_ds.models.structure import find_structure


def check_outputs(role: str, path: str, model: PreTrainedModel, spec: TaskSpec) -> None:
    """Raises ModelError for a head of another number of outputs, or other labels, than the task's."""
    wanted = KINDS[spec.kind].outputs
    if wanted is None and spec.labels:
        label_order(model.config, spec.labels)
    if wanted is not None and model.config.num_labels != wanted:
        raise ModelError(
            f"the {role} {path} has {model.config.num_labels} outputs, task: {spec.name} has {wanted}: use a model of "
            "this task"
        )


def check_fit(
    role: str,
    name_or_path: str,
    model: PreTrainedModel,
    kind: Kind,
    tokenizer: Tokenizer,
    sequence_length: int,
    *,
    trust_remote_code: bool = False,
) -> int:
    """The model's vocabulary rows.

    Raises ModelError for a model of another tokenizer, or whose embeddings of pieces or positions are too small.
    More rows than ids are padding. Added tokens may lie beyond the rows, if the data holds none of them (`check_ids`).
    A folder without a tokenizer can only be checked for its size, and the log says so.
    """
    positions = row_limit(model.config)
    if positions is not None and positions < sequence_length:
        raise ModelError(
            f"the {role} {name_or_path} has {positions} positions, data.sequence_length is {sequence_length}: "
            f"give at most {positions}"
        )
    rows = vocabulary_rows(model, kind)
    if tokenizer.text_vocab_size > rows:
        raise ModelError(
            f"the {role} {name_or_path} has {rows} vocabulary rows, data.tokenizer has {tokenizer.text_vocab_size} "
            "ids: use the tokenizer that the model was trained with"
        )
    if Path(name_or_path).is_dir() and not holds_tokenizer(Path(name_or_path)):
        logger.warning("the %s %s has no tokenizer: it is taken to be data.tokenizer", role, name_or_path)
        return rows
    if name_or_path == tokenizer.name:
        return rows
    if not load_tokenizer(name_or_path, trust_remote_code=trust_remote_code).agrees_with(tokenizer):
        raise ModelError(
            f"the {role} {name_or_path} was trained with another tokenizer than data.tokenizer: ids would mean "
            "different pieces, and a KL between them nothing; use models of one tokenizer"
        )
    return rows


def vocabulary_rows(model: PreTrainedModel, kind: Kind) -> int:
    """Ids that a model has rows for, in its LM head or, of other tasks, its embeddings."""
    embeddings: Any = model.get_input_embeddings()
    return find_structure(model).vocab_rows if KINDS[kind].lm_head else embeddings.num_embeddings


def check_ids(tokenizer: Tokenizer, rows: int, splits: Mapping[str, PackedBlocks | EncodedRows]) -> None:
    """Raises ModelError if prepared data holds an id that a model has no row for; on one rank.

    rows: the fewest vocabulary rows of the models. On a GPU such an id ends the process without a reason. Data is
    looked at only if the tokenizer has such ids at all.
    """
    if tokenizer.vocab_size <= rows:
        return
    for split, data in splits.items():
        largest = data.largest_id()
        if largest >= rows:
            raise ModelError(
                f"the prepared {split} data holds the id {tokenizer.spelled(largest)}, a model has {rows} vocabulary "
                "rows: use the tokenizer that the model was trained with, or give the model a row for it"
            )


def fit_to_run(model: PreTrainedModel, run: RunConfig, tokenizer: Tokenizer) -> None:
    """Padding as the run has it: a decoder that classifies takes the last token that is not of this id."""
    if not KINDS[run.spec.kind].padded:
        return
    model.config.pad_token_id = tokenizer.pad_id
    if not run.loss.mask_padding:
        zero_padding_context(model)
