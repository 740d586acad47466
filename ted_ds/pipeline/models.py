"""The run's models: found or made (Stage 0), checked against the data and each other, hosted."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ted_ds.config.choices import METHODS
from ted_ds.config.deepspeed import frozen_engine_config, trained_engine_config
from ted_ds.config.schema import RunConfig
from ted_ds.config.tasks import KINDS
from ted_ds.data.tokenizers import Tokenizer
from ted_ds.errors import CheckpointError
from ted_ds.job.world import World, logger
from ted_ds.models.filters import FilterPlan
from ted_ds.models.loading import DTYPES, is_sharded, load_model, load_tensors, meta_model, sharded_init
from ted_ds.models.pruning import init_student
from ted_ds.models.published import is_published, unpack_published
from ted_ds.models.task_head import start_from_pretrained
from ted_ds.tasks.base import Task
from ted_ds.tasks.model_fit import check_fit, check_outputs, default_fields, fit_to_run
from ted_ds.tasks.registry import TASK_CLASSES
from ted_ds.teacher.frozen import FrozenModel, FrozenModule
from ted_ds.teacher.hosting import host_frozen


@dataclass(frozen=True)
class Models:
    """Where the run's models are, folders or hub ids.

    published: side ("teacher", "student") -> folder of filters that came with a checkpoint in the layout of the
    paper's authors.
    """

    student: str
    teacher: str | None
    published: dict[str, Path] = field(default_factory=dict)


def ensure_models(run: RunConfig, tokenizer: Tokenizer, world: World) -> Models:
    """The initial student, made in Stage 0 if need be, and the teacher; a collective.

    Checkpoints in the layout of the paper's authors are taken apart in the run's folder.
    """
    published: dict[str, Path] = {}
    teacher = run.teacher if run.uses_teacher else None
    path = None if teacher is None else _unpacked(run, "teacher", teacher.model, published, world)
    return Models(_ensure_student(run, tokenizer, path, published, world), path, published)


def _ensure_student(
    run: RunConfig, tokenizer: Tokenizer, teacher: str | None, published: dict[str, Path], world: World
) -> str:
    student = run.student
    if student.init is None and not student.init_from_pretrained:
        assert student.model is not None
        return _unpacked(run, "student", student.model, published, world)
    folder = run.output_dir / "initial_student"

    def make() -> None:
        if folder.exists():
            return
        logger.info("Stage 0: initial student -> %s", folder)
        if student.init is None:
            assert student.pretrained is not None
            start_from_pretrained(
                student.pretrained,
                run.spec,
                folder,
                tokenizer=tokenizer,
                seed=run.seed,
                trust_remote_code=student.trust_remote_code,
            )
            return
        init_student(
            teacher,
            student.init,
            folder,
            kind=run.spec.kind,
            seed=run.seed,
            defaults=default_fields(run.spec, tokenizer),
            trust_remote_code=run.teacher.trust_remote_code if run.teacher else False,
        )
        if student.init.config is not None:
            tokenizer.save(folder)

    world.on_main(make)
    return str(folder)


def _unpacked(run: RunConfig, side: str, name_or_path: str, published: dict[str, Path], world: World) -> str:
    """A plain Hugging Face model; one in the authors' layout is taken apart in the run's folder."""
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


def check_models(run: RunConfig, models: Models, tokenizer: Tokenizer) -> int:
    """The fewest vocabulary rows of teacher and student.

    Raises ModelError if one of them does not fit task and data, by their configs alone.
    """
    fewest = []
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
    return min(fewest)


def trained_config(
    run: RunConfig,
    world: World,
    *,
    learning_rate: float,
    weight_decay: float,
    global_batch_size: int | None = None,
) -> dict[str, Any]:
    """The DeepSpeed configuration of what a run trains: the student, or Stage I's filters."""
    return trained_engine_config(
        run,
        world_size=world.size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        cpu=world.device.type == "cpu",
        global_batch_size=global_batch_size,
    )


def load_frozen(
    run: RunConfig,
    world: World,
    name_or_path: str,
    *,
    task: Task,
    tokenizer: Tokenizer,
    trust_remote_code: bool,
    filters: Path | None = None,
) -> FrozenModel:
    """A model frozen and hosted as `teacher.sharding` says, with Stage I's filters if given; a collective."""
    teacher = run.teacher
    assert teacher is not None
    config = frozen_engine_config(run, world_size=world.size) if teacher.sharding == "zero3" else None
    model = load_model(
        name_or_path,
        run.spec.kind,
        dtype=teacher.dtype,
        deepspeed_config=config,
        dropout=0.0,
        trust_remote_code=trust_remote_code,
    )
    fit_to_run(model, run, tokenizer)
    bank = load_filters(filters, config, teacher.dtype, world) if filters else nn.ModuleList()
    return host_frozen(FrozenModule(model, task, bank), world.device, config)


def load_filters(folder: Path, deepspeed_config: dict[str, Any] | None, dtype: str, world: World) -> nn.ModuleList:
    """Stage I's filters from their folder, born sharded where the configuration shards; a collective."""
    plan = read_plan(folder)
    bank = new_filters(plan, deepspeed_config, dtype)
    load_tensors(bank, folder / "filters.safetensors", is_main=world.is_main)
    return bank


def new_filters(plan: FilterPlan, deepspeed_config: dict[str, Any] | None, dtype: str) -> nn.ModuleList:
    """Fresh filters, born sharded where the configuration shards."""
    with sharded_init(deepspeed_config):
        bank = plan.build()
    # a sharded tensor has its dtype by the configuration, and must not be cast from outside
    return bank if is_sharded(deepspeed_config) else bank.to(DTYPES[dtype])


def read_plan(folder: Path) -> FilterPlan:
    """The shape of a Stage I folder's filters; CheckpointError where the folder is not whole."""
    try:
        card = json.loads((folder / "filters.json").read_text(encoding="utf-8"))
        return FilterPlan(**{**card["plan"], "blocks": tuple(card["plan"]["blocks"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} holds no whole filters ({error}); delete it to learn them anew") from error


def copy_filters(source: Path, folder: Path) -> None:
    """Takes over filters that came with a checkpoint; renamed into place."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)
    temporary.rename(folder)
