"""Stage 0: the initial student is found or made, and both models are checked against the run."""

from __future__ import annotations

import gc
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ted_ds.config.choices import METHODS
from ted_ds.config.schema import RunConfig
from ted_ds.config.student_section import InitConfig
from ted_ds.config.tasks import KINDS
from ted_ds.data.tokenizers import Tokenizer
from ted_ds.errors import ModelError
from ted_ds.job.files import empty_folder, write_atomically
from ted_ds.job.world import World, logger
from ted_ds.models.channels import Measurements
from ted_ds.models.cut_plan import CutPlan, plan_cut
from ted_ds.models.cut_tensors import Cut
from ted_ds.models.fit import check_fit, check_ids, check_outputs
from ted_ds.models.loading import meta_model
from ted_ds.models.probe import probe, probe_cut
from ted_ds.models.pruning import check_cut, init_student
from ted_ds.models.published import is_published, unpack_published
from ted_ds.models.task_head import label_fields, start_from_pretrained
from ted_ds.models.weight_check import check_weights
from ted_ds.models.weight_files import add_weights
from ted_ds.pipeline.block_choice import BlockChoice, choose_blocks, read_choice, write_choice
from ted_ds.pipeline.budget import Shape, choose_shape, read_shape, shapes_within, write_shapes
from ted_ds.pipeline.calibration import Calibration
from ted_ds.tasks.registry import TASK_CLASSES, open_data
from ted_ds.teacher.fingerprints import weights_fingerprint
from ted_ds.teacher.hosting import load_frozen

MODELS = "models.json"
"""In a run's folder: the fingerprints of the models that it was given."""

CALIBRATION, WIDTH, CORRECTED = "calibration", "width.safetensors", "corrected"
"""In a run's folder: what the teacher's reading of a sample found; in it the file of what decides on the width, and
tensors of the student for `init_student`."""


@dataclass(frozen=True)
class ModelPaths:
    """Where the run's models are, folders or hub ids.

    published: side ("teacher", "student") -> folder of filters that came with a checkpoint in the layout of the
    paper's authors. kept: the teacher's blocks that the student was cut from; None if it was not. rotation: the file of
    the `Measurements` whose basis its hidden states have; None if they were not rotated.
    """

    student: str
    teacher: str | None
    published: dict[str, Path] = field(default_factory=dict)
    kept: tuple[int, ...] | None = None
    rotation: Path | None = None


