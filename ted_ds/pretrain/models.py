"""The run's models: checked against tokenizer and each other, Stage 0 done, hosted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from ted_ds.config.deepspeed import frozen_engine_config, trained_engine_config
from ted_ds.config.schema import RunConfig
from ted_ds.data.tokenizers import Tokenizer, holds_tokenizer, load_tokenizer
from ted_ds.distill.frozen import FrozenLM, FrozenModel
from ted_ds.distributed import World, logger
from ted_ds.engine.frozen import host_frozen
from ted_ds.engine.loading import DTYPES, is_sharded, load_causal_lm, load_tensors, meta_structure, sharded_init
from ted_ds.errors import CheckpointError, ModelError
from ted_ds.models.filters import FilterPlan
from ted_ds.models.pruning import init_student
from ted_ds.models.structure import find_structure


def ensure_student(run: RunConfig, tokenizer: Tokenizer, world: World) -> str:
    """Stage 0: the path or hub id of the student's initial weights, made from the teacher if need be; a collective."""
    init = run.student.init
    if init is None:
        assert run.student.model is not None
        return run.student.model
    folder = run.output_dir / "initial_student"

    def make() -> None:
        if not folder.exists():
            logger.info("Stage 0: initial student -> %s", folder)
            init_student(
                run.teacher.model if run.teacher else None,
                init,
                folder,
                seed=run.seed,
                tokenizer_vocab_size=tokenizer.vocab_size,
                trust_remote_code=run.teacher.trust_remote_code if run.teacher else False,
            )
            if init.config is not None:
                tokenizer.save(folder)

    world.on_main(make)
    return str(folder)


def check_models(run: RunConfig, student: str, tokenizer: Tokenizer) -> None:
    """Raises ModelError where teacher or student do not fit the data, by their configs alone."""
    models = [("student", student, run.student.trust_remote_code)]
    if run.teacher is not None:
        models.append(("teacher", run.teacher.model, run.teacher.trust_remote_code))
    for role, path, trusted in models:
        model = meta_structure(path, trust_remote_code=trusted).model
        check_fit(role, path, model, tokenizer, run.data.sequence_length)


def check_fit(role: str, name_or_path: str, model: Any, tokenizer: Tokenizer, sequence_length: int) -> None:
    """Raises ModelError for a model of another tokenizer, or whose embeddings of ids or positions are too small.

    More rows than ids are padding. A folder without a tokenizer can only be checked for its size, and the log
    says so.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < sequence_length:
        raise ModelError(
            f"the {role} {name_or_path} has {positions} positions, data.sequence_length is {sequence_length}: "
            f"give at most {positions}"
        )
    rows = find_structure(model).vocab_rows
    if tokenizer.vocab_size > rows:
        raise ModelError(
            f"the {role} {name_or_path} has {rows} vocabulary rows, data.tokenizer has {tokenizer.vocab_size} ids: "
            "use the tokenizer that the model was trained with"
        )
    if Path(name_or_path).is_dir() and not holds_tokenizer(Path(name_or_path)):
        logger.warning("the %s %s has no tokenizer: it is taken to be data.tokenizer", role, name_or_path)
        return
    if not load_tokenizer(name_or_path).agrees_with(tokenizer):
        raise ModelError(
            f"the {role} {name_or_path} was trained with another tokenizer than data.tokenizer: ids would mean "
            "different pieces, and a KL between them nothing; use models of one tokenizer"
        )


def trained_config(run: RunConfig, world: World, *, learning_rate: float, weight_decay: float) -> dict[str, Any]:
    """The DeepSpeed configuration of what a run trains: the student, or Stage I's filters."""
    return trained_engine_config(
        run,
        world_size=world.size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        cpu=world.device.type == "cpu",
    )


def load_frozen(
    run: RunConfig,
    world: World,
    name_or_path: str,
    *,
    trust_remote_code: bool,
    filters: Path | None = None,
) -> FrozenModel:
    """A model frozen and hosted as `teacher.sharding` says, with Stage I's filters if given; a collective."""
    teacher = run.teacher
    assert teacher is not None
    config = frozen_engine_config(run, world_size=world.size) if teacher.sharding == "zero3" else None
    model = load_causal_lm(
        name_or_path,
        dtype=teacher.dtype,
        deepspeed_config=config,
        dropout=0.0,
        trust_remote_code=trust_remote_code,
    )
    bank = load_filters(filters, config, teacher.dtype, world) if filters else nn.ModuleList()
    return host_frozen(FrozenLM(model, bank), world.device, config)


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
