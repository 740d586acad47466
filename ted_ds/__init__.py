"""ted_ds: task-aware layer-wise distillation (arXiv 2210.01351) of large language models on DeepSpeed.

Names are imported when first used, so that `import ted_ds` costs nothing and reading a recipe needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "RunConfig": "ted_ds.config.schema",
    "load_config": "ted_ds.config.load",
    "dump_config": "ted_ds.config.load",
    "trained_engine_config": "ted_ds.config.deepspeed",
    "frozen_engine_config": "ted_ds.config.deepspeed",
    "Batch": "ted_ds.batch",
    "BatchCounts": "ted_ds.batch",
    "find_blocks": "ted_ds.models.structure",
    "find_structure": "ted_ds.models.structure",
    "resolve_layer_map": "ted_ds.models.layer_map",
    "init_student": "ted_ds.models.pruning",
    "Filter": "ted_ds.models.filters",
    "FilterPlan": "ted_ds.models.filters",
    "HiddenStateCollector": "ted_ds.teacher.collector",
    "FilterLearner": "ted_ds.distill.filter_learner",
    "FrozenModule": "ted_ds.teacher.frozen",
    "FrozenModel": "ted_ds.teacher.frozen",
    "DistillationModel": "ted_ds.distill.distillation_model",
    "LossConfig": "ted_ds.config.sections",
    "CausalLM": "ted_ds.tasks.causal_lm",
    "Classification": "ted_ds.tasks.classification",
    "Regression": "ted_ds.tasks.classification",
    "QuestionAnswering": "ted_ds.tasks.question_answering",
    "Teacher": "ted_ds.teacher.contract",
    "CachedTeacher": "ted_ds.teacher.recorded",
    "Head": "ted_ds.ops",
    "TopK": "ted_ds.ops",
    "teacher_top_k": "ted_ds.ops",
    "linear_cross_entropy_kl": "ted_ds.ops",
    "linear_squared_error": "ted_ds.ops",
    "token_scores": "ted_ds.ops",
    "load_model": "ted_ds.models.loading",
    "host_frozen": "ted_ds.teacher.hosting",
    "build_trained_engine": "ted_ds.distill.engine",
    "train_step": "ted_ds.pipeline.step",
    "choose_engines": "ted_ds.doctor.engines",
    "run_recipe": "ted_ds.pipeline.run",
    "TedError": "ted_ds.errors",
    "ConfigError": "ted_ds.errors",
    "DataError": "ted_ds.errors",
    "ModelError": "ted_ds.errors",
    "CheckpointError": "ted_ds.errors",
    "TrainingError": "ted_ds.errors",
}
"""Public name -> the module that defines it."""

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