def ensure_models(
    run: RunConfig, tokenizer: Tokenizer, world: World, origin: tuple[int, ...] | None = None
) -> ModelPaths:
    """The initial student, made in Stage 0 if need be, and the teacher; a collective.

    origin: of `student.init.model`, if it was cut from the teacher: the number that each of its blocks has there.
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

    def whole(side: str, path: str, trusted: bool) -> str:
        world.on_main(lambda: check_weights(side, path, run.spec.kind, trust_remote_code=trusted))
        world.on_main(lambda: _same_weights(run.output_dir / MODELS, side, path))
        return path

    teacher = (
        whole("teacher", plain("teacher", run.teacher.model), run.teacher.trust_remote_code)
        if run.teacher is not None and run.uses_teacher
        else None
    )
    if run.student.model is not None and not run.student.init_from_pretrained:
        student = whole("student", plain("student", run.student.model), run.student.trust_remote_code)
        return ModelPaths(student, teacher, published)
    folder = run.output_dir / "initial_student"
    init = run.student.init
    if init is None:
        make = partial(_from_pretrained, run, tokenizer)
    elif init.config is not None:
        make = partial(_at_random, run, init, tokenizer)
    else:
        assert teacher is not None and run.teacher is not None
        source, trusted = teacher, run.teacher.trust_remote_code
        if init.model is not None:
            trusted = run.student.trust_remote_code
            source = whole("student.init.model", init.model, trusted)
        models = ModelPaths(str(folder), teacher, published)
        return _cut_out(run, tokenizer, world, models, source, trusted, origin)
    world.on_main(lambda: None if folder.exists() else make(folder))
    return ModelPaths(str(folder), teacher, published)


def _cut_out(
    run: RunConfig,
    tokenizer: Tokenizer,
    world: World,
    models: ModelPaths,
    source: str,
    trusted: bool,
    origin: tuple[int, ...] | None,
) -> ModelPaths:
    """The models, once the student is cut out of `source` if it is not there; a collective. origin: `ensure_models`."""
    init, folder, width = run.student.init, Path(models.student), run.output_dir / CALIBRATION / WIDTH
    assert init is not None
    # an earlier version cut the width without data: a student that is there stays
    if init.chooses_blocks or (init.is_narrower and not world.on_main(folder.exists)):
        init = _calibrated(run, tokenizer, source, trusted, init, world)
    world.on_main(lambda: None if folder.exists() else _cut(run, source, trusted, init, folder))
    plan = plan_cut(source, init, run.spec.kind, trusted)
    if init.model is None:
        origin = tuple(range(plan.total))
    if origin is None:
        return models
    rotated = world.on_main(lambda: width.exists() and Measurements.load(width).basis is not None)
    kept = tuple(origin[block] for block in plan.blocks)
    return replace(models, kept=kept, rotation=width if rotated else None)


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


def _from_pretrained(run: RunConfig, tokenizer: Tokenizer, folder: Path) -> None:
    """A pre-trained model with a fresh head; on one rank."""
    logger.info("Stage 0: initial student -> %s", folder)
    student = run.student
    assert student.pretrained is not None
    trusted = student.trust_remote_code
    check_weights("student", student.pretrained, run.spec.kind, trust_remote_code=trusted, new_head=True)
    start_from_pretrained(
        student.pretrained, run.spec, folder, tokenizer=tokenizer, seed=run.seed, trust_remote_code=trusted
    )


def _at_random(run: RunConfig, init: InitConfig, tokenizer: Tokenizer, folder: Path) -> None:
    logger.info("Stage 0: initial student -> %s", folder)
    trusted = run.teacher.trust_remote_code if run.teacher else False
    kind, fields = run.spec.kind, _defaults(run, tokenizer)
    init_student(None, init, folder, kind=kind, seed=run.seed, defaults=fields, trust_remote_code=trusted)
    tokenizer.save(folder)


def _cut(run: RunConfig, teacher: str, trusted: bool, init: InitConfig, folder: Path) -> None:
    logger.info("Stage 0: initial student -> %s", folder)
    probe_cut(teacher, init, run.spec.kind, trust_remote_code=trusted)
    path, better = run.output_dir / CALIBRATION / WIDTH, run.output_dir / CALIBRATION / CORRECTED
    measured, corrected = Measurements.load(path) if path.exists() else None, better if better.exists() else None
    kind = run.spec.kind
    init_student(teacher, init, folder, kind=kind, trust_remote_code=trusted, measured=measured, corrected=corrected)


def _calibrated(
    run: RunConfig, tokenizer: Tokenizer, teacher: str, trusted: bool, init: InitConfig, world: World
) -> InitConfig:
    """The cut as the teacher's reading of a sample decides on it; a collective.

    What it found is written to the run's folder, and taken from there at the next start.
    """
    folder, kind = run.output_dir / CALIBRATION, run.spec.kind
    if not world.on_main(folder.exists):
        shapes = []
        if init.parameters is not None:
            shapes = world.on_main(lambda: shapes_within(teacher, init, kind, trusted))
        example = shapes[-1].cut(init) if shapes else init.unmeasured()
        world.on_main(lambda: _check_cut(run, teacher, example, trusted))
        rows = _check_model(run, "teacher", teacher, trusted, tokenizer, world, layers=False)
        data = open_data(run, world, tokenizer, rows)
        world.on_main(lambda: check_ids(tokenizer, rows, data.splits))
        logger.info("Stage 0: the teacher reads a sample -> %s", folder)
        frozen = load_frozen(run, world, teacher, task=data.task, tokenizer=tokenizer, trust_remote_code=trusted)
        calibration = Calibration.of(run, world, data, frozen, init.calibration_tokens)
        width = None
        if shapes:
            shapes, choice, width = choose_shape(shapes, init, calibration, world, teacher, kind, trusted)
            cut = shapes[0].cut(init)
        else:
            choice = choose_blocks(init, calibration)
            cut = init.with_blocks(choice.kept)
        temporary = world.on_main(lambda: empty_folder(folder.with_name(f"{CALIBRATION}.tmp")))
        if cut.is_narrower:
            plan = plan_cut(teacher, cut, kind, trusted)
            if width is None:
                width = calibration.measure(plan.roles, choice.rounds[-1].left_out)
            _correct(plan, teacher, width, calibration, choice.rounds[-1].left_out, world, temporary / CORRECTED)
        frozen.close()
        del frozen, calibration
        gc.collect()  # hooks and modules refer to each other: the next model must not find this one in memory
        world.on_main(lambda: _write_calibration(folder, temporary, choice, width, shapes))
    if init.parameters is not None:
        return world.on_main(lambda: read_shape(folder)).cut(init)
    return init.with_blocks(world.on_main(lambda: read_choice(folder)))


def _check_cut(run: RunConfig, teacher: str, init: InitConfig, trusted: bool) -> None:
    """Before hours of reading: whether a cut of these sizes can be; on one rank."""
    probe_cut(teacher, init, run.spec.kind, trust_remote_code=trusted)
    plan = check_cut(teacher, init, run.spec.kind, trusted)
    if plan.roles is None and init.hidden_size is not None:
        logger.info("a %s cannot be rotated: its width is cut by channels", plan.student.config.model_type)


def _correct(
    plan: CutPlan,
    teacher: str,
    measured: Measurements,
    calibration: Calibration,
    left_out: Collection[int],
    world: World,
    folder: Path,
) -> None:
    """Writes into `folder` the student's matrices that read less than the teacher's, corrected for it; a collective."""
    on_main: list[Cut] = []  # only there the teacher's files are read

    def sites() -> dict[str, int]:
        on_main.append(Cut(plan, teacher, measured))
        return on_main[0].sites()

    def write(number: int, moments: Mapping[str, torch.Tensor]) -> None:
        student = on_main[0]
        tensors = {name: student.tensor(name, moments[site]) for site in moments for name in student.readers[site]}
        add_weights(folder, f"{number:05}.safetensors", tensors)

    for number, moments in enumerate(calibration.moments(plan.roles, left_out, world.on_main(sites))):
        world.on_main(partial(write, number, moments))


def _write_calibration(
    folder: Path, temporary: Path, choice: BlockChoice, width: Measurements | None, shapes: Sequence[Shape]
) -> None:
    if shapes:
        write_shapes(shapes, temporary)
    write_choice(choice, temporary)
    if width is not None:
        width.save(temporary / WIDTH)
    temporary.rename(folder)


def _defaults(run: RunConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """What the config of a random start need not say."""
    padding = {"pad_token_id": tokenizer.pad_id} if KINDS[run.spec.kind].padded else {}
    return {"vocab_size": tokenizer.vocab_size, **padding, **label_fields(run.spec)}


def check_models(run: RunConfig, models: ModelPaths, tokenizer: Tokenizer, world: World) -> int:
    """The fewest vocabulary rows of teacher and student; a collective.

    Raises ModelError if one of them does not fit task and data, or its family behaves differently from what
    ted_ds assumes, by their configs alone.
    """
    layers = bool(run.loss.mse_alpha)
    sides = [("student", models.student, run.student.trust_remote_code)]
    if run.teacher is not None and models.teacher is not None:
        sides.append(("teacher", models.teacher, run.teacher.trust_remote_code))
    if METHODS[run.method].learns_filters:
        for role, path, trusted in sides:
            if role not in models.published:
                config = meta_model(path, run.spec.kind, trust_remote_code=trusted).config
                TASK_CLASSES[run.spec.kind].check_stage1(config)
    return min(_check_model(run, *side, tokenizer, world, layers=layers) for side in sides)


def _check_model(
    run: RunConfig, role: str, path: str, trusted: bool, tokenizer: Tokenizer, world: World, *, layers: bool
) -> int:
    """The vocabulary rows of one of them."""
    model = meta_model(path, run.spec.kind, trust_remote_code=trusted)
    check_outputs(role, path, model, run.spec)
    # what Stage 0 made has the run's own tokenizer; the tokenizer of any other folder is trusted by its own section
    trusted = trusted or (run.data.trust_remote_code and Path(path).is_relative_to(run.output_dir))
    length = run.data.sequence_length
    rows = check_fit(role, path, model, run.spec.kind, tokenizer, length, trust_remote_code=trusted)
    world.on_main(partial(probe, role, path, model, run.spec.kind, layers=layers))
    return rows
