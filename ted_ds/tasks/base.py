"""The contract of a kind of task: all that a run asks of it, from its data to the score of a student."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ted_ds.batch import Batch, BatchCounts
from ted_ds.config.data_section import DataConfig
from ted_ds.config.schema import RunConfig
from ted_ds.config.sections import LossConfig
from ted_ds.config.tasks import TaskSpec
from ted_ds.data.encoded import EncodedRows
from ted_ds.data.loader import Rows
from ted_ds.data.manifests import Entries
from ted_ds.data.packed import PackedBlocks
from ted_ds.data.tokenizers import Tokenizer
from ted_ds.job.world import World
from ted_ds.models.filters import Filter, FilterPlan
from ted_ds.models.loading import DTYPES
from ted_ds.models.readout import Readout
from ted_ds.ops import Head


class Reading(NamedTuple):
    """What a readout makes of a batch: its output, and the LM head if the losses need its weight."""

    output: Any
    head: Head | None


class TaskLosses(NamedTuple):
    """A micro-batch's share of the global batch's terms, all scalars; `total` alone is differentiable.

    total = pred_loss + kl_alpha * kl_loss.
    """

    total: torch.Tensor
    pred_loss: torch.Tensor
    kl_loss: torch.Tensor


@dataclass(frozen=True)
class Field:
    """One recorded quantity: `width` numbers of `dtype` for each real token or, with `per_row`, for each row."""

    dtype: str
    width: int
    per_row: bool = False

    @property
    def item_bytes(self) -> int:
        """Bytes of one token or row."""
        return DTYPES[self.dtype].itemsize * self.width


class CachedOutput:
    """A way of keeping a teacher's output in a cache for the KL.

    fields: what is recorded. settings: what it was computed with, beyond the teacher. head: softcap, scale and bytes
    of the teacher's LM head, if the losses need it.
    """

    def __init__(
        self,
        fields: dict[str, Field],
        settings: dict[str, float] | None = None,
        head: dict[str, float | None] | None = None,
    ) -> None:
        self.fields, self.settings, self.head = fields, settings or {}, head

    def record(self, output: torch.Tensor, head: Head | None) -> dict[str, torch.Tensor]:
        """The fields of a batch, [B, S, width] or, of those per row, [B, width]; by default "logits" as they are."""
        return {"logits": output}

    def restore(self, values: dict[str, torch.Tensor]) -> Any:
        """What the task's losses read in place of the output, from what `record` gave."""
        return values["logits"]


