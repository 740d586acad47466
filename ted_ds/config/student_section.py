"""The sections `student` and `student.init` of a recipe: the model that is trained, and Stage 0."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt, model_validator

from ted_ds.config.choices import Dtype, Measured
from ted_ds.config.sections import Fraction, Section


def _default(section: type[Section], name: str) -> Any:
    return section.model_fields[name].default


WIDTH_KEYS = ("hidden_size", "num_heads", "intermediate_size")


def _number(value: Any) -> Any:
    """70M and 1.5B as numbers."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB])", value) if isinstance(value, str) else None
    return value if found is None else round(float(found[1]) * {"K": 1e3, "M": 1e6, "B": 1e9}[found[2]])


class InitConfig(Section):
    """Stage 0: the student cut out of the teacher, or (`config`) made at random. A size left out is kept."""

    model: str | None = Field(
        default=None, description="folder or hub id of another model to cut the student out of; null: the teacher"
    )
    blocks: Measured | Literal["uniform", "first", "last"] | tuple[NonNegativeInt, ...] = Field(
        default="greedy",
        description="which of the teacher's blocks stay, by policy or by 0-based index; greedy: those without which a "
        "sample of the training data has the least loss, left out one by one; influence: those that change hidden "
        "states most; iterative: as greedy, with a short distillation whenever round_blocks of them are out",
    )
    num_blocks: PositiveInt | None = Field(default=None, description="number of blocks that a policy keeps")
    parameters: Annotated[PositiveInt, BeforeValidator(_number)] | None = Field(
        default=None,
        description="in place of sizes: a budget, such as 70M or 1.5B; the sample decides on blocks, width and FFN "
        "units",
    )
    calibration_tokens: PositiveInt = Field(
        default=4096, description="size of the sample, in rows of data.sequence_length, that greedy and influence read"
    )
    round_blocks: PositiveInt = Field(default=2, description="iterative: blocks that a round leaves out")
    round_steps: PositiveInt = Field(
        default=100,
        description="iterative: optimizer steps of a round's distillation, by the recipe's losses of logits",
    )
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
            others = {n: v for n, v in self if n != "config" and v != _default(type(self), n)}
            if others:
                given = ", ".join(f"{name}: {value}" for name, value in others.items())
                raise ValueError(f"`config` (a random start) and {given} (a cut of the teacher) exclude each other")
            if "model_type" not in self.config:
                raise ValueError("`config` lacks `model_type`, e.g. {model_type: llama, hidden_size: 192}")
        sizes = [n for n in ("num_blocks", *WIDTH_KEYS) if getattr(self, n) is not None]
        if self.parameters is not None and (sizes or self.blocks not in ("greedy", "influence")):
            given = f"{sizes[0]}: {getattr(self, sizes[0])}" if sizes else f"blocks: {self.blocks}"
            raise ValueError(
                f"`parameters` looks for the sizes and blocks itself, {given} is given: remove one of them"
            )
        rounds = {n: v for n in ("round_blocks", "round_steps") if (v := getattr(self, n)) != _default(type(self), n)}
        if rounds and self.blocks != "iterative":
            raise ValueError(
                f"{next(iter(rounds))} is for blocks: iterative, blocks is {self.blocks}: remove one of them"
            )
        if isinstance(self.blocks, tuple):
            if not self.blocks or len(set(self.blocks)) < len(self.blocks):
                raise ValueError(f"blocks {list(self.blocks)} must name at least one block, and none twice")
            if self.num_blocks not in (None, len(self.blocks)):
                raise ValueError(
                    f"blocks {list(self.blocks)} are {len(self.blocks)}, num_blocks is {self.num_blocks}: "
                    "remove num_blocks"
                )
        return self

    @property
    def heals_in_rounds(self) -> bool:
        """Whether short distillations come between the removals of blocks."""
        return self.num_blocks is not None and self.blocks == "iterative"

    @property
    def is_narrower(self) -> bool:
        """Whether a size of the width is given."""
        return any(getattr(self, name) is not None for name in WIDTH_KEYS)

    @property
    def chooses_blocks(self) -> bool:
        """Whether data decide which of the teacher's blocks stay."""
        return (self.num_blocks or self.parameters) is not None and self.blocks in get_args(Measured)

    def unmeasured(self) -> Self:
        """A cut of the same sizes whose blocks need no data."""
        return self.model_copy(update={"blocks": "uniform"}) if self.chooses_blocks else self

    def with_blocks(self, blocks: tuple[int, ...]) -> Self:
        """A cut of the same sizes with these blocks."""
        return self.model_copy(update={"blocks": blocks, "num_blocks": None})


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
