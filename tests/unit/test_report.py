from __future__ import annotations

import json
from pathlib import Path

import pytest

from ted_ds.errors import DataError
from ted_ds.telemetry.recorder import Recorder, read_metrics
from ted_ds.telemetry.report import plot_curves, spread_table, summary_table

RUNS = {"teacher": ("ce", 4000.0, 80.0), "ce": ("ce", 300.0, 120.5), "ted": ("ted", 300.0, 110.25)}


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """A teacher trained from scratch, and two students that start from one another."""
    for name, (method, initial, final) in RUNS.items():
        folder = tmp_path / name
        with Recorder(folder, title=name, steps=2, start_step=0, tensorboard=False, enabled=True) as recorder:
            recorder.log({"step": 0, "validation_perplexity": initial})
            for step in (1, 2):
                recorder.log({"step": step, "pred_loss": 3.0 / step, "kl_loss": 1.0, "validation_perplexity": final})
        summary = {
            "task": "causal-lm",
            "method": method,
            "steps": 2,
            "tokens": 4096,
            "wall_seconds": 12.6,
            "peak_memory_gib": 0.5,
        }
        values = {"initial_validation_perplexity": initial, "validation_perplexity": final}
        (folder / "summary.json").write_text(json.dumps(summary | values))
    return [tmp_path / name for name in RUNS]


def test_the_table_names_the_initial_student_once(folders: list[Path]) -> None:
    rows = [line.split("  ") for line in summary_table(folders).splitlines()]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert [row[0] for row in cells] == ["run", "teacher", "initial student", "ce", "ted"]
    assert cells[2] == ["initial student", "-", "0", "0", "300.00", "-", "-"]
    assert cells[4] == ["ted", "ted", "2", "4,096", "110.25", "13", "0.50"]
    assert "initial" not in summary_table(folders[:2])


def test_scores_of_tasks_have_columns_and_seeds_a_spread(tmp_path: Path) -> None:
    folders = []
    for name, method, accuracy in (("a", "kd", 0.8), ("b", "kd", 0.9), ("c", "ted", 0.875)):
        folder = tmp_path / name
        folder.mkdir()
        summary = {
            "task": "sst2",
            "method": method,
            "steps": 2,
            "tokens": 9,
            "wall_seconds": 1.0,
            "stage1_seconds": 0.0,
        }
        summary |= {"peak_memory_gib": 0.5, "final_loss": 1.0, "best_step": 1, "initial_validation_accuracy": 0.5}
        (folder / "summary.json").write_text(
            json.dumps(summary | {"validation_accuracy": accuracy, "other_f1": 88.5, "f1_thresh": 0.3})
        )
        folders.append(folder)
    table = [line.split() for line in summary_table(folders).splitlines()]
    assert table[0] == ["run", "method", "steps", "tokens", "accuracy", "other_f1", "seconds", "peak", "GiB"]
    assert table[1] == ["initial", "student", "-", "0", "0", "0.5000", "-", "-", "-"]
    assert table[2] == ["a", "kd", "2", "9", "0.8000", "88.50", "1", "0.50"]
    spread = [line.split() for line in spread_table(folders).splitlines()]
    assert spread[1] == ["sst2", "kd", "2", "accuracy", "0.8500", "0.0707", "0.8000", "0.9000"]
    assert spread[3] == ["sst2", "ted", "1", "accuracy", "0.8750", "0.0000", "0.8750", "0.8750"]


def test_the_curves_are_a_png(folders: list[Path], tmp_path: Path) -> None:
    plot_curves(folders, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_an_unfinished_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"finish the run in .* first"):
        summary_table([tmp_path])


def test_the_record_drops_what_a_dead_run_left_behind(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step}) + "\n" for step in (0, 5, 10)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 1')
    with Recorder(tmp_path, title="", steps=9, start_step=5, tensorboard=True, enabled=True) as recorder:
        recorder.log({"step": 6, "loss": 1.0})
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 5, 6]
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with Recorder(tmp_path / "x", title="", steps=1, start_step=0, tensorboard=True, enabled=False) as recorder:
        recorder.advance()
        recorder.log({"step": 1})
    assert not (tmp_path / "x").exists()
