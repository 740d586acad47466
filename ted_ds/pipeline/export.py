"""The student as a plain Hugging Face folder: no filters, no ted_ds code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ted_ds.data.tokenizers import Tokenizer
from ted_ds.errors import TrainingError
from ted_ds.job.files import replace_folder
from ted_ds.job.world import World
from ted_ds.models.loading import whole_tensors

CARD = "ted_ds.json"
"""What an exported student says of itself, in its folder."""


def export_student(
    student: PreTrainedModel, tokenizer: Tokenizer, folder: Path, world: World, card: dict[str, Any] | None = None
) -> None:
    """Writes `student` (a Hugging Face model, sharded or not) with its tokenizer, and `card` if given; a collective.

    Weights are gathered one at a time; rank 0's host memory holds one copy of the student. The folder is
    renamed into place, so that it is whole wherever it exists. Raises TrainingError if a weight is not finite.
    """
    weights = dict(whole_tensors(student, keep=world.is_main))

    def write() -> None:
        for name, tensor in weights.items():
            if not tensor.isfinite().all():
                raise TrainingError(
                    f"the student is not exported to {folder}: {name} has values that are not finite; go back to an "
                    "earlier checkpoint, or lower optimizer.learning_rate"
                )
        buffers = {name: b.cpu() for name, b in student.named_buffers() if name in student.state_dict()}
        temporary = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        student.save_pretrained(temporary, state_dict=weights | buffers)
        tokenizer.save(temporary)
        if card is not None:
            (temporary / CARD).write_text(json.dumps(card, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        replace_folder(folder, temporary)

    world.on_main(write)
