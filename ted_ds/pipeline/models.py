"""The run's models: found or made (Stage 0), checked against the data and each other, hosted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ted_ds.config.choices import METHODS
from ted_ds.config.deepspeed import frozen_engine_config, trained_engine_config
from ted_ds.config.schema import RunConfig
from ted_ds.config.tasks import Kind, TaskSpec
from ted_ds.data.encoded import EncodedRows
from ted_ds.data.packed import PackedBlocks
from ted_ds.data.tokenizers import Tokenizer, holds_tokenizer, load_tokenizer
from ted_ds.errors import CheckpointError, ModelError
from ted_ds.job.world import World, logger
from ted_ds.models.filters import FilterPlan
from ted_ds.models.labels import label_order
from ted_ds.models.loading import DTYPES, is_sharded, load_model, load_tensors, meta_model, sharded_init
from ted_ds.models.padding import zero_padding_context
from ted_ds.models.pooler import find_pooler
from ted_ds.models.pruning import init_student
from ted_ds.models.published import is_published, unpack_published
from ted_ds.models.structure import find_structure
from ted_ds.models.task_head import label_fields, start_from_pretrained
from ted_ds.tasks.base import Task
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
            defaults=_defaults(run, tokenizer),
            trust_remote_code=run.teacher.trust_remote_code if run.teacher else False,
        )
        if student.init.config is not None:
            tokenizer.save(folder)

    world.on_main(make)
    return str(folder)


def _defaults(run: RunConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """What the config of a random start need not say."""
    fields = {"vocab_size": tokenizer.vocab_size}
    return fields if run.task == "causal-lm" else {**fields, "pad_token_id": tokenizer.pad_id, **label_fields(run.spec)}


def _unpacked(run: RunConfig, side: str, name_or_path: str, published: dict[str, Path], world: World) -> str:
    """A plain Hugging Face model; one in the authors' layout is taken apart in the run's folder."""
    if run.task == "causal-lm" or not world.on_main(lambda: is_published(name_or_path)):
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
        _check_outputs(role, path, model, run.spec)
        if (
            METHODS[run.method].learns_filters
            and run.spec.kind in ("classification", "regression")
            and role not in models.published
        ):
            find_pooler(model.config)
        # what Stage 0 made has the run's own tokenizer; the tokenizer of any other folder is trusted by its own section
        trusted = trusted or (run.data.trust_remote_code and Path(path).is_relative_to(run.output_dir))
        length = run.data.sequence_length
        fewest.append(check_fit(role, path, model, run.spec.kind, tokenizer, length, trust_remote_code=trusted))
    return min(fewest)


def _check_outputs(role: str, path: str, model: PreTrainedModel, spec: TaskSpec) -> None:
    """Raises ModelError for a head of another number of outputs, or other labels, than the task's."""
    if spec.kind == "classification":
        label_order(model.config, spec.labels)
    wanted = {"regression": 1, "question-answering": 2}.get(spec.kind)
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
    positions = _positions(model)
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
    return find_structure(model).vocab_rows if kind == "causal-lm" else embeddings.num_embeddings


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


def _positions(model: PreTrainedModel) -> int | None:
    """Tokens that a row may have; None where positions are relative without end."""
    config = model.config
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return None
    if config.model_type in ("roberta", "xlm-roberta"):  # its positions begin after the padding id
        return positions - int(config.pad_token_id) - 1
    relative = config.model_type == "deberta-v2" and config.relative_attention and not config.position_biased_input
    return None if relative else positions


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


def fit_to_run(model: PreTrainedModel, run: RunConfig, tokenizer: Tokenizer) -> None:
    """Padding as the run has it: a decoder that classifies takes the last token that is not of this id."""
    if run.task == "causal-lm":
        return
    model.config.pad_token_id = tokenizer.pad_id
    if not run.loss.mask_padding:
        zero_padding_context(model)


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
