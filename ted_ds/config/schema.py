"""A whole recipe, and the rules across its sections; as written (`RunConfig`) and as stages read it (`ResolvedRun`)."""

from __future__ import annotations

import difflib
import math
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    Field,
    ModelWrapValidatorHandler,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)

from ted_ds.config.choices import LAYER_LOSSES, METHODS, Method
from ted_ds.config.data_section import DataConfig
from ted_ds.config.sections import (
    FiltersConfig,
    LoggingConfig,
    LossConfig,
    OptimizerConfig,
    Section,
    TeacherConfig,
    TrainConfig,
)
from ted_ds.config.student_section import StudentConfig
from ted_ds.config.tasks import KINDS, TASKS, TaskSpec


def _known_task(name: str) -> str:
    if name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(TASKS)}"
        raise ValueError(f"{name!r} is no task; {hint}")
    return name


TaskName = Annotated[str, AfterValidator(_known_task)]


class RunConfig(Section):
    """A whole recipe, as it is written."""

    task: TaskName = Field(default="causal-lm", description="`causal-lm`, a task of GLUE or SQuAD, or a kind of task")
    method: Method = Field(default="ted", description="which terms the loss has, and whether filters are learnt")
    output_dir: Path = Field(description="the run's folder")
    seed: NonNegativeInt = Field(default=0, description="of the order of rows, random starts and dropout")
    deepspeed: Path = Field(
        default=Path("ds_configs/zero3.json"),
        description="of the student's engine and Stage I's; auto: zero1.json or zero3.json, the first that fits",
    )
    attn_implementation: str | None = Field(
        default=None,
        description="of both models, by transformers' names: sdpa, eager, flash_attention_2, ..; null: its own choice "
        "for the family",
    )
    teacher: TeacherConfig | None = Field(default=None, description="not needed by `ce`")
    student: StudentConfig
    filters: FiltersConfig = FiltersConfig()
    loss: LossConfig
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="wrap")
    @classmethod
    def _loss_by_method(cls, recipe: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """What a recipe leaves out of the loss, or null, is that of its method and its layer loss."""
        if not isinstance(recipe, dict) or not isinstance(loss := recipe.get("loss") or {}, dict):
            return handler(recipe)
        spec = next((spec for name, spec in METHODS.items() if name == recipe.get("method", "ted")), METHODS["ce"])
        kinds = {name: layers for name, layers in LAYER_LOSSES.items() if name == loss.get("layer_loss", "rms_mse")}
        layers = next(iter(kinds.values()), LAYER_LOSSES["rms_mse"])
        defaults = {
            "kl_alpha": spec.kl_alpha,
            "mse_alpha": layers.mse_alpha if spec.layers else 0.0,
            "balance": layers.balance,
            "layer_fade": layers.layer_fade,
        }
        given = {key: value for key, value in loss.items() if value is not None or key not in defaults}
        run = handler({**recipe, "loss": defaults | given})
        run.loss.model_fields_set.difference_update(defaults.keys() - given.keys())
        return run

    @model_validator(mode="after")
    def _teacher_is_there(self) -> Self:
        if self.teacher is not None:
            return self
        if self.method != "ce":
            raise ValueError(f"method: {self.method} needs a teacher: give teacher.model, or choose method: ce")
        if self.student.init is not None and self.student.init.config is None:
            raise ValueError(
                "student.init cuts the student out of a teacher: give teacher.model, "
                "or student.init.config for a random start"
            )
        return self

    @model_validator(mode="after")
    def _loss_fits_the_method(self) -> Self:
        for name, term in (("kl_alpha", "kl_alpha"), ("mse_alpha", "layers")):
            given = getattr(self.loss, name)
            if given and not getattr(METHODS[self.method], term):
                fitting = [method for method, spec in METHODS.items() if getattr(spec, term)]
                raise ValueError(
                    f"method: {self.method} has no such term, but loss.{name} is {given:g}: "
                    f"remove loss.{name}, or choose method: {' or '.join(fitting)}"
                )
        return self

    @model_validator(mode="after")
    def _a_probe_has_what_it_compares(self) -> Self:
        if not self.loss.probe_steps:
            return self
        if not self.data.validation:
            raise ValueError("loss.probe_steps compares held-out scores: give data.validation, or remove it")
        if self.student.init is not None and self.student.init.heals_in_rounds:
            raise ValueError(
                "loss.probe_steps has no use for the rounds of student.init.blocks iterative: remove one of them"
            )
        return self

    @model_validator(mode="after")
    def _trust_a_model_s_tokenizer(self) -> Self:
        trusted = [self.student.model, self.student.pretrained] if self.student.trust_remote_code else []
        trusted += [self.teacher.model] if self.teacher is not None and self.teacher.trust_remote_code else []
        if self.data.tokenizer in trusted:
            object.__setattr__(self, "data", self.data.model_copy(update={"trust_remote_code": True}))
        return self

    @model_validator(mode="after")
    def _keys_fit_the_task(self) -> Self:
        for key in KINDS[self.spec.kind].unused_keys:
            section, name = key.split(".")
            value = getattr(self, section)
            if getattr(value, name) != type(value).model_fields[name].default:
                raise ValueError(f"task: {self.task} has no use for {key}: remove it")
        if taken := {"train", "validation"} & self.data.extra_validation.keys():
            raise ValueError(f"data.extra_validation: the name {min(taken)!r} is taken: choose another")
        if METHODS[self.method].learns_filters and self.student.init_from_pretrained:
            raise ValueError(
                f"method: {self.method} learns the student's filters on a fine-tuned student, but "
                "student.init_from_pretrained is true: remove it, or choose method: ce, kd or lwd"
            )
        if missing := self.spec.missing_keys:
            raise ValueError(f"task: {self.task} needs {missing[0]}: name them")
        return self

    @model_validator(mode="after")
    def _padding_is_not_cached(self) -> Self:
        kl_counts = self.loss.kl_alpha and KINDS[self.spec.kind].kl_over_positions
        counted = not self.loss.mask_padding and (self.loss.mse_alpha or kl_counts)
        if self.teacher is not None and self.teacher.cache is not None and counted:
            raise ValueError(
                "teacher.cache holds real tokens alone, but loss.mask_padding: false counts padding: remove one of them"
            )
        return self

    @property
    def uses_teacher(self) -> bool:
        """Whether a loss compares with the teacher, or the student is cut out of it."""
        init = self.student.init
        cut = init is not None and init.config is None
        return self.teacher is not None and bool(self.loss.kl_alpha or self.loss.mse_alpha or cut)

    @property
    def spec(self) -> TaskSpec:
        """The task, with the recipe's own columns and labels."""
        data = self.data
        return TASKS[self.task].with_columns(data.text_columns, data.label_column, data.labels)

    def resolved(self, rows: int) -> ResolvedRun:
        """The recipe for training data of `rows` rows: passes over the data are numbers of steps."""
        train = self.train
        epoch = math.ceil(rows / train.global_batch_size)
        every = {n: epoch if (v := getattr(train, n)) == "epoch" else v for n in ("evaluate_every", "save_every")}
        steps = train.num_steps(rows, train.global_batch_size)
        resolved = ResolvedTrain.model_construct(**{**dict(train), "steps": steps, **every})
        return ResolvedRun.model_construct(**{**dict(self), "train": resolved})

    @property
    def prepared_folder(self) -> Path:
        """Where the packed blocks are, or will be."""
        return self.data.prepared or self.output_dir / "data"


class ResolvedTrain(TrainConfig):
    """The section `train` once the number of rows is known."""

    steps: PositiveInt
    evaluate_every: NonNegativeInt
    save_every: NonNegativeInt


class ResolvedRun(RunConfig):
    """A recipe once the number of rows is known, see `RunConfig.resolved`."""

    train: ResolvedTrain
