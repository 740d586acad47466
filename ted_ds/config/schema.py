"""A recipe as a tree of frozen models: every knob with its unit, default and range.

Rules within a section live in the section, rules across sections in `RunConfig`, rules about the number of
ranks in `ted_ds.config.deepspeed`. Importing this module imports neither torch nor transformers.

Runs outlive an upgrade: what an earlier version wrote is read through this schema. So a new key has a default, under
which is computed what was computed before there was the key, and it stands in one of the two sets of
`ted_ds.config.continuation`, by whether it decides the result.
"""

from __future__ import annotations

import difflib
import math
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, Self, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PlainSerializer,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from ted_ds.config.tasks import TASKS, TaskSpec

Method = Literal["ce", "kd", "lwd", "ted"]
Dtype = Literal["float32", "bfloat16"]
Sharding = Literal["zero3", "replicated"]
Pair = tuple[NonNegativeInt, NonNegativeInt]
Fraction = Annotated[float, Field(ge=0, lt=1)]

LOSS_WEIGHTS: dict[Method, tuple[float, float]] = {
    "ce": (0.0, 0.0),
    "kd": (1.0, 0.0),
    "lwd": (1.0, 10.0),
    "ted": (1.0, 10.0),
}
"""Method -> default (kl_alpha, mse_alpha)."""


