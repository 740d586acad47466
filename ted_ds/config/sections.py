"""The sections of a recipe: each key with its type, unit, default and range.

Rules within a section stand here; rules across sections in `ted_ds.config.schema`, rules about the number of ranks in
`ted_ds.config.deepspeed`. Nothing here imports torch or transformers.

Runs outlive an upgrade: what an earlier version wrote is read through these classes. So a new key has a default under
which the same is computed as before, and it stands in one of the two sets of `ted_ds.config.continuation`.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Literal, Self, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from ted_ds.config.choices import BalanceKind, Divergence, Dtype, LayerLossKind, Sharding

Pair = tuple[NonNegativeInt, NonNegativeInt]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Every = NonNegativeInt | Literal["epoch"]


class Section(BaseModel):
    """Base of every section: unknown keys are refused, values cannot be assigned."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic reads it as 1, and YAML `on` and `yes` as true; false stays 0, which is off
        kind = cls.model_fields[info.field_name or ""].annotation
        kinds = {getattr(part, "__origin__", part) for part in (kind, *get_args(kind))}
        if value is True and {int, float} & kinds:
            raise PydanticCustomError("number_type", "Input should be a number, not true, on or yes")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _home_in_paths(cls, value: Any) -> Any:
        return _at_home(value)


def _at_home(value: Any) -> Any:
    """With the home folder for the `~` of a path, or of the paths of a list."""
    if isinstance(value, list | tuple):
        return [_at_home(one) for one in value]
    if isinstance(value, dict):
        return {key: _at_home(one) for key, one in value.items()}
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


T = TypeVar("T")


class Sides(Section, Generic[T]):
    """A value for each model's Stage I: {teacher: .., student: ..}, or one for both."""

    teacher: T
    student: T

    @model_validator(mode="before")
    @classmethod
    def _both(cls, value: Any) -> Any:
        return value if isinstance(value, dict | Sides) else {"teacher": value, "student": value}


class Duration(Section):
    """A number of optimizer steps, or of passes over the data; `default_steps` if a recipe gives neither."""

    section: ClassVar[str]
    default_steps: ClassVar[int]
    steps: PositiveInt | None
    epochs: PositiveFloat | None

    @model_validator(mode="before")
    @classmethod
    def _default(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("steps") is None and value.get("epochs") is None:
            return {**value, "steps": cls.default_steps}
        return value

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                f"{self.section}.steps ({self.steps}) and {self.section}.epochs ({self.epochs:g}) exclude each other: "
                "remove one"
            )
        return self

    def num_steps(self, rows: int, global_batch_size: int) -> int:
        """Optimizer steps, for training data of `rows` rows."""
        return self.steps or math.ceil((self.epochs or 0.0) * rows / global_batch_size)


class TeacherConfig(Section):
    """The frozen model that is distilled from."""

    model: str = Field(description="folder or hub id of a model of the task")
    sharding: Sharding = Field(
        default="zero3",
        description="zero3: one copy over all ranks; replicated: one on each rank; auto: replicated if it fits",
    )
    dtype: Dtype = "bfloat16"
    deepspeed: Path = Field(default=Path("ds_configs/teacher_zero3.json"), description="used by sharding zero3")
    cache: Path | None = Field(
        default=None,
        description="folder of what Stage II needs of the teacher, recorded once if it is not there, and read in the "
        "teacher's place",
    )
    trust_remote_code: bool = False


class FiltersConfig(Duration):
    """The filters of `ted`, and which blocks are pairs. `lwd` uses layer_map and nonlinear alone: its filters, on the
    student alone, are not learnt beforehand, and their F is the teacher's width.
    """

    section, default_steps = "filters", 200
    learn: Literal["auto", "always"] = Field(
        default="auto",
        description="auto: not if student.init cut the student out of the teacher and both share a basis, since learnt "
        "filters brought nothing there; method ted is then lwd",
    )
    output_dim: PositiveInt | None = Field(
        default=None,
        description="filter width F, in channels; null: the teacher's width or, if student.init cut the student's by "
        "rotation, the student's",
    )
    nonlinear: bool = Field(
        default=False, description="Linear, the model's own activation, Linear in place of one Linear"
    )
    layer_map: Literal["matched", "uniform", "last"] | Annotated[tuple[Pair, ...], Field(min_length=1)] | None = Field(
        default=None,
        description="policy, or pairs [student block, teacher block], 0-based; null: matched if student.init cuts the "
        "student out of the teacher, else uniform",
    )
    skip_last: NonNegativeInt | None = Field(
        default=None,
        description="pairs at the end of a policy's layer map that are left out; null: a tenth of them, at least one, "
        "for loss.layer_loss rms_mse and cosine, else none",
    )
    learning_rate: Sides[PositiveFloat] = Field(
        default=Sides(teacher=1e-3, student=1e-3), description="peak rate of Stage I"
    )
    steps: PositiveInt | None = Field(default=None, description="optimizer steps of Stage I; null without epochs: 200")
    epochs: PositiveFloat | None = Field(default=None, description="passes over the data, in place of steps")
    warmup_steps: Sides[NonNegativeInt] | None = Field(
        default=None, description="steps of linear warm-up; null: a tenth; the rate then falls linearly to 0"
    )
    global_batch_size: Sides[PositiveInt] | None = Field(default=None, description="rows a step; null: train's")
    head_dropout: Sides[Fraction] | None = Field(
        default=None, description="before the disposable heads' classifiers; null: each model's own"
    )
    token_fraction: float = Field(
        default=1.0, gt=0, le=1, description="share of positions that a filter sees each step (causal-lm)"
    )

    @model_validator(mode="after")
    def _a_list_is_what_it_says(self) -> Self:
        if self.skip_last is not None and isinstance(self.layer_map, tuple):
            raise ValueError(
                "filters.skip_last is of a policy, filters.layer_map is a list: leave pairs out of the list"
            )
        return self


