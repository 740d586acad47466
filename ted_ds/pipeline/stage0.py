"""Stage 0: the initial student is found or made, and both models are checked against the run."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ted_ds.config.choices import METHODS
from ted_ds.config.schema import RunConfig
from ted_ds.config.tasks import KINDS
from ted_ds.data.tokenizers import Tokenizer
from ted_ds.errors import ModelError
from ted_ds.job.files import write_atomically
from ted_ds.job.world import World, logger
from ted_ds.models.fit import check_fit, check_outputs
from ted_ds.models.loading import meta_model
from ted_ds.models.probe import probe, probe_cut
from ted_ds.models.pruning import init_student
from ted_ds.models.published import is_published, unpack_published
from ted_ds.models.task_head import label_fields, start_from_pretrained
from ted_ds.models.weight_check import check_weights
from ted_ds.tasks.registry import TASK_CLASSES
from ted_ds.teacher.fingerprints import weights_fingerprint

MODELS = "models.json"
"""In a run's folder: the fingerprints of the models that it was given."""


@dataclass(frozen=True)
class ModelPaths:
    """Where the run's models are, folders or hub ids.

    published: side ("teacher", "student") -> folder of filters that came with a checkpoint in the layout of the
    paper's authors.
    """

    student: str
    teacher: str | None
    published: dict[str, Path] = field(default_factory=dict)


def ensure_models(run: RunConfig, tokenizer: Tokenizer, world: World) -> ModelPaths:
    """The initial student, made in Stage 0 if need be, and the teacher; a collective.

    Checkpoints in the layout of the paper's authors are taken apart in the run's folder.
    """
    published: dict[str, Path] = {}

    def plain(side: str, name_or_path: str) -> str:
        if KINDS[run.spec.kind].lm_head or not world.on_main(lambda: is_published(name_or_path)):
            return name_or_path
        folder = run.output_dir / f"published_{side}"

        def unpack() -> bool:
            if not folder.exists():
                logger.info("%s %s has the layout of the paper's authors -> %s", side, name_or_path, folder)
                unpack_published(name_or_path, folder)
            return (folder / "filters").exists()

        if world.on_main(unpack):
            published[side] = folder / "filters"
        return str(folder / "model")

    def whole(side: str, name_or_path: str, trusted: bool) -> str:
        path = plain(side, name_or_path)
        world.on_main(lambda: check_weights(side, path, run.spec.kind, trust_remote_code=trusted))
        world.on_main(lambda: _same_weights(run.output_dir / MODELS, side, path))
        return path

    teacher = (
        whole("teacher", run.teacher.model, run.teacher.trust_remote_code)
        if run.teacher is not None and run.uses_teacher
        else None
    )
    if run.student.model is not None and not run.student.init_from_pretrained:
        student = whole("student", run.student.model, run.student.trust_remote_code)
        return ModelPaths(student, teacher, published)
    folder = run.output_dir / "initial_student"
    world.on_main(lambda: None if folder.exists() else _make_student(run, tokenizer, teacher, folder))
    return ModelPaths(str(folder), teacher, published)


def _same_weights(record: Path, side: str, path: str) -> None:
    """Raises ModelError if a model is not what it was when the run began; on one rank.

    A run of an earlier version has no record: what is found now is put down.
    """
    known = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    found = weights_fingerprint(path)
    if known.setdefault(side, found) != found:
        raise ModelError(
            f"the {side} {path} has other weights than when the run in {record.parent} began ({record.name}): put the "
            "old ones back, or give another output_dir"
        )
    record.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(record, json.dumps(known, indent=2) + "\n")


def _make_student(run: RunConfig, tokenizer: Tokenizer, teacher: str | None, folder: Path) -> None:
    """A pre-trained model with a fresh head, a random start, or a cut of the teacher; on one rank."""
    logger.info("Stage 0: initial student -> %s", folder)
    student = run.student
    if student.init is None:
        assert student.pretrained is not None
        trusted = student.trust_remote_code
        check_weights("student", student.pretrained, run.spec.kind, trust_remote_code=trusted, new_head=True)
        start_from_pretrained(
            student.pretrained,
            run.spec,
            folder,
            tokenizer=tokenizer,
            seed=run.seed,
            trust_remote_code=trusted,
        )
        return
    trusted = run.teacher.trust_remote_code if run.teacher else False
    if teacher is not None and student.init.config is None:
        probe_cut(teacher, student.init, run.spec.kind, trust_remote_code=trusted)
    init_student(
        teacher,
        student.init,
        folder,
        kind=run.spec.kind,
        seed=run.seed,
        defaults=_defaults(run, tokenizer),
        trust_remote_code=trusted,
    )
    if student.init.config is not None:
        tokenizer.save(folder)


def _defaults(run: RunConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """What the config of a random start need not say."""
    padding = {"pad_token_id": tokenizer.pad_id} if KINDS[run.spec.kind].padded else {}
    return {"vocab_size": tokenizer.vocab_size, **padding, **label_fields(run.spec)}


def check_models(run: RunConfig, models: ModelPaths, tokenizer: Tokenizer, world: World) -> int:
    """The fewest vocabulary rows of teacher and student; a collective.

    Raises ModelError if one of them does not fit task and data, or its family behaves differently from what
    ted_ds assumes, by their configs alone.
    """
    fewest, layers = [], bool(run.loss.mse_alpha)
    sides = [("student", models.student, run.student.trust_remote_code)]
    if run.teacher is not None and models.teacher is not None:
        sides.append(("teacher", models.teacher, run.teacher.trust_remote_code))
    for role, path, trusted in sides:
        model = meta_model(path, run.spec.kind, trust_remote_code=trusted)
        check_outputs(role, path, model, run.spec)
        if METHODS[run.method].learns_filters and role not in models.published:
            TASK_CLASSES[run.spec.kind].check_stage1(model.config)
        # what Stage 0 made has the run's own tokenizer; the tokenizer of any other folder is trusted by its own section
        trusted = trusted or (run.data.trust_remote_code and Path(path).is_relative_to(run.output_dir))
        length = run.data.sequence_length
        fewest.append(check_fit(role, path, model, run.spec.kind, tokenizer, length, trust_remote_code=trusted))
        world.on_main(partial(probe, role, path, model, run.spec.kind, layers=layers))
    return min(fewest)
