from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from sklearn.model_selection import ParameterGrid

import ted_ds.cli.sweep
from ted_ds.cli.common import guarded
from ted_ds.cli.sweep import main
from ted_ds.config.schema import RunConfig
from ted_ds.errors import CheckpointError, ConfigError
from ted_ds.runs.sweep import read_sweep, state

ROOT = Path(__file__).parents[2]
RECIPE = {
    "teacher": {"model": "teacher"},
    "student": {"model": "student"},
    "data": {"train": ["text.txt"], "tokenizer": "tokenizer"},
    "train": {"steps": 10},
    "methods": {"ted": {"loss": {"mse_alpha": 7}}},
    "output_dir": "nowhere",
}
METHODS_AND_SEEDS = {"seed": [0, 1], "method": ["ted", "kd"]}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with a recipe of text and one of sst2."""
    monkeypatch.chdir(tmp_path)
    Path("text.yaml").write_text(yaml.safe_dump(RECIPE))
    Path("sst2.yaml").write_text(yaml.safe_dump(RECIPE | {"task": "sst2", "train": {"epochs": 3}}))
    return tmp_path


def write_grid(grid: Any, **keys: Any) -> Path:
    path = Path("grid.yaml")
    path.write_text(yaml.safe_dump({"config": "text.yaml", "output_dir": "runs", "grid": grid} | keys))
    return path


def names(path: Path) -> list[str]:
    return [str(entry.run.output_dir) for entry in read_sweep(path)]


def finish(run: RunConfig, steps: int = 10) -> None:
    (run.output_dir / "student").mkdir(parents=True)
    (run.output_dir / "summary.json").write_text(json.dumps({"steps": steps}))


def save(run: RunConfig, tag: str) -> None:
    (run.output_dir / "checkpoints").mkdir(parents=True)
    (run.output_dir / "checkpoints/latest").write_text(tag)
    (run.output_dir / "config.yaml").touch()


def test_indices_follow_sorted_keys_the_last_one_fastest() -> None:
    sweep = read_sweep(write_grid([METHODS_AND_SEEDS, {"method": ["ted"], "loss.mse_alpha": [1, 2.5], "seed": [3]}]))
    by_hand = [("ted", 0, 7), ("ted", 1, 7), ("kd", 0, 0), ("kd", 1, 0), ("ted", 3, 1), ("ted", 3, 2.5)]
    assert [(e.run.method, e.run.seed, e.run.loss.mse_alpha) for e in sweep] == by_hand
    assert [entry.index for entry in sweep] == list(range(6))
    assert {entry.run.teacher.model for entry in sweep if entry.run.teacher} == {"teacher"}


def test_the_order_is_that_of_sklearn() -> None:
    grid = [
        {"seed": [2, 0], "method": ["kd", "ted"], "config": ["text.yaml", "sst2.yaml"]},
        {"train.global_batch_size": [8, 4], "loss.kl_alpha": [1, 0.5]},
    ]
    texts = [{key: str(value).removesuffix(".yaml") for key, value in point.items()} for point in ParameterGrid(grid)]
    assert [dict(entry.settings) for entry in read_sweep(write_grid(grid))] == texts


def test_folders_are_named_by_settings_and_stay_when_the_grid_grows() -> None:
    before = names(write_grid(METHODS_AND_SEEDS))
    assert before == [f"runs/method={method},seed={seed}" for method in ("ted", "kd") for seed in (0, 1)]
    grown = names(write_grid([{"seed": [7], "loss.kl_alpha": [1]}, {"seed": [2, 1, 0], "method": ["ce", "kd", "ted"]}]))
    assert set(before) < set(grown) and len(grown) == 10


@pytest.mark.parametrize(
    ("key", "value", "name"),
    [
        ("optimizer.learning_rate", 1e-4, "0.0001"),
        ("optimizer.learning_rate", "1e-4", "0.0001"),  # what YAML makes of 1e-4 without a dot
        ("loss.kl_alpha", 10.0, "10"),
        ("seed", 2**60 + 1, "1152921504606846977"),
        ("teacher.model", "a/../b c", "a%2F..%2Fb%20c"),
        ("student", {"init": {"blocks": [0, 2]}}, "%7Binit%3A%20%7Bblocks%3A%20%5B0%2C%202%5D%7D%7D"),
        ("student.activation_checkpointing", True, "true"),
        ("teacher.cache", None, "null"),
        ("config", "./text.yaml", "text"),
    ],
)
def test_names_have_safe_characters_and_one_spelling_of_numbers(key: str, value: Any, name: str) -> None:
    (entry,) = read_sweep(write_grid({key: [value]}))
    assert str(entry.run.output_dir) == f"runs/{key}={name}"
    if key == "student":
        assert entry.run.student.init is not None and entry.run.student.init.blocks == (0, 2)
    if key == "seed":
        assert entry.run.seed == value


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"grid": {"seed": 3}}, "grid.yaml: grid.seed: 3 is not allowed: Input should be a valid list"),
        ({"grid": [{"seed": [1]}, {"seed": []}]}, "grid.yaml: grid.1.seed: [] is not allowed: List should have at"),
        ({"grid": {}}, "grid.yaml: grid: {} is not allowed: Dictionary should have at least 1 item"),
        ({"grids": 1}, "grid.yaml: grids: unknown key; known are config, output_dir, grid"),
        ({"config": None}, "grid.yaml: index 0: config: None is no recipe"),
        ({"config": "none.yaml"}, "grid.yaml: index 0 (seed=0): none.yaml: the recipe cannot be read"),
        ({"grid": {"output_dir": ["a"]}}, "grid.yaml: grid.output_dir: each index has a folder of its own"),
        ({"grid": {"trian.steps": [5]}}, "grid.yaml: index 0 (trian.steps=5): grid: trian: unknown key; did you"),
        ({"grid": {"data.train.x": [5]}}, "grid.yaml: index 0 (data.train.x=5): grid: --data.train.x: train is"),
        (
            {"grid": {"method": ["ted", "kd"], "loss.mse_alpha": [5]}},
            "grid.yaml: index 1 (loss.mse_alpha=5, method=kd): text.yaml: method: kd has no such term",
        ),
        ({"grid": {"seed": [1, 2, 1.0]}}, "grid.yaml: index 0 and index 2 both have the folder runs/seed=1: remove"),
        (
            {"grid": {"config": ["text.yaml", "./text.yaml"]}},
            "index 0 and index 1 both have the folder runs/config=text",
        ),
        ({"grid": {"teacher.model": ["x" * 250]}}, "a folder's name has at most 255 bytes"),
    ],
)
def test_a_faulty_grid_is_named_by_file_and_key(keys: dict[str, Any], message: str) -> None:
    path = write_grid(**{"grid": {"seed": [0]}} | keys)
    with pytest.raises(ConfigError) as caught:
        read_sweep(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_what_lacks_is_named() -> None:
    Path("grid.yaml").write_text("config: text.yaml\ngrid: {seed: [1]}\n")
    with pytest.raises(ConfigError, match=r"^grid.yaml: output_dir: is missing: give it a value$"):
        read_sweep(Path("grid.yaml"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--seed=3", "the command line: --seed: grid.yaml sets seed for each index: remove one"),
        ("--loss={kl_alpha: 3}", "the command line: --loss: grid.yaml sets loss.kl_alpha for each index"),
        ("--output_dir=x", "the command line: --output_dir: grid.yaml sets output_dir for each index"),
        ("--trian.steps=3", r"grid.yaml: index 0 \(loss.kl_alpha=1, seed=0\): the command line: trian: unknown key"),
    ],
)
def test_overrides_apply_to_all_or_are_refused(override: str, message: str) -> None:
    path = write_grid({"seed": [0, 1], "loss.kl_alpha": [1]})
    assert [entry.run.train.steps for entry in read_sweep(path, ["--train.steps", "5"])] == [5, 5]
    with pytest.raises(ConfigError, match=message):
        read_sweep(path, [override])


def test_list_and_missing_look_into_the_folders(capsys: pytest.CaptureFixture[str]) -> None:
    path = write_grid({"seed": list(range(7))})
    runs = [entry.run for entry in read_sweep(path)]
    finish(runs[1])
    finish(runs[2], steps=9)  # of a shorter recipe
    save(runs[2], "step-00000009\n")
    save(runs[3], "step-00000004")
    (runs[4].output_dir / "student").mkdir(parents=True)
    (runs[4].output_dir / "config.yaml").touch()
    runs[5].output_dir.mkdir()
    (runs[5].output_dir / "summary.json").write_text('{"steps": 10}')
    assert main([str(path), "--list"]) == 0
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    states = ["missing", "complete", "step 9 of 10", "step 4 of 10", "step 0 of 10", "missing", "missing"]
    assert cells[0] == ["index", "state", "folder", "settings"]
    assert cells[1:] == [[str(i), state, f"runs/seed={i}", f"seed={i}"] for i, state in enumerate(states)]
    assert main([str(path), "--missing"]) == 0
    assert capsys.readouterr().out == "0,2-6\n"
    assert main([str(path), "--missing", "--train.steps=9"]) == 0
    assert capsys.readouterr().out == "0,3-6\n"


def test_nothing_missing_is_nothing_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    path = write_grid(METHODS_AND_SEEDS)
    for entry in read_sweep(path):
        finish(entry.run)
    assert main([str(path), "--missing"]) == 0
    out, err = capsys.readouterr()
    assert out == "" and err == "nothing is missing: all 4 indices of grid.yaml are complete\n"


def test_epochs_and_what_is_torn() -> None:
    (entry,) = read_sweep(write_grid({"config": ["sst2.yaml"]}))
    save(entry.run, "step-00000012")
    assert state(entry.run) == "step 12, 3 epochs in all"
    finish(entry.run, steps=1)  # what 3 epochs come to, only the data says
    assert state(entry.run) == "complete"
    (entry.run.output_dir / "summary.json").write_text('{"steps": 1')
    with pytest.raises(CheckpointError, match=r"summary.json cannot be read .* delete it and start the run again"):
        state(entry.run)


def test_an_index_runs_its_recipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path, started = write_grid(METHODS_AND_SEEDS), []
    monkeypatch.setattr(ted_ds.cli.sweep, "run_to", lambda run, goal: started.append((run, goal)))
    assert main([str(path), "--local_rank=0", "--train.steps", "5", "--index", "2"]) == 0
    ((run, goal),) = started
    assert (run.method, run.seed, run.train.steps, str(run.output_dir)) == ("kd", 0, 5, "runs/method=kd,seed=0")
    assert goal == "distilled"
    for index in ("4", "-1"):
        assert guarded(main, [str(path), "--index", index]) == 2
        assert f"grid.yaml: there is no index {index}: it has 0 to 3" in capsys.readouterr().err
    assert len(started) == 1


def test_listing_imports_nothing_heavy() -> None:
    code = (
        "import sys; from ted_ds.cli.sweep import main; main(sys.argv[1:]); "
        "print([m for m in ('torch', 'transformers', 'deepspeed', 'sklearn', 'numpy') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(write_grid({"seed": [0]}).resolve()), "--missing"]
    environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines() == ["0", "[]"]


def test_the_grid_that_is_shipped_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    sweep = read_sweep(Path("launchers/slurm/grid.yaml"))
    assert len(sweep) == 18
    assert [entry.run.loss.mse_alpha for entry in sweep[::3]] == [0, 50, 0, 100, 10, 250]
    assert [entry.run.task for entry in sweep[::6]] == ["rte", "mrpc", "rte"]


def test_words_of_a_grid_are_to_be_quoted_too(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "task: classification\nmethod: ce\noutput_dir: o\nstudent: {model: m}\n"
        "data: {train: a, tokenizer: t, text_columns: [a], labels: [a, b]}\n"
    )
    grid = tmp_path / "grid.yaml"
    grid.write_text(f"config: {recipe}\noutput_dir: runs\ngrid: {{data.labels: [[no, yes]]}}\n")
    with pytest.raises(
        ConfigError, match=r"grid: data\.labels\.0: YAML reads false as a boolean, and no, yes, on and o"
    ):
        read_sweep(grid)
    grid.write_text("config: 2024-01-01\noutput_dir: runs\ngrid: {seed: [1]}\n")
    with pytest.raises(
        ConfigError, match=r"grid\.yaml: config: YAML reads 2024-01-01 as a date: quote it: \"2024-01-01"
    ):
        read_sweep(grid)
