"""How a stage's loop of steps continues: its checkpoints, and what they must belong to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn

from ted_ds.config.continuation import deciding
from ted_ds.config.schema import RunConfig
from ted_ds.data.encoded import EncodedRows
from ted_ds.data.packed import PackedBlocks
from ted_ds.errors import CheckpointError
from ted_ds.job.world import World
from ted_ds.pipeline.checkpoints import Card, Identity, Retention, load_checkpoint, save_checkpoint
from ted_ds.tasks.base import RunData
from ted_ds.telemetry.recorder import Recorder


class Checkpoints:
    """The checkpoints of one loop of steps, and its metrics.jsonl, which goes back to the checkpoint that is loaded.

    folder: gets checkpoints/ and what `recorder` writes. rows_a_step: of the training data.
    Making one restores `engine`; a collective; raises CheckpointError as `load_checkpoint` does.
    """

    def __init__(
        self, engine: Any, folder: Path, run: RunConfig, data: RunData, world: World, rows_a_step: int
    ) -> None:
        self._engine, self._folder, self._world, self._rows = engine, folder / "checkpoints", world, rows_a_step
        self._keep = Retention(run.train.keep_last, run.train.keep_every)
        self._identity = identity_of(engine.module, run, data, world)
        self.card: Card | None = load_checkpoint(engine, self._folder, self._identity, world)
        if self.card is not None and self.card.rows != self.start * rows_a_step:
            raise CheckpointError(
                f"the checkpoint of step {self.start} in {self._folder} had consumed {self.card.rows} training rows, "
                f"this run takes {rows_a_step} a step: restore its global batch size, or use another output_dir"
            )

    @property
    def start(self) -> int:
        """Steps already done."""
        return 0 if self.card is None else self.card.step

    def open(self, recorder: Recorder) -> None:
        """Lets `recorder` go on after the last line that the checkpoint knows of; a collective."""
        kept = 0 if self.card is None else self.card.metrics_bytes
        self._world.on_main(lambda: recorder.open(self.start, kept))

    def save(
        self,
        step: int,
        recorder: Recorder,
        best: Mapping[str, Any] | None = None,
        score: float | None = None,
        balance: Sequence[float] | None = None,
    ) -> None:
        """Saves all after `step`; what is recorded is on the disk before; a collective.

        best: the step and scores of the best weights so far. score: of the held-out data at this step, the higher
        the better. balance: `Balance.state`.
        """
        written = self._world.on_main(recorder.sync)
        card = Card(step, step * self._rows, self._identity, written, best, score, balance)
        save_checkpoint(self._engine, self._folder, card, self._world, self._keep)


def identity_of(module: nn.Module, run: RunConfig, data: RunData, world: World) -> Identity:
    """What a run's checkpoints must be of; a collective, for rank 0 reads the data's."""
    shapes = sorted((name, *getattr(p, "ds_shape", p.shape)) for name, p in module.named_parameters())
    rows = world.on_main(lambda: _rows_fingerprint(data.train))
    return Identity(_hash(shapes), deciding(run.model_dump(mode="json")), rows)


@lru_cache(maxsize=1)  # both stages ask, and of labelled rows every one is read
def _rows_fingerprint(rows: PackedBlocks | EncodedRows) -> str:
    targets = rows.targets.tolist() if isinstance(rows, EncodedRows) else []
    return _hash([rows.fingerprint(), targets])


def _hash(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
