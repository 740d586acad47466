"""Stage I: the filters of the teacher and of the student, learnt once and kept in the run's folder."""

from __future__ import annotations

import gc
import json
import shutil
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from safetensors.torch import save_file

from ted_ds.checkpoint.store import write_atomically
from ted_ds.config.schema import RunConfig, StudentConfig, TeacherConfig
from ted_ds.distill.filter_learner import FilterLearner
from ted_ds.distill.frozen import FrozenModel
from ted_ds.distributed import World, logger, seed_everything
from ted_ds.engine.loading import meta_structure, resident_readout, whole_tensors
from ted_ds.engine.trained import build_trained_engine
from ted_ds.errors import CheckpointError
from ted_ds.models.filters import FilterPlan
from ted_ds.models.layer_map import LayerMap, resolve_layer_map
from ted_ds.models.structure import ModelStructure
from ted_ds.pretrain.data import RunData
from ted_ds.pretrain.models import load_frozen, new_filters, read_plan, trained_config
from ted_ds.telemetry.recorder import Recorder
from ted_ds.train.loop import run_steps
from ted_ds.train.schedule import learning_rate_schedule

WARMUP_SHARE = 0.1
"""Stage I warms up over this share of its steps; its rate then falls linearly to 0."""


@dataclass(frozen=True)
class PairPlan:
    """What the layer loss compares: the pairs, and each side's filters (teacher None: unfiltered, lwd)."""

    layer_map: LayerMap
    teacher: FilterPlan | None
    student: FilterPlan


def plan_pairs(run: RunConfig, student_path: str) -> PairPlan | None:
    """The plan of a run's layer loss from both models' configs alone; None where mse_alpha is 0.

    Raises ModelError where the layer map does not fit the models.
    """
    if not run.loss.mse_alpha:
        return None
    assert run.teacher is not None
    teacher, student = _structure(run.teacher.model, run.teacher), _structure(student_path, run.student)
    layer_map = resolve_layer_map(run.filters.layer_map, student.num_blocks, teacher.num_blocks)
    blocks_s, blocks_t = (tuple(pair[side] for pair in layer_map) for side in (0, 1))
    if run.method == "lwd":
        return PairPlan(layer_map, None, FilterPlan(blocks_s, student.width, teacher.width))
    output_dim = run.filters.output_dim or teacher.width
    return PairPlan(
        layer_map,
        FilterPlan(blocks_t, teacher.width, output_dim, run.filters.nonlinear),
        FilterPlan(blocks_s, student.width, output_dim, run.filters.nonlinear),
    )


def learn_filters(run: RunConfig, world: World, data: RunData, plan: PairPlan, student_path: str) -> dict[str, Path]:
    """Stage I of both sides, as far as it is not done; returns their folders (lwd learns none); a collective.

    Raises CheckpointError where a folder holds filters of another plan.
    """
    if plan.teacher is None:
        return {}
    assert run.teacher is not None
    folders = {}
    for side, path, trusted, filters in (
        ("teacher", run.teacher.model, run.teacher.trust_remote_code, plan.teacher),
        ("student", student_path, run.student.trust_remote_code, plan.student),
    ):
        folder = folders[side] = run.output_dir / f"{side}_filters"
        if not world.on_main((folder / "filters.json").exists):
            logger.info("Stage I: %s filters -> %s", side, folder)
            frozen = load_frozen(run, world, path, trust_remote_code=trusted)
            _learn(run, world, data, frozen, filters, folder, trust_remote_code=trusted)
            frozen.close()
            del frozen
            gc.collect()  # hooks and modules refer to each other: the next model must not find this one in memory
        there = world.on_main(partial(read_plan, folder))
        if there != filters:
            raise CheckpointError(
                f"{folder} holds filters of another layer map or shape ({there}, this run's {filters}): "
                "delete that folder to learn them anew"
            )
    return folders


def _structure(path: str, section: TeacherConfig | StudentConfig) -> ModelStructure:
    return meta_structure(path, trust_remote_code=section.trust_remote_code)


def _learn(
    run: RunConfig,
    world: World,
    data: RunData,
    frozen: FrozenModel,
    plan: FilterPlan,
    folder: Path,
    *,
    trust_remote_code: bool,
) -> None:
    settings, steps = run.filters, run.filters.steps
    config = trained_config(run, world, learning_rate=settings.learning_rate, weight_decay=0.0)
    seed_everything(run.seed)
    norm, head = resident_readout(frozen.module.model, world.device, trust_remote_code=trust_remote_code)
    learner = FilterLearner(
        new_filters(plan, config, run.student.dtype),
        frozen,
        plan.blocks,
        norm,
        head,
        vocab_size=data.tokenizer.vocab_size,
        token_fraction=settings.token_fraction,
        seed=run.seed,
    )
    schedule = learning_rate_schedule(
        "linear", warmup_steps=int(WARMUP_SHARE * steps), total_steps=steps, final_ratio=0.0
    )
    engine = build_trained_engine(learner, deepspeed_config=config, schedule=schedule)
    temporary = folder.with_name(folder.name + ".tmp")
    if world.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
    recorder = Recorder(
        temporary,
        title=f"Stage I {folder.name}",
        steps=steps,
        start_step=0,
        tensorboard=False,
        enabled=world.is_main,
    )
    with recorder:
        record = run_steps(
            engine,
            data.training_rows(run, world),
            world,
            recorder,
            names=("loss",),
            start=0,
            steps=steps,
            tokens_per_step=run.tokens_per_step,
            log_every=run.logging.every,
            seed=run.seed,
            step_inputs=lambda step: {"step": step},
        )
    tensors = dict(whole_tensors(learner.filters(), keep=world.is_main))

    def write() -> None:
        save_file(tensors, temporary / "filters.safetensors")
        card = {"plan": asdict(plan), "steps": steps, "losses": record["layer_losses"]}
        write_atomically(temporary / "filters.json", json.dumps(card, indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)

    world.on_main(write)
    engine.destroy()
