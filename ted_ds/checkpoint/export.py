"""The student as a plain Hugging Face folder: no filters, no ted_ds code."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import PreTrainedModel

from ted_ds.data.tokenizers import Tokenizer
from ted_ds.distributed import World
from ted_ds.engine.loading import whole_tensors


def export_student(student: PreTrainedModel, tokenizer: Tokenizer, folder: Path, world: World) -> None:
    """Writes `student` (a Hugging Face model, sharded or not) with its tokenizer; a collective.

    Weights are gathered one at a time; rank 0's host memory holds one copy of the student. The folder is
    renamed into place, so that it is whole wherever it exists.
    """
    weights = dict(whole_tensors(student, keep=world.is_main))

    def write() -> None:
        buffers = {name: b.cpu() for name, b in student.named_buffers() if name in student.state_dict()}
        temporary = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        student.save_pretrained(temporary, state_dict=weights | buffers)
        tokenizer.save(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)

    world.on_main(write)
