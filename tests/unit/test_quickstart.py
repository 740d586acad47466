"""`ted-ds quickstart` starts runs that its recipes allow, in order, and reports them; the runs themselves are stubs."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from ted_ds.cli import quickstart
from ted_ds.config.load import load_config
from ted_ds.config.schema import RunConfig
from ted_ds.errors import TrainingError
from ted_ds.telemetry.recorder import Recorder


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """The recipes of the runs that were started; each leaves what the report reads, and the first lwd fails."""
    started: list[RunConfig] = []

    def deepspeed(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        launcher, *options, script, config, recipe = command[: command.index("--config") + 2]
        assert Path(launcher).name == "deepspeed" and Path(script).is_file() and config == "--config"
        assert options[:3] == ["--num_gpus", "2", "--master_port"] and options[4:] == ["--log_level", "error"]
        assert options[3] != "29500"
        run = load_config(recipe, command[command.index("--config") + 2 :])
        started.append(run)
        if run.method == "lwd" and sum(r.method == "lwd" for r in started) == 1:
            return subprocess.CompletedProcess(command, 76)
        with Recorder(run.output_dir, title=run.method, steps=1, tensorboard=False) as recorder:
            recorder.open(0, 0)
            recorder.log({"step": 1, "pred_loss": 3.0, "validation_perplexity": 9.0})
        summary = {"task": run.task, "method": run.method, "steps": run.train.steps, "tokens": 8, "wall_seconds": 1.0}
        initial = 9.5 if run.teacher else 90.0
        summary |= {"peak_memory_gib": 0.5, "initial_validation_perplexity": initial, "validation_perplexity": 9.0}
        (run.output_dir / "summary.json").write_text(json.dumps(summary))
        if run.student.init is not None and run.student.init.chooses_blocks:
            (run.output_dir / "calibration").mkdir(exist_ok=True)
            (run.output_dir / "calibration/blocks.json").write_text('{"kept": [0, 1, 5, 7]}')
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", deepspeed)
    return started


def test_it_runs_each_method_from_one_teacher_and_reports(
    runs: list[RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "quick"
    (folder / "corpus").mkdir(parents=True)
    with pytest.raises(TrainingError, match=r"^quickstart.yaml ended with exit code 76; its messages are above$"):
        quickstart.main(["--folder", str(folder), "--train.steps=1"])
    assert [run.output_dir.name for run in runs] == ["teacher", "ce", "kd", "lwd"]
    del runs[:3]
    assert quickstart.main(["--folder", str(folder), "--train.steps=1"]) == 0
    runs.pop(0)
    assert [run.output_dir for run in runs] == [folder / name for name in ("teacher", "ce", "kd", "lwd", "ted")]
    assert [run.method for run in runs] == ["ce", "ce", "kd", "lwd", "ted"]
    teacher, *students = runs
    assert teacher.teacher is None and teacher.data.train_tokenizer and teacher.train.steps == 1
    assert {(run.data.tokenizer, run.data.prepared) for run in runs} == {(f"{folder}/tokenizer", folder / "data")}
    assert all(run.teacher and run.teacher.model == str(folder / "teacher/student") for run in students)
    table = (folder / "report.txt").read_text()
    assert [line.split()[0] for line in table.splitlines()] == ["run", "teacher", "initial", "ce", "kd", "lwd", "ted"]
    assert table in capsys.readouterr().out
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
