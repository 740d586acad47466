"""What a run records: that a run which goes on leaves the record of one that was never stopped."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ted_ds.errors import CheckpointError
from ted_ds.telemetry.recorder import Recorder, read_metrics


def recorder(folder: Path, *, tensorboard: bool = True) -> Recorder:
    return Recorder(folder, title="", steps=9, tensorboard=tensorboard)


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [(point.step, point.value) for point in events.Scalars(name)]


def test_the_parts_of_a_field_have_curves(tmp_path: Path) -> None:
    with recorder(tmp_path) as record:
        record.open(0, 0)
        record.log({"step": 3, "mfu": None, "loss": 2.0, "phase_ms": {"data": 1.5, "loss": 4.0}})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["loss", "phase_ms/data", "phase_ms/loss"]
    assert curve(tmp_path, "phase_ms/data") == [(3, 1.5)]
    assert read_metrics(tmp_path)[0]["phase_ms"] == {"data": 1.5, "loss": 4.0}


def test_a_run_that_goes_on_records_nothing_twice_and_loses_nothing(tmp_path: Path) -> None:
    """It died at step 6, in the middle of a line and of a record of TensorBoard; its checkpoint is of step 4."""
    early = recorder(tmp_path)
    early.open(0, 0)
    early.log({"step": 0, "loss": 7.0})
    early.__exit__(None, None, None)  # before the first checkpoint: all of it is repeated
    died = recorder(tmp_path)
    died.open(0, 0)
    for step in range(1, 7):
        died.log({"step": step, "loss": 10.0 * step})
        if step == 4:
            kept = died.sync()
    assert died._metrics is not None
    died._metrics.write('{"step": 7, "lo')
    died.__exit__(None, None, None)  # the tests' process lives on: what it has open is closed
    *_, events = sorted((tmp_path / "tensorboard").iterdir())
    events.write_bytes(events.read_bytes()[:-3])
    with recorder(tmp_path) as record:
        record.open(4, kept)
        for step in range(5, 10):
            record.log({"step": step, "loss": float(step)})
    expected = [(step, 10.0 * step if step < 5 else float(step)) for step in range(1, 10)]
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == expected
    assert curve(tmp_path, "loss") == expected


def test_a_record_that_is_shorter_than_its_checkpoint_knows_is_refused(tmp_path: Path) -> None:
    with recorder(tmp_path) as record:
        record.open(0, 0)
        record.log({"step": 1})
    with pytest.raises(
        CheckpointError, match=r"metrics.jsonl has 12 bytes, 50 when step 3 was saved: put the file back"
    ):
        recorder(tmp_path).open(3, 50)


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    with recorder(tmp_path, tensorboard=False) as record:
        record.open(0, 0)
        record.log({"step": 1, "loss": math.nan, "layer_losses": [1.0, math.inf], "phase_ms": {"data": -math.inf}})
    written: dict[str, Any] = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert written == {"step": 1, "loss": None, "layer_losses": [1.0, None], "phase_ms": {"data": None}}


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with recorder(tmp_path / "x") as record:  # not opened
        record.advance()
        record.log({"step": 1})
    assert not (tmp_path / "x").exists()