class DisposableHead(ABC):
    """The head that Stage I trains each filter behind, and then throws away."""

    @abstractmethod
    def tensors(self, filter_: Filter) -> dict[str, nn.Parameter]:
        """Fresh parameters of the head of one filter."""

    @abstractmethod
    def inputs(self, hidden: torch.Tensor, batch: Batch, index: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(the hidden states that filter `index` has to see at `step`, what they are compared with)."""

    @abstractmethod
    def loss(
        self,
        states: torch.Tensor,
        targets: torch.Tensor,
        tensors: dict[str, torch.Tensor],
        batch: Batch,
        counts: BatchCounts,
        *,
        training: bool,
    ) -> torch.Tensor:
        """The micro-batch's share of the task loss of filtered `states`; scalar."""

    def flops(self, tokens: int, plan: FilterPlan) -> int:
        """Of one filter's head with its gradients; 0 for a small one, less than a thousandth of the model's forward."""
        return 0


class RunData(Protocol):
    """A run's rows, opened on every rank."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The run's."""
        ...

    @property
    def task(self) -> Task:
        """The run's."""
        ...

    @property
    def train(self) -> PackedBlocks | EncodedRows:
        """Training rows; `Batch.rows` are their numbers."""
        ...

    @property
    def splits(self) -> Mapping[str, PackedBlocks | EncodedRows]:
        """Training rows and held-out ones, by name."""
        ...

    @property
    def num_rows(self) -> int:
        """Training rows of an epoch."""
        ...

    def training_rows(self, run: RunConfig, world: World, global_batch_size: int | None = None) -> Rows:
        """This rank's rows; global_batch_size: None is the recipe's."""
        ...

    def sample(self, run: RunConfig) -> Rows:
        """The training rows in a random order, one a step; every rank has them all."""
        ...

    def evaluate(self, engine: Any, run: RunConfig, world: World) -> dict[str, float]:
        """Scores of the held-out data, by names that begin with `validation_`; a collective."""
        ...

    def evaluate_extra(self, engine: Any, run: RunConfig, world: World) -> dict[str, float]:
        """Scores of `data.extra_validation`, by names that begin with the set's; a collective."""
        ...


class Task(ABC):
    """A kind of task. A new one needs a class like this, its line in `registry`, and its entry in `config.tasks`.

    The class methods do what is due before the models are known.
    """

    @classmethod
    @abstractmethod
    def from_spec(cls, spec: TaskSpec, world: World, vocab_size: int) -> Task:
        """The task of a run. vocab_size: the ids that the tokenizer and all models of the run have."""

    @classmethod
    @abstractmethod
    def train_tokenizer(cls, data: DataConfig, spec: TaskSpec) -> None:
        """Trains `data.tokenizer` on the training data; on one rank."""

    @classmethod
    @abstractmethod
    def prepare(
        cls, data: DataConfig, spec: TaskSpec, tokenizer: Tokenizer, folder: Path
    ) -> Mapping[str, PackedBlocks | EncodedRows]:
        """Writes each split's rows into a folder of its name in `folder`, as far as that is not done; on one rank."""

    @classmethod  # noqa: B027 (most kinds take every model)
    def check_stage1(cls, config: PreTrainedConfig) -> None:
        """Raises ModelError for a model that Stage I has no disposable head for."""

    @abstractmethod
    def open_data(self, run: RunConfig, tokenizer: Tokenizer) -> RunData:
        """The rows that `prepare` wrote."""

    @abstractmethod
    def readout(self, model: Any) -> Readout:
        """The module that reads `model`, a student or teacher of this task."""

    @abstractmethod
    def losses(
        self, student: Reading, teacher: Reading | None, batch: Batch, counts: BatchCounts, loss: LossConfig
    ) -> TaskLosses:
        """CE and KL, sums over the micro-batch over counts of the global batch. teacher: None without a KL."""

    @abstractmethod
    def predict(self, student: Reading, batch: Batch) -> Any:
        """What evaluation collects of a batch, without gradients."""

    @abstractmethod
    def disposable_head(self, model: PreTrainedModel, run: RunConfig, world: World, side: str) -> DisposableHead:
        """What Stage I trains the filters of `model` behind; a collective. side: "teacher" or "student"."""

    @abstractmethod
    def cached_outputs(self, run: RunConfig, teacher: str) -> list[CachedOutput]:
        """The ways of keeping the output of `teacher` (a path) that serve the run; the first is what is recorded."""

    def logit_flops(self, tokens: int, *widths: int) -> int:
        """Of the losses' logits, for student and teacher of these widths; 0 if the model's forward makes them."""
        return 0

    @abstractmethod
    def score_files(
        self,
        model: Any,
        tokenizer: Tokenizer,
        entries: Entries,
        world: World,
        *,
        length: int,
        stride: int,
        batch_size: int,
    ) -> dict[str, Any]:
        """Scores of a plain Hugging Face model on held-out files, in one process. length, stride: in tokens."""


def trusts_code(run: RunConfig, side: str) -> bool:
    """Whether the recipe lets the model of a side ("teacher", "student") run code that comes with it."""
    section = run.teacher if side == "teacher" else run.student
    assert section is not None
    return section.trust_remote_code


def dealing(run: RunConfig, world: World, global_batch_size: int | None) -> dict[str, int]:
    """How a run's training rows are dealt, for the classes of `data.loader`; None: as the recipe says."""
    return {
        "seed": run.seed,
        "global_batch_size": global_batch_size or run.train.global_batch_size,
        "micro_batch_size": run.train.micro_batch_size,
        "rank": world.rank,
        "world_size": world.size,
    }


ONE_BY_ONE = {"global_batch_size": 1, "micro_batch_size": 1, "rank": 0, "world_size": 1}
"""How rows are dealt to a sample, for the classes of `data.loader`."""


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """In float32 at least: sums of exponentials lose too much in half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