def _null_passes(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    return None if value is None else check(value)


LossWeight = Annotated[float, Field(ge=0), WrapValidator(_null_passes)]
"""A weight of the loss: null until `RunConfig` resolves it, but typed as what its readers see."""

_AsIs = PlainSerializer(lambda value: value)
"""Written as it stands: pydantic would warn of a null or a word where the type says a number."""

Steps = Annotated[int, Field(gt=0), WrapValidator(_null_passes), _AsIs]
"""A number of steps: null where epochs are given, until the data is known; typed as what its readers see."""


def _epoch_passes(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    return value if value == EPOCH else check(value)


EPOCH = "epoch"

Every = Annotated[int, Field(ge=0), WrapValidator(_epoch_passes), _AsIs]
"""A number of steps or "epoch", until the data is known; typed as what its readers see."""


def _known_task(name: str) -> str:
    if name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(TASKS)}"
        raise ValueError(f"{name!r} is no task; {hint}")
    return name


TaskName = Annotated[str, AfterValidator(_known_task)]


def _as_sequence(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


def _distinct(labels: tuple[str, ...] | None) -> tuple[str, ...] | None:
    bare = [label.strip() for label in labels or ()]  # as the data's are read
    if twice := next((label for label in bare if bare.count(label) > 1), None):
        raise ValueError(f"data.labels has {twice!r} twice: name each label once")
    return labels


class Section(BaseModel):
    """Base of every section: unknown keys are refused, values cannot be assigned."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic reads it as 1, and YAML `on` and `yes` as true; false stays 0, which is off
        kind = cls.model_fields[info.field_name or ""].annotation
        kinds = {getattr(part, "__origin__", part) for part in (kind, *get_args(kind))}
        if value is True and {int, float} & kinds:
            raise PydanticCustomError("number_type", "Input should be a number, not true, on or yes")
        return value


T = TypeVar("T")


class Sides(Section, Generic[T]):
    """A value for each model's Stage I: {teacher: .., student: ..}, or one for both."""

    teacher: T
    student: T

    @model_validator(mode="before")
    @classmethod
    def _both(cls, value: Any) -> Any:
        return value if isinstance(value, dict | Sides) else {"teacher": value, "student": value}


class TeacherConfig(Section):
    """The frozen model that is distilled from."""

    model: str = Field(description="folder or hub id of a model of the task")
    sharding: Sharding = Field(default="zero3", description="zero3: one copy over all ranks; replicated: a copy a rank")
    dtype: Dtype = "bfloat16"
    deepspeed: Path = Field(default=Path("ds_configs/teacher_zero3.json"), description="used by sharding zero3")
    cache: Path | None = Field(
        default=None,
        description="folder of what Stage II needs of the teacher, recorded once if it is not there, and read in the "
        "teacher's place",
    )
    trust_remote_code: bool = False


class InitConfig(Section):
    """Stage 0: the student cut out of the teacher, or (`config`) made at random. A size left out is kept."""

    blocks: Literal["uniform", "first", "last"] | tuple[NonNegativeInt, ...] = Field(
        default="uniform", description="which of the teacher's blocks stay, by policy or by 0-based index"
    )
    num_blocks: PositiveInt | None = Field(default=None, description="number of blocks that a policy keeps")
    hidden_size: PositiveInt | None = Field(default=None, description="width D, in channels")
    num_heads: PositiveInt | None = Field(default=None, description="attention (query) heads a block")
    intermediate_size: PositiveInt | None = Field(default=None, description="FFN units a block")
    config: dict[str, Any] | None = Field(
        default=None,
        description="a transformers config, e.g. {model_type: llama, hidden_size: 192}, for a random start",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.config is not None:
            others = {n: v for n, v in self if n != "config" and v != type(self).model_fields[n].default}
            if others:
                given = ", ".join(f"{name}: {value}" for name, value in others.items())
                raise ValueError(f"`config` (a random start) and {given} (a cut of the teacher) exclude each other")
            if "model_type" not in self.config:
                raise ValueError("`config` lacks `model_type`, e.g. {model_type: llama, hidden_size: 192}")
        if isinstance(self.blocks, tuple):
            if not self.blocks or len(set(self.blocks)) < len(self.blocks):
                raise ValueError(f"blocks {list(self.blocks)} must name at least one block, and none twice")
            if self.num_blocks not in (None, len(self.blocks)):
                raise ValueError(
                    f"blocks {list(self.blocks)} are {len(self.blocks)}, num_blocks is {self.num_blocks}: "
                    "remove num_blocks"
                )
        return self


class StudentConfig(Section):
    """The model that is trained: a checkpoint (`model`) or made in Stage 0 (`init`, `pretrained`)."""

    model: str | None = Field(
        default=None, description="folder or hub id of a causal LM or, for other tasks, of a model fine-tuned on it"
    )
    init: InitConfig | None = None
    pretrained: str | None = Field(
        default=None, description="folder or hub id of the model before fine-tuning, for init_from_pretrained"
    )
    init_from_pretrained: bool = Field(
        default=False, description="start from `pretrained` with a fresh task head, in place of `model`"
    )
    dtype: Dtype = Field(default="bfloat16", description="of forward and backward; the optimizer's copy is float32")
    activation_checkpointing: bool = Field(
        default=False, description="recompute blocks in backward: less memory, more time"
    )
    dropout: Fraction | None = Field(default=0.0, description="set on every dropout; null keeps the checkpoint's")
    head_dropout: Fraction | None = Field(
        default=None, description="before the task head (cls_dropout, classifier_dropout); null: as `dropout` says"
    )
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.init_from_pretrained:
            if self.pretrained is None:
                raise ValueError("student.init_from_pretrained needs student.pretrained: give its folder or hub id")
            if self.init is not None:
                raise ValueError("student.init and student.init_from_pretrained exclude each other: remove one")
        elif (self.model is None) == (self.init is None):
            found = "neither is" if self.model is None else "both are"
            raise ValueError(f"exactly one of student.model and student.init must be given, {found}")
        return self


class FiltersConfig(Section):
    """The filters of `ted`, and where pairs lie. Of it all `lwd` uses layer_map and nonlinear: its filters, on the
    student alone, are not learnt beforehand, and their F is the teacher's width.
    """

    output_dim: PositiveInt | None = Field(
        default=None, description="filter width F, in channels; null: the teacher's width"
    )
    nonlinear: bool = Field(
        default=False, description="Linear, the model's own activation, Linear in place of one Linear"
    )
    layer_map: Literal["uniform", "last"] | Annotated[tuple[Pair, ...], Field(min_length=1)] = Field(
        default="uniform", description="policy, or pairs [student block, teacher block], 0-based"
    )
    learning_rate: Sides[PositiveFloat] = Field(
        default=Sides(teacher=1e-3, student=1e-3), description="peak rate of Stage I"
    )
    steps: Steps = Field(default=None, validate_default=True, description="optimizer steps of Stage I; null: 200")
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
    def _length(self) -> Self:
        _resolve_length(self, "filters", default=200)
        return self


class LossConfig(Section):
    """loss = pred_loss + kl_alpha * kl_loss + mse_alpha * layer_loss."""

    kl_alpha: LossWeight = Field(default=None, validate_default=True, description="null: by method, see LOSS_WEIGHTS")
    mse_alpha: LossWeight = Field(default=None, validate_default=True, description="null: by method, see LOSS_WEIGHTS")
    temperature: PositiveFloat = Field(default=2.0, description="T of T^2 KL(softmax(z_t / T) || softmax(z_s / T))")
    divergence: Literal["forward", "reverse", "jensen-shannon"] = Field(
        default="forward",
        description="of the teacher's and the student's distributions; forward: KL(teacher || student)",
    )
    kl_top_k: PositiveInt | None = Field(
        default=None,
        description="the KL over the teacher's k likeliest ids and all others as one; null: over the whole vocabulary",
    )
    layer_loss: Literal["normalized_mse", "mse"] = Field(
        default="normalized_mse",
        description="MSE over the mean square of the teacher's side, or the paper's raw MSE",
    )
    residual_dtype: Literal["same", "bfloat16", "float8"] = Field(
        default="same",
        description="in which a pair's residual [tokens, F] waits for backward: as computed, or rounded to save memory",
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


class HubDataset(Section):
    """A data set that `datasets.load_dataset` loads."""

    hub: str = Field(description="ORGANISATION/NAME")
    name: str | None = Field(default=None, description="the data set's configuration")
    split: str = "train"
    streaming: bool = Field(default=False, description="read while downloading, keep nothing on disk")


DataEntries = Annotated[tuple[str | HubDataset, ...], BeforeValidator(_as_sequence)]
"""Paths and globs of text, JSONL, CSV, TSV and Parquet files, and hub data sets; a single one needs no list."""


class DataConfig(Section):
    """Documents or labelled rows, their tokenizer, and where what is made of them is kept."""

    train: DataEntries = Field(min_length=1)
    validation: DataEntries = Field(default=(), description="held-out data; empty: no evaluation")
    extra_validation: dict[str, DataEntries] = Field(
        default={}, description="name -> more held-out data, scored once, by the best weights (MNLI's mismatched set)"
    )
    text_column: str = Field(default="text", description="of JSONL, CSV, TSV, Parquet and hub data (causal-lm)")
    text_columns: tuple[str, ...] | None = Field(
        default=None, min_length=1, max_length=2, description="one or two; null: the task's own"
    )
    label_column: str | None = Field(default=None, description="null: the task's own")
    labels: Annotated[tuple[str, ...] | None, AfterValidator(_distinct)] = Field(
        default=None, min_length=2, description="their order numbers them; null: the task's own"
    )
    skip_bad_rows: bool = Field(
        default=False, description="rows that cannot be used are left out and counted; false: they end the run"
    )
    tokenizer: str = Field(description="folder or hub id for AutoTokenizer, or a SentencePiece .model file")
    trust_remote_code: bool = Field(
        default=False,
        description="run the tokenizer's own code; true if `tokenizer` is a model whose section says so",
    )
    sequence_length: PositiveInt = Field(
        default=1024, description="tokens a row (S); other tasks than causal-lm: at most, longer texts are cut"
    )
    doc_stride: PositiveInt = Field(
        default=128, description="tokens that neighbouring windows of a long context share (question answering)"
    )
    prepared: Path | None = Field(default=None, description="folder of the tokenized data; null: OUTPUT_DIR/data")
    processes: PositiveInt | None = Field(default=None, description="that tokenize; null: one a core")
    train_tokenizer: PositiveInt | None = Field(
        default=None,
        description="vocabulary size of a tokenizer to train into `tokenizer` if that is not there: SentencePiece, "
        "for other tasks than causal-lm WordPiece",
    )


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


class TrainConfig(Section):
    """How long, how much a step, how often to look and to save."""

    steps: Steps = Field(default=None, validate_default=True, description="optimizer steps; null: 1000")
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

    @model_validator(mode="after")
    def _length(self) -> Self:
        _resolve_length(self, "train", default=1000)
        return self


class LoggingConfig(Section):
    """metrics.jsonl, the progress bar, TensorBoard."""

    every: PositiveInt = Field(default=10, description="steps a logged line")
    tensorboard: bool = True


def _resolve_length(section: TrainConfig | FiltersConfig, name: str, *, default: int) -> None:
    """Steps or epochs, not both; neither means `default` steps."""
    if section.steps is not None and section.epochs is not None:
        raise ValueError(
            f"{name}.steps ({section.steps}) and {name}.epochs ({section.epochs:g}) exclude each other: remove one"
        )
    if section.steps is None and section.epochs is None:
        object.__setattr__(section, "steps", default)


OWN_COLUMNS = ("data.text_columns", "data.label_column", "data.labels")

LABELLED_ALONE = (
    *OWN_COLUMNS,
    *("student.pretrained", "student.init_from_pretrained", "student.head_dropout"),
    *("filters.head_dropout", "data.extra_validation", "data.doc_stride", "loss.mask_padding"),
)
"""Keys that a causal LM has no use for."""

LM_ALONE = (
    *("filters.token_fraction", "data.text_column", "data.processes"),
    *("loss.divergence", "loss.kl_top_k"),
)
"""Keys that labelled data has no use for."""


class RunConfig(Section):
    """A whole recipe. `loss.kl_alpha` and `loss.mse_alpha` always hold numbers here, resolved by `method`."""

    task: TaskName = "causal-lm"
    method: Method = "ted"
    output_dir: Path
    seed: NonNegativeInt = 0
    deepspeed: Path = Field(default=Path("ds_configs/zero3.json"), description="of the student's engine and Stage I's")
    teacher: TeacherConfig | None = None
    student: StudentConfig
    filters: FiltersConfig = FiltersConfig()
    loss: LossConfig = LossConfig()
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    logging: LoggingConfig = LoggingConfig()

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
    def _resolve_loss(self) -> Self:
        weights = dict(zip(("kl_alpha", "mse_alpha"), LOSS_WEIGHTS[self.method], strict=True))
        for name, default in weights.items():
            given = getattr(self.loss, name)
            if given and not default:
                fitting = [m for m, alphas in LOSS_WEIGHTS.items() if alphas[name == "mse_alpha"]]
                raise ValueError(
                    f"method: {self.method} has no such term, but loss.{name} is {given:g}: "
                    f"remove loss.{name}, or choose method: {' or '.join(fitting)}"
                )
            weights[name] = default if given is None else given
        # pydantic refuses assignment to a frozen model, also by its own validators
        object.__setattr__(self, "loss", self.loss.model_copy(update=weights))
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
        lm, kind = self.task == "causal-lm", self.spec.kind
        useless = LABELLED_ALONE if lm else LM_ALONE
        if kind == "question-answering":
            useless = (*useless, *OWN_COLUMNS)
        for key in useless:
            section, name = key.split(".")
            value = getattr(self, section)
            if getattr(value, name) != type(value).model_fields[name].default:
                raise ValueError(f"task: {self.task} has no use for {key}: remove it")
        if taken := {"train", "validation"} & self.data.extra_validation.keys():
            raise ValueError(f"data.extra_validation: the name {min(taken)!r} is taken: choose another")
        if self.method == "ted" and self.student.init_from_pretrained:
            raise ValueError(
                "method: ted learns the student's filters on a fine-tuned student, but student.init_from_pretrained is "
                "true: remove it, or choose method: ce, kd or lwd"
            )
        needed = {"classification": ("text_columns", "labels"), "regression": ("text_columns",)}.get(self.task, ())
        for name in needed:
            if getattr(self.data, name) is None:
                raise ValueError(f"task: {self.task} needs data.{name}: name them")
        return self

    @model_validator(mode="after")
    def _padding_is_not_cached(self) -> Self:
        questions = self.loss.kl_alpha and self.spec.kind == "question-answering"
        counted = not self.loss.mask_padding and (self.loss.mse_alpha or questions)
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

    def resolved(self, rows: int) -> RunConfig:
        """The recipe with epochs turned into steps, for training data of `rows` rows."""
        train = self.train
        epoch = math.ceil(rows / train.global_batch_size)
        steps = train.steps if train.epochs is None else math.ceil(train.epochs * rows / train.global_batch_size)
        every = {n: epoch if (v := getattr(train, n)) == EPOCH else v for n in ("evaluate_every", "save_every")}
        return self.model_copy(update={"train": train.model_copy(update={"steps": steps, **every})})

    @property
    def prepared_folder(self) -> Path:
        """Where the packed blocks are, or will be."""
        return self.data.prepared or self.output_dir / "data"
