"""Stage 0: the initial student, cut out of the teacher's files or made at random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ted_ds.config.student_section import InitConfig
from ted_ds.config.tasks import Kind
from ted_ds.errors import ModelError
from ted_ds.job.files import new_folder
from ted_ds.models.channels import Measurements
from ted_ds.models.cut_plan import CutPlan, plan_cut
from ted_ds.models.cut_tensors import Cut
from ted_ds.models.random_start import write_random
from ted_ds.models.weight_files import WeightReader, copy_companions, write_weights


def init_student(
    teacher: str | None,
    init: InitConfig,
    output_dir: Path,
    *,
    kind: Kind = "causal-lm",
    seed: int = 0,
    defaults: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    measured: Measurements | None = None,
    corrected: Path | None = None,
) -> None:
    """Writes the initial student, a model of `kind`, as a Hugging Face folder, renamed into place when it is whole.

    With `init.config`: a random start under `seed`; `defaults` are fields that the config may leave out, such as
    the tokenizer's vocab_size. Else blocks and parts of `teacher` (folder or hub id), everything else copied,
    dtype kept. The teacher is read one tensor at a time, twice if its width is cut, and at most one output shard of
    5 GB is held. The head width always stays the teacher's. `teacher` stands for `init.model`.

    measured: what decides on the width, and must be given if it is cut; see `rotation` and `PartScores`. An LM head
    that is tied to the embeddings is untied by a rotation. corrected: folder of tensors of the student that stand for
    those of a plain cut, see `Cut.tensor`.

    Raises ModelError if the request does not fit the teacher or its weights cannot be cut.
    """
    if output_dir.exists():
        raise ModelError(f"the student's folder {output_dir} exists already: delete it, or choose another")
    with new_folder(output_dir) as folder:
        if init.config is not None:
            write_random(init.config, defaults or {}, kind, folder, seed, trust_remote_code)
        elif teacher is not None:
            plan = plan_cut(teacher, init, kind, trust_remote_code)
            _write_cut(plan, teacher, folder, measured, corrected)
        else:
            raise ModelError("student.init cuts the student out of a teacher: give teacher.model")


def check_cut(teacher: str, init: InitConfig, kind: Kind, trust_remote_code: bool) -> CutPlan:
    """The plan of a cut, once names and shapes in the teacher's files are known to give the student; nothing is read.

    Raises ModelError if they do not.
    """
    plan = plan_cut(teacher, init, kind, trust_remote_code)
    Cut(plan, teacher)
    return plan


def units_that_stay(
    teacher: str, cuts: Sequence[InitConfig], kind: Kind, measured: Measurements, *, trust_remote_code: bool
) -> list[dict[int, torch.Tensor]]:
    """For each of these cuts, which keep the same blocks: block -> the FFN units that stay; on one rank."""
    student = Cut(plan_cut(teacher, cuts[0], kind, trust_remote_code), teacher, measured)
    return [student.units(cut.intermediate_size) if cut.intermediate_size else {} for cut in cuts]


def _write_cut(
    plan: CutPlan, teacher: str, folder: Path, measured: Measurements | None, corrected: Path | None
) -> None:
    student = Cut(plan, teacher, measured)
    better = None if corrected is None else WeightReader(str(corrected))

    def make(name: str) -> torch.Tensor:
        return student.tensor(name) if better is None or name not in better else better.read(name)

    write_weights(folder, student.sizes(), make)
    plan.student.config.save_pretrained(folder)
    copy_companions(teacher, folder)
