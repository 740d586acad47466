"""What the kinds with labelled rows share: GLUE's, SQuAD's and users' own; rows in buckets of length, task heads."""

from __future__ import annotations

import tempfile
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ted_ds.batch import Batch, BatchCounts
from ted_ds.config.data_section import DataConfig
from ted_ds.config.schema import RunConfig
from ted_ds.config.sections import LossConfig
from ted_ds.config.tasks import TaskSpec
from ted_ds.data.bad_rows import BadRows
from ted_ds.data.buckets import BucketedRows, ScoringRows
from ted_ds.data.encoded import EncodedRows
from ted_ds.data.encoding import ensure_encoded
from ted_ds.data.manifests import Entries
from ted_ds.data.tables import iter_examples
from ted_ds.data.tokenizer_training import train_wordpiece
from ted_ds.data.tokenizers import Tokenizer
from ted_ds.errors import NotFiniteError
from ted_ds.evaluation.collect import collect_outputs
from ted_ds.job.world import World
from ted_ds.models.fit import check_ids, vocabulary_rows
from ted_ds.models.readout import TaskReadout
from ted_ds.tasks.base import ONE_BY_ONE, CachedOutput, Field, Reading, Task, TaskLosses, dealing, wide


class RowLogits(CachedOutput):
    """Logits of whole rows, [B, C]."""

    def __init__(self, count: int, dtype: str) -> None:
        super().__init__({"logits": Field(dtype, count, per_row=True)})


class LabelledTask(Task):
    """A task head's logits, read from the model's forward; subclasses say what they mean.

    num_outputs: C. spec: of the rows, by which files are encoded.
    """

    num_outputs: int

    def __init__(self, spec: TaskSpec) -> None:
        self.spec = spec

    @abstractmethod
    def pred_loss(self, z_s: torch.Tensor, batch: Batch, counts: BatchCounts) -> torch.Tensor:
        """The micro-batch's share of the loss against labels. z_s: of `comparable`."""

    @abstractmethod
    def kl_loss(self, z_s: torch.Tensor, z_t: torch.Tensor, counts: BatchCounts, temperature: float) -> torch.Tensor:
        """The micro-batch's share of T^2 KL(teacher || student). z_s, z_t: of `comparable`."""

    @abstractmethod
    def scores(self, rows: EncodedRows, outputs: np.ndarray) -> dict[str, float]:
        """The metrics of what `predict` gave [rows, C] for all rows of a split."""

    @classmethod
    def texts(cls, data: DataConfig, spec: TaskSpec, bad: BadRows) -> Iterable[str]:
        """All training texts, for a tokenizer."""
        return (text for example in iter_examples(data.train, spec, bad) for text in example.texts)

    @classmethod
    def train_tokenizer(cls, data: DataConfig, spec: TaskSpec) -> None:
        """A WordPiece tokenizer."""
        assert data.train_tokenizer is not None
        with BadRows(skip=data.skip_bad_rows) as bad:
            texts = list(cls.texts(data, spec, bad))  # all, before a tokenizer is written that would be taken again
        train_wordpiece(texts, data.train_tokenizer, Path(data.tokenizer))

    @classmethod
    def prepare(cls, data: DataConfig, spec: TaskSpec, tokenizer: Tokenizer, folder: Path) -> dict[str, EncodedRows]:
        """Encoded rows."""
        return {
            name: ensure_encoded(
                entries,
                spec,
                tokenizer,
                folder / name,
                max_length=data.sequence_length,
                stride=data.doc_stride,
                training=name == "train",
                skip_bad_rows=data.skip_bad_rows,
            )
            for name, entries in _splits(data).items()
        }

    def open_data(self, run: RunConfig, tokenizer: Tokenizer) -> ExampleData:
        """Encoded rows."""
        splits = {name: EncodedRows(run.prepared_folder / name) for name in _splits(run.data)}
        return ExampleData(tokenizer, self, splits.pop("train"), splits)

    def readout(self, model: Any) -> TaskReadout:
        """Reads the task head's logits."""
        return TaskReadout(model)

    def comparable(self, output: torch.Tensor, batch: Batch, loss: LossConfig) -> torch.Tensor:
        """Logits as the losses take them: in float32 at least."""
        return wide(output)

    def losses(
        self, student: Reading, teacher: Reading | None, batch: Batch, counts: BatchCounts, loss: LossConfig
    ) -> TaskLosses:
        """`pred_loss` and `kl_loss` of logits."""
        z_s = self.comparable(student.output, batch, loss)
        pred = self.pred_loss(z_s, batch, counts)
        if teacher is None:
            return TaskLosses(pred, pred.detach(), torch.zeros_like(pred.detach()))
        z_t = self.comparable(teacher.output.to(z_s.dtype), batch, loss)
        kl = self.kl_loss(z_s, z_t, counts, loss.temperature)
        return TaskLosses(pred + loss.kl_alpha * kl, pred.detach(), kl.detach())

    def predict(self, student: Reading, batch: Batch) -> torch.Tensor:
        """Logits [B, C]."""
        output: torch.Tensor = student.output
        return output

    def cached_outputs(self, run: RunConfig, teacher: str) -> list[CachedOutput]:
        """Logits as they are."""
        assert run.teacher is not None
        return [RowLogits(self.num_outputs, run.teacher.dtype)]

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
        """The metrics of the task."""
        model.config.pad_token_id = tokenizer.pad_id
        with tempfile.TemporaryDirectory() as folder:
            rows = ensure_encoded(
                entries,
                self.spec,
                tokenizer,
                Path(folder) / "rows",
                max_length=length,
                stride=stride,
                training=False,
                skip_bad_rows=None,
            )
            check_ids(tokenizer, vocabulary_rows(model, self.spec.kind), {"held-out": rows})
            batches = ScoringRows(rows, batch_size=batch_size, rank=world.rank, world_size=world.size)
            return dict(self.scores(rows, collect_outputs(_Predictor(model, self), batches, len(rows), world)))


