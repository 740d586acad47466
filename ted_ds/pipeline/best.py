"""The best weights so far by the task's metric, kept as a plain Hugging Face folder."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ted_ds.data.tokenizers import Tokenizer
from ted_ds.errors import CheckpointError
from ted_ds.job.files import recover_folder, replace_folder
from ted_ds.job.world import World
from ted_ds.pipeline.export import CARD, export_student


class BestStudent:
    """OUTPUT_DIR/best: the student at the evaluation with the highest score, and its step and scores.

    Any score beats none, a negative one too. A run that goes on from a checkpoint goes back to the best of then
    (`go_back`); the folder may hold those of a later step, which is repeated, and its student kept again.
    """

    def __init__(self, folder: Path, metric: str, tokenizer: Tokenizer, world: World) -> None:
        self._folder, self._metric, self._tokenizer, self._world = folder, f"validation_{metric}", tokenizer, world
        self.card: dict[str, Any] | None = world.on_main(self._read)
        self._again: int | None = None

    def go_back(self, card: Mapping[str, Any] | None, steps: int) -> None:
        """The best was `card`'s when the checkpoint was saved that a run of `steps` steps goes on from.

        Raises CheckpointError if the folder holds those of a step that is not going to be repeated.
        """
        if self.card is not None and self.card["best_step"] > steps:
            raise CheckpointError(
                f"{self._folder} holds the student of step {self.card['best_step']}, train.steps is {steps}: give "
                "as many steps at least, or another output_dir"
            )
        self._again = None if self.card is None else self.card["best_step"]
        self.card = None if card is None else dict(card)

    def beaten_by(self, step: int, scores: dict[str, float]) -> bool:
        """True if the scores are better, the same on every rank; a nan is not.

        True, too, at the step whose student the folder holds from before: repeated, it may score a hair lower.
        """
        if step == self._again:
            return True
        best = -math.inf if self.card is None else self.card[self._metric]
        return scores.get(self._metric, -math.inf) > best

    def keep(self, student: PreTrainedModel, step: int, scores: dict[str, float]) -> None:
        """Writes the student, in place of the one before; a collective."""
        self.card = {"best_step": step, **scores}
        export_student(student, self._tokenizer, self._folder, self._world, self.card)

    def copy_to(self, folder: Path) -> None:
        """Copies the student without its card, renamed into place; on one rank."""
        temporary = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(self._folder, temporary, ignore=shutil.ignore_patterns(CARD))
        replace_folder(folder, temporary)

    def _read(self) -> dict[str, Any] | None:
        recover_folder(self._folder)
        path = self._folder / CARD
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
