"""Recipes: what is accepted, how overrides land, and what the messages say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ted_ds.config.load import dump_config, load_config, load_section
from ted_ds.config.schema import DataConfig, HubDataset, RunConfig
from ted_ds.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def recipe(**changes: Any) -> dict[str, Any]:
    return {
        "output_dir": "runs/demo",
        "teacher": {"model": "gpt2"},
        "student": {"init": {"num_blocks": 6}},
        "data": {"train": ["a.txt"], "tokenizer": "gpt2"},
    } | changes


@pytest.fixture
def write(tmp_path: Path):
    def write(content: dict[str, Any] | str) -> Path:
        path = tmp_path / "r.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path

    return write


def fault(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_a_short_recipe_gets_the_defaults_of_the_public_surface(write):
    run = load_config(write(recipe()))
    assert (run.task, run.method, run.seed, run.deepspeed) == (
        "causal-lm",
        "ted",
        0,
        Path("ds_configs/zero3.json"),
    )
    assert run.teacher is not None
    assert (run.teacher.sharding, run.teacher.dtype, run.student.dtype) == ("zero3", "bfloat16", "bfloat16")
    assert (run.filters.output_dim, run.filters.layer_map, run.filters.steps) == (None, "uniform", 200)
    assert (run.loss.temperature, run.loss.layer_loss) == (2.0, "normalized_mse")
    assert (run.optimizer.learning_rate, run.optimizer.betas) == (5e-4, (0.9, 0.95))
    assert (run.train.steps, run.train.global_batch_size, run.train.micro_batch_size) == (1000, 64, 4)
    assert (run.logging.every, run.logging.tensorboard) == (10, True)
    assert run.prepared_folder == Path("runs/demo/data")


@pytest.mark.parametrize("path", sorted((ROOT / "launchers/recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_recipe_is_valid(path):
    assert load_config(path).method in ("ce", "kd", "lwd", "ted")


def test_overrides_are_yaml_and_later_ones_win(write):
    run = load_config(
        write(recipe()),
        [
            "--optimizer.learning_rate=1e-4",
            "--method=kd",
            "--train.steps",
            "5",
            "--train.steps=7",
            "--data.train=[a b.txt, c=d.jsonl]",
            "--teacher.model=null",
            "--teacher.model=org/x",
            "--student.dropout=null",
            "--filters.layer_map=[[0, 1], [1, 3]]",
        ],
    )
    assert run.optimizer.learning_rate == 1e-4 and isinstance(run.optimizer.learning_rate, float)
    assert (run.method, run.train.steps, run.student.dropout) == ("kd", 7, None)
    assert run.data.train == ("a b.txt", "c=d.jsonl")
    assert run.teacher is not None and run.teacher.model == "org/x"
    assert run.filters.layer_map == ((0, 1), (1, 3))


def test_an_override_makes_an_absent_or_null_section(write):
    for content in (recipe(teacher=None), {k: v for k, v in recipe().items() if k != "teacher"}):
        run = load_config(write(content), ["--teacher.model=x"])
        assert run.teacher is not None and run.teacher.model == "x"


@pytest.mark.parametrize(("method", "weights"), [("ce", (0, 0)), ("kd", (1, 0)), ("lwd", (1, 10)), ("ted", (1, 10))])
def test_loss_weights_follow_the_method(write, method, weights):
    run = load_config(write(recipe(method=method)))
    assert (run.loss.kl_alpha, run.loss.mse_alpha) == weights


def test_given_loss_weights_stay_and_zero_is_allowed(write):
    assert load_config(write(recipe(loss={"mse_alpha": 0}))).loss.mse_alpha == 0
    kd = load_config(write(recipe(method="kd", loss={"kl_alpha": 0, "mse_alpha": 0})))
    assert (kd.loss.kl_alpha, kd.loss.mse_alpha) == (0, 0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"method": "kd", "loss": {"mse_alpha": 5}},
            "method: kd has no such term, but loss.mse_alpha is 5: remove loss.mse_alpha, or choose method: lwd or ted",
        ),
        (
            {"method": "ce", "loss": {"kl_alpha": 0.5}},
            "method: ce has no such term, but loss.kl_alpha is 0.5: "
            "remove loss.kl_alpha, or choose method: kd or lwd or ted",
        ),
        ({"teacher": None}, "method: ted needs a teacher: give teacher.model"),
        (
            {"teacher": None, "method": "ce"},
            "student.init cuts the student out of a teacher: give teacher.model",
        ),
        ({"student": {}}, "student: exactly one of student.model and student.init must be given, neither is"),
        ({"student": {"model": "x", "init": {}}}, "student.init must be given, both are"),
        (
            {"student": {"init": {"config": {"model_type": "llama"}, "num_blocks": 6}}},
            "student.init: `config` (a random start) and num_blocks: 6 (a cut of the teacher) exclude each other",
        ),
        ({"student": {"init": {"config": {}}}}, "`config` lacks `model_type`"),
        (
            {"student": {"init": {"blocks": [0, 0]}}},
            "blocks [0, 0] must name at least one block, and none twice",
        ),
        ({"student": {"init": {"blocks": [0, 2], "num_blocks": 3}}}, "blocks [0, 2] are 2, num_blocks is 3"),
        ({"train": {"stpes": 5}}, "train.stpes: unknown key; did you mean train.steps?"),
        ({"train": {"learning_rate": 5}}, "did you mean filters.learning_rate or optimizer.learning_rate?"),
        ({"metod": "kd"}, "metod: unknown key; did you mean method?"),
        (
            {"train": {"qqqq": 5}},
            "train.qqqq: unknown key; known are train.steps, train.epochs, train.global_batch_size",
        ),
        ({"method": "tedd"}, "method: 'tedd' is not allowed: should be 'ce', 'kd', 'lwd' or 'ted'"),
        ({"train": {"steps": "many"}}, "train.steps: 'many' is not allowed: should be a valid integer"),
        ({"train": {"steps": 0}}, "train.steps: 0 is not allowed: should be greater than 0"),
        ({"filters": {"token_fraction": 1.5}}, "1.5 is not allowed: should be less than or equal to 1"),
        (
            {"filters": {"layer_map": "unifrom"}},
            "'unifrom' is not allowed: should be 'uniform' or 'last' or should be a valid list",
        ),
        ({"loss": {"temperature": 0}}, "loss.temperature: 0 is not allowed: should be greater than 0"),
        (
            {"loss": {"mse_alpha": -1}},
            "loss.mse_alpha: -1 is not allowed: should be greater than or equal",
        ),
        ({"data": {"train": ["a"]}}, "data.tokenizer: is missing: give it a value"),
        ({"data": {"train": [], "tokenizer": "x"}}, "data.train: [] is not allowed"),
        (
            {"data": {"train": [{"hub": "a/b", "nam": "c"}], "tokenizer": "x"}},
            "data.train.0.nam: unknown key",
        ),
        ({"data": None}, "data: None is not allowed: should be a valid dictionary"),
    ],
)
def test_faults_show_file_key_value_and_remedy(write, changes, expected):
    path = write(recipe(**changes))
    message = fault(path)
    assert expected in message
    assert message.startswith(f"{path}: ")
    assert len(message.splitlines()) == 1


def test_every_fault_is_listed_and_overrides_are_named_as_the_source(write):
    path = write(recipe(train={"steps": "many"}))
    lines = fault(path, "--method=tedd", "--optimiser.betas=[0.9, 0.9]").splitlines()
    assert lines == [
        "the command line: method: 'tedd' is not allowed: should be 'ce', 'kd', 'lwd' or 'ted'",
        f"{path}: train.steps: 'many' is not allowed: should be a valid integer, unable to parse string as an integer",
        "the command line: optimiser: unknown key; did you mean optimizer?",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("method: ted\ntrain: {steps: 1\n", ":3: not valid YAML"),
        ("train:\n  steps: 1\n  steps: 2\n", ":3: not valid YAML: the key 'steps' stands twice: remove one"),
        ("- a\n", ": a recipe is a mapping of keys to values, this is ['a']"),
        ("", ": a recipe is a mapping of keys to values, this is None"),
        ("a: !!python/name:os.system x\n", ":1: not valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe(write, text, expected):
    path = write(text)
    assert fault(path).startswith(f"{path}{expected}")


def test_a_missing_recipe(tmp_path):
    assert fault(tmp_path / "r.yaml") == f"{tmp_path}/r.yaml: the recipe cannot be read: No such file or directory"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.steps=5"], "'train.steps=5' is not of the form --section.key=value"),
        (["--train.steps"], "--train.steps has no value: write --train.steps=VALUE"),
        (["--train.steps", "--seed=1"], "--train.steps has no value"),
        (["--data.train=[a"], "--data.train=[a: the value is not valid YAML"),
        (["--method.x=1", "--method.x.y=1"], "--method.x: method is 'ted', which has no keys"),
    ],
)
def test_malformed_overrides(write, overrides, expected):
    assert expected in fault(write(recipe(method="ted")), *overrides)


def test_a_dumped_recipe_reads_back_as_the_same_run(write, tmp_path):
    data = {"train": ["a.txt", {"hub": "org/x", "streaming": True}], "tokenizer": "gpt2"}
    for changes in ({}, {"method": "ce", "student": {"init": {"config": {"model_type": "llama"}}}}):
        run = load_config(write(recipe(data=data, **changes)))
        dump_config(run, tmp_path / "out/config.yaml", {"torch": "2.13.0", "commit": None})
        assert load_config(tmp_path / "out/config.yaml") == run
        assert yaml.safe_load((tmp_path / "out/config.yaml").read_text())["environment"]["torch"] == "2.13.0"
        assert [p.name for p in (tmp_path / "out").iterdir()] == ["config.yaml"]


def test_one_section_from_overrides_alone():
    data = load_section(DataConfig, ["--data.tokenizer=t.model", "--data.train={hub: org/x, split: test}"])
    assert data.tokenizer == "t.model"
    assert data.train == (HubDataset(hub="org/x", split="test"),)
    with pytest.raises(ConfigError, match=r"train\.steps has no use here, only data\.KEY has"):
        load_section(DataConfig, ["--train.steps=4"])
    with pytest.raises(ConfigError, match=r"^the command line: data\.train: is missing"):
        load_section(DataConfig, ["--data.tokenizer=x"])
    with pytest.raises(ConfigError, match=r"data\.tokeniser: unknown key; did you mean data\.tokenizer"):
        load_section(DataConfig, ["--data.train=x", "--data.tokenizer=x", "--data.tokeniser=x"])


def test_python_users_build_a_run_without_a_file():
    run = RunConfig.model_validate(recipe(method="lwd"))
    assert run.loss.mse_alpha == 10