class LossConfig(Section):
    """loss = pred_loss + kl_alpha * kl_loss + mse_alpha * layer_loss, whose weight `balance` may measure."""

    kl_alpha: NonNegativeFloat = Field(description="weight of kl_loss; null: 0 for ce, else 1")
    mse_alpha: NonNegativeFloat = Field(
        description="of lwd and ted: weight of layer_loss, or with balance: gradient its share of the gradient; null: "
        "1 with rms_mse and cosine, else 10"
    )
    temperature: PositiveFloat = Field(default=2.0, description="T of T^2 KL(softmax(z_t / T) || softmax(z_s / T))")
    divergence: Divergence = Field(
        default="forward",
        description="of the teacher's and the student's distributions; forward: KL(teacher || student)",
    )
    kl_top_k: PositiveInt | None = Field(
        default=None,
        description="the KL over the teacher's k likeliest ids and all others as one; null: over the whole vocabulary",
    )
    layer_loss: LayerLossKind = Field(
        default="rms_mse",
        description="of states normalised token by token: their MSE, or 1 - cosine; of states as they are: MSE over "
        "the mean square of the teacher's side, or the paper's raw MSE",
    )
    balance: BalanceKind = Field(
        description="gradient: the layer loss's gradient has mse_alpha times the norm of the logits', measured step by "
        "step, and a pair that opposes the logits is left out; none: mse_alpha is a constant weight; null: gradient "
        "with rms_mse and cosine, else none"
    )
    layer_fade: float = Field(
        ge=0,
        le=1,
        description="share of train.steps over which the layer loss fades out linearly, 0: it does not; null: 0.5 with "
        "rms_mse and cosine, else 0",
    )
    probe_steps: NonNegativeInt = Field(
        default=0,
        description="before Stage II, steps of two short runs, one of them by kd, whose held-out scores say whether "
        "the layer loss pays; 0: no such runs",
    )
    mask_padding: bool = Field(
        default=True,
        description="false: padding positions count in the layer loss and in a question's distributions, and "
        "DeBERTa's padding has a context of zeros, all as in the paper's code",
    )

    @model_validator(mode="after")
    def _top_k_is_forward(self) -> Self:
        if self.kl_top_k is not None and self.divergence != "forward":
            raise ValueError(
                f"loss.kl_top_k ({self.kl_top_k}) is for the forward KL, loss.divergence is {self.divergence}: "
                "remove one of them"
            )
        return self


class OptimizerConfig(Section):
    """AdamW and its schedule in Stage II."""

    learning_rate: PositiveFloat = Field(default=5e-4, description="peak rate")
    weight_decay: NonNegativeFloat = Field(default=0.1, description="of matrices; norms and biases do not decay")
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    epsilon: PositiveFloat = 1e-8
    warmup_steps: NonNegativeInt = Field(default=100, description="optimizer steps of linear warm-up")
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final_ratio: float = Field(default=0.1, ge=0, le=1, description="rate after the last step, as a share of the peak")
    gradient_clipping: NonNegativeFloat = Field(default=1.0, description="largest global gradient norm; 0: no clipping")


class TrainConfig(Duration):
    """How long, how much a step, how often to look and to save."""

    section, default_steps = "train", 1000
    steps: PositiveInt | None = Field(default=None, description="optimizer steps; null without epochs: 1000")
    epochs: PositiveFloat | None = Field(default=None, description="passes over the data, in place of steps")
    global_batch_size: PositiveInt = Field(default=64, description="rows a step over all ranks")
    micro_batch_size: PositiveInt = Field(default=4, description="rows per rank per forward")
    evaluate_every: Every = Field(default=200, description="steps, or epoch; 0: only at the end")
    save_every: Every = Field(default=200, description="steps, or epoch; 0: only at the end")
    keep_last: PositiveInt = Field(default=2, description="checkpoints; the best one by the held-out score stays too")
    keep_every: NonNegativeInt = Field(default=0, description="checkpoints of every so many steps stay; 0: none does")
    max_skipped_steps: NonNegativeInt = Field(
        default=5, description="steps left out because a loss or gradient was not finite, before the run gives up"
    )
    max_minutes: PositiveFloat | None = Field(
        default=None, description="of a start: then it saves and ends with exit code 75; null: no limit"
    )
    timeout_minutes: PositiveFloat = Field(
        default=30.0, description="that a collective waits for a rank before the run ends with exit code 76"
    )


class LoggingConfig(Section):
    """metrics.jsonl, the progress bar, TensorBoard."""

    every: PositiveInt = Field(default=10, description="steps a logged line")
    tensorboard: bool = True
