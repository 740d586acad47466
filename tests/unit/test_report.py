from __future__ import annotations

import csv
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml

from ted_ds.cli.report import main
from ted_ds.errors import DataError
from ted_ds.runs.report import plot_curves, spread_table, summary_table, sweep_groups
from ted_ds.runs.sweep import read_sweep
from ted_ds.telemetry.recorder import Recorder

RUNS = {"teacher": ("ce", 4000.0, 80.0), "ce": ("ce", 300.0, 120.5), "ted": ("ted", 300.0, 110.25)}


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """A teacher trained from scratch, and two students that start from one another."""
    for name, (method, initial, final) in RUNS.items():
        folder = tmp_path / name
        with Recorder(folder, title=name, steps=2, tensorboard=False) as recorder:
            recorder.open(0, 0)
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
    assert spread[3] == ["sst2", "ted", "1", "accuracy", "0.8750", "-", "0.8750", "0.8750"]


def write_sweep(folder: Path, grid: Any, scores: dict[int, dict[str, Any]]) -> Path:
    """A grid file in `folder` over recipes lm.yaml and sst2.yaml, the runs of `scores` (by index) complete."""
    data = {"train": ["x"], "tokenizer": "t"}
    common = {"teacher": {"model": "t"}, "student": {"model": "s"}, "data": data, "train": {"steps": 3}}
    for name, task in (("lm", "causal-lm"), ("sst2", "sst2")):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": task, "output_dir": "x", **common}))
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(folder / "runs"), "grid": grid}))
    costs = {"wall_seconds": 1.0, "stage1_seconds": 0.0, "peak_memory_gib": 0.5, "final_loss": 1.0, "best_step": 2}
    for entry in read_sweep(path):
        if (found := scores.get(entry.index)) is not None:
            (entry.run.output_dir / "student").mkdir(parents=True)
            summary = {"task": entry.run.task, "method": entry.run.method, "steps": 3, "tokens": 9, **costs, **found}
            (entry.run.output_dir / "summary.json").write_text(json.dumps(summary))
    return path


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """kd and ted on text and sst2, 3 seeds, and ted with another alpha on sst2; indices 4, 15, 16, 17 not complete."""
    lm, sst2 = str(tmp_path / "lm.yaml"), str(tmp_path / "sst2.yaml")
    grid = [
        {"config": [lm, sst2], "method": ["kd", "ted"], "seed": [0, 1, 2]},
        {"config": [sst2], "method": ["ted"], "loss.mse_alpha": [2.5, 5], "seed": [0, 1, 2]},
    ]
    values = [30.0, 31.0, 35.0, 29.0, None, 30.0, 0.75, 0.5, 1.0, 0.5, 0.5, 0.8, 0.875, 0.875, 0.875]
    scores = {
        i: {"validation_perplexity": v, "validation_loss": math.log(v), "initial_validation_perplexity": 99.0}
        if i < 6
        else {"validation_accuracy": v, "other_f1": 100 * v}
        for i, v in enumerate(values)
        if v is not None
    }
    return write_sweep(tmp_path, grid, scores)