class _Predictor(nn.Module):
    """A plain model behind `predict`, as `collect_outputs` calls it."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model, self.readout, self._task = model, task.readout(model), task

    def forward(self, batch: Batch) -> Any:
        output = self.readout.read(batch)
        return self.readout(output, use=lambda o, head: self._task.predict(Reading(o, head), batch))


@dataclass(frozen=True)
class ExampleData:
    """A run's tokenizer, its training rows, and its held-out sets by name, `validation` first."""

    tokenizer: Tokenizer
    task: LabelledTask
    train: EncodedRows
    held_out: dict[str, EncodedRows]

    @property
    def splits(self) -> dict[str, EncodedRows]:
        """All rows by name."""
        return {"train": self.train, **self.held_out}

    @property
    def num_rows(self) -> int:
        """Training rows: examples, or windows of contexts."""
        return len(self.train)

    def training_rows(self, run: RunConfig, world: World, global_batch_size: int | None = None) -> BucketedRows:
        """This rank's rows of every step."""
        return BucketedRows(self.train, **dealing(run, world, global_batch_size))

    def sample(self, run: RunConfig) -> BucketedRows:
        """Rows, one a step."""
        return BucketedRows(self.train, seed=run.seed, **ONE_BY_ONE)

    def evaluate(self, engine: Any, run: RunConfig, world: World) -> dict[str, float]:
        """validation_METRIC for every metric of the task; nothing without held-out data."""
        return self._scores(engine, run, world, [name for name in self.held_out if name == "validation"])

    def evaluate_extra(self, engine: Any, run: RunConfig, world: World) -> dict[str, float]:
        """SET_METRIC for every further set."""
        return self._scores(engine, run, world, [name for name in self.held_out if name != "validation"])

    def _scores(self, engine: Any, run: RunConfig, world: World, names: list[str]) -> dict[str, float]:
        scores: dict[str, float] = {}
        for name in names:
            rows = self.held_out[name]
            size = run.train.micro_batch_size
            batches = ScoringRows(rows, batch_size=size, rank=world.rank, world_size=world.size)
            outputs = collect_outputs(engine, batches, len(rows), world)
            try:
                found = world.on_main(partial(self.task.scores, rows, outputs))
            except NotFiniteError as error:
                raise NotFiniteError(f"in {name}, {error}") from error
            scores |= {f"{name}_{metric}": value for metric, value in found.items()}
        return scores


def kl_sum(z_s: torch.Tensor, z_t: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 KL(softmax(z_t / T) || softmax(z_s / T)) over the last dimension, summed over the others."""
    log_q, log_p = (functional.log_softmax(z / temperature, dim=-1) for z in (z_s, z_t))
    return temperature**2 * functional.kl_div(log_q, log_p, log_target=True, reduction="sum")


def _splits(data: DataConfig) -> dict[str, Entries]:
    held_out = {"validation": data.validation} if data.validation else {}
    return {"train": data.train, **held_out, **data.extra_validation}