def test_a_sweep_is_a_line_a_group_of_seeds(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--sweep", str(sweep)]) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    deviation = f"{statistics.stdev([0.5, 0.5, 0.8]):.4f}"
    assert table == [
        ["task", "method", "loss.mse_alpha", "runs", "score", "mean", "sd", "lowest", "highest"],
        ["causal-lm", "kd", "-", "3", "perplexity", "32.0000", "2.6458", "30.0000", "35.0000"],  # sqrt(7)
        ["causal-lm", "ted", "-", "2/3", "perplexity", "29.5000", "0.7071", "29.0000", "30.0000", "*"],
        ["sst2", "kd", "-", "3", "accuracy", "0.7500", "0.2500", "0.5000", "1.0000"],
        ["sst2", "ted", "-", "3", "accuracy", "0.6000", deviation, "0.5000", "0.8000"],
        ["sst2", "ted", "2.5", "3", "accuracy", "0.8750", "0.0000", "0.8750", "0.8750", "*"],
        ["sst2", "ted", "5", "0/3", "accuracy", "-", "-", "-", "-"],
        ["unfinished", "indices,", "not", "in", "the", "means:", "4,15-17"],
    ]


def test_groups_of_a_task_stand_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    groups = sweep_groups(read_sweep(Path("launchers/slurm/grid.yaml")))
    assert [group.task for group in groups] == ["rte"] * 4 + ["mrpc"] * 2
    assert [group.settings.get("loss.mse_alpha") for group in groups] == [None, None, "10", "250", None, None]


def test_a_sweeps_csv_has_every_score(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--sweep", str(sweep), "--csv", str(tmp_path / "out.csv")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"scores: {tmp_path / 'out.csv'}"
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = ("validation_perplexity", "validation_accuracy", "validation_loss", "other_f1")
    columns = [f"{name}_{what}" for name in names for what in ("mean", "sd", "lowest", "highest")]
    assert list(rows[0]) == ["task", "config", "method", "loss.mse_alpha", "runs", "unfinished", "best", *columns]
    wanted = ("config", "method", "loss.mse_alpha", "runs", "unfinished", "best")
    assert [tuple(row[key] for key in wanted) for row in rows[1:5]] == [
        ("lm", "ted", "", "2", "1", "1"),
        ("sst2", "kd", "", "3", "0", "0"),
        ("sst2", "ted", "", "3", "0", "0"),
        ("sst2", "ted", "2.5", "3", "0", "1"),
    ]
    assert float(rows[2]["other_f1_sd"]) == pytest.approx(25) and rows[2]["validation_loss_mean"] == ""
    assert float(rows[1]["validation_loss_mean"]) == pytest.approx((math.log(29) + math.log(30)) / 2)


def test_a_sweeps_figure_has_a_panel_a_task(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k)))
    assert main(["--sweep", str(sweep), "--png", str(tmp_path / "out.png")]) == 0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG") and not list(tmp_path.glob("*.tmp"))
    text, sst2 = drawn[0].axes
    assert [text.get_title(), sst2.get_title()] == ["causal-lm", "sst2"]
    assert [label.get_text() for label in sst2.get_yticklabels()] == [
        "method=kd",
        "method=ted",
        "method=ted, loss.mse_alpha=2.5",
        "method=ted, loss.mse_alpha=5",
    ]
    assert sst2.get_ylim() == (3.5, -0.5)  # the first group on top, and room for one without runs
    points = [tuple(line.get_xdata()) for line in text.lines if line.get_marker() == "."]
    assert points == [(30.0, 31.0, 35.0), (29.0, 30.0)]
    ((low, _), (high, _)) = text.collections[0].get_segments()[0]
    assert (low, high) == pytest.approx((32 - 7**0.5, 32 + 7**0.5))


def test_what_is_not_a_number_is_not_the_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = {"config": [str(tmp_path / "lm.yaml")], "method": ["kd", "lwd", "ted"], "seed": [0, 1]}
    values = (3.0, math.inf, None, 2.0, 4.0, 4.0)  # null: as metrics.jsonl has nan
    path = write_sweep(tmp_path, grid, {i: {"validation_perplexity": v} for i, v in enumerate(values)})
    assert main(["--sweep", str(path), "--png", str(tmp_path / "out.png")]) == 0
    rows = [line.split()[2:] for line in capsys.readouterr().out.splitlines()[1:4]]
    failed = ["2", "perplexity", "nan", "nan", "nan", "nan"]
    assert rows == [failed, failed, ["2", "perplexity", "4.0000", "0.0000", "4.0000", "4.0000", "*"]]


def test_runs_or_a_sweep(sweep: Path, folders: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(folder) for folder in folders]
    wrong = (
        ([], "give RUN..., or --sweep"),
        ([*runs, "--sweep", str(sweep)], "give RUN..., or --sweep"),
        (["--sweep", str(sweep), "--spread"], "--spread is for RUN"),
        ([*runs, "--csv", "x"], "--csv is for --sweep"),
        ([*runs, "--train.steps=3"], "--train.steps=3 is for --sweep"),
    )
    for words, message in wrong:
        with pytest.raises(SystemExit, match="2"):
            main(words)
        assert message in capsys.readouterr().err
    assert main([*runs, "--spread"]) == 0
    assert capsys.readouterr().out == spread_table(folders) + "\n"
    assert main(["--sweep", str(sweep), "--train.steps=4"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(": 0-17")
    for option in ("--csv", "--png"):
        with pytest.raises(DataError, match=r"none/x cannot be written \(No such file or directory\): choose another"):
            main(["--sweep", str(sweep), option, "none/x"])


def test_the_curves_are_a_png(folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher's run is a line where it ended, beside which its students are seen."""
    plot_curves(folders, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    for folder in folders[1:]:
        (folder / "config.yaml").write_text(yaml.safe_dump({"teacher": {"model": str(folders[0] / "student")}}))
    figures: list[Any] = []
    monkeypatch.setattr("ted_ds.runs.report.save_figure", lambda figure, path: figures.append(figure))
    plot_curves(folders, tmp_path / "curves.png")
    score, _, kl, _ = figures[0].axes
    assert [line.get_label() for line in score.lines] == ["teacher, at its end", "ce", "ted"]
    assert set(score.lines[0].get_ydata()) == {80.0} and score.get_yscale() == "linear"
    assert [line.get_label() for line in kl.lines] == ["ce", "ted"]


def test_an_unfinished_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"finish the run in .* first"):
        summary_table([tmp_path])
