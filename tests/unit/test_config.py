"""Recipes: what is accepted, how overrides land, and what the messages say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ted_ds.cli import prepare
from ted_ds.config.data_section import DataConfig, HubDataset
from ted_ds.config.load import dump_config, load_config, load_section
from ted_ds.config.schema import RunConfig
from ted_ds.errors import ConfigError, DataError

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
    assert (run.filters.output_dim, run.filters.layer_map, run.filters.steps) == (None, None, 200)
    assert (run.loss.temperature, run.loss.layer_loss) == (2.0, "rms_mse")
    assert (run.optimizer.learning_rate, run.optimizer.betas) == (5e-4, (0.9, 0.95))
    assert (run.train.steps, run.train.global_batch_size, run.train.micro_batch_size) == (1000, 64, 4)
    assert (run.logging.every, run.logging.tensorboard) == (10, True)
    assert run.prepared_folder == Path("runs/demo/data")


@pytest.mark.parametrize("path", sorted((ROOT / "launchers/recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_recipe_is_valid(path):
    assert load_config(path).method in ("ce", "kd", "lwd", "ted")


def test_a_budget_may_be_written_short(write):
    for text, number in (("70M", 70_000_000), ("1.5B", 1_500_000_000), ("12K", 12_000), ("12345", 12_345)):
        run = load_config(write(recipe(student={"init": {}})), [f"--student.init.parameters={text}"])
        assert run.student.init is not None and run.student.init.parameters == number


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


@pytest.mark.parametrize(("method", "weights"), [("ce", (0, 0)), ("kd", (1, 0)), ("lwd", (1, 1)), ("ted", (1, 1))])
def test_loss_weights_follow_the_method(write, method, weights):
    run = load_config(write(recipe(method=method)))
    assert (run.loss.kl_alpha, run.loss.mse_alpha) == weights


BY_TOKEN, BY_ENERGY = (1, "gradient", 0.5), (10, "none", 0)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(None, BY_TOKEN), ("rms_mse", BY_TOKEN), ("cosine", BY_TOKEN), ("normalized_mse", BY_ENERGY), ("mse", BY_ENERGY)],
)
def test_a_layer_loss_brings_its_weight_balance_and_fading(write, kind, expected):
    named = {} if kind is None else {"layer_loss": kind}
    loss = load_config(write(recipe(method="lwd", loss=named))).loss
    assert (loss.mse_alpha, loss.balance, loss.layer_fade) == expected
    given = {**named, "mse_alpha": 0.3, "balance": "none", "layer_fade": 0.25}
    loss = load_config(write(recipe(method="lwd", loss=given))).loss
    assert (loss.mse_alpha, loss.balance, loss.layer_fade) == (0.3, "none", 0.25)


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
            {"filters": {"layer_map": [[0, 1]], "skip_last": 0}},
            "filters.skip_last is of a policy, filters.layer_map is a list: leave pairs out of the list",
        ),
        (
            {"method": "ce", "loss": {"kl_alpha": 0.5}},
            "method: ce has no such term, but loss.kl_alpha is 0.5: "
            "remove loss.kl_alpha, or choose method: kd or lwd or ted",
        ),
        (
            {"loss": {"probe_steps": 5}},
            "loss.probe_steps compares held-out scores: give data.validation, or remove it",
        ),
        (
            {
                "loss": {"probe_steps": 5},
                "student": {"init": {"num_blocks": 2, "blocks": "iterative"}},
                "data": {"train": ["a"], "validation": ["b"], "tokenizer": "t"},
            },
            "loss.probe_steps has no use for the rounds of student.init.blocks iterative: remove one of them",
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
        (
            {"student": {"init": {"parameters": "70M", "num_blocks": 3}}},
            "`parameters` looks for the sizes and blocks itself, num_blocks: 3 is given: remove one of them",
        ),
        (
            {"student": {"init": {"parameters": 7, "blocks": "iterative"}}},
            "`parameters` looks for the sizes and blocks itself, blocks: iterative is given: remove one of them",
        ),
        ({"student": {"init": {"parameters": "70X"}}}, "student.init.parameters: '70X' is not allowed"),
        (
            {"student": {"init": {"num_blocks": 3, "round_steps": 5}}},
            "round_steps is for blocks: iterative, blocks is greedy: remove one of them",
        ),
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
            "'unifrom' is not allowed: should be 'matched', 'uniform' or 'last' or should be a valid list",
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


def test_what_prepare_takes_for_files_is_no_part_of_an_override(write):
    path = str(write(own_data("[a, b]")))
    for words in (["--data.labels=[a, b, a]"], ["--data.labels", "[a, b, a]"]):
        for argv in (["--config", path, *words], [*words, "--config", path]):
            with pytest.raises(ConfigError, match=r"data\.labels has 'a' twice"):
                prepare.main(argv)


def test_any_name_of_a_file_reaches_the_reader(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "a \\x \U0001f600.txt"
    with pytest.raises(DataError) as error:
        prepare.main([name, "--data.prepared=p", "--data.tokenizer=none", "--train-tokenizer=300"])
    assert str(error.value).startswith(f"data entry {name!r} matches no file")


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
    assert run.loss.mse_alpha == 1


def labelled(**changes: Any) -> dict[str, Any]:
    return {
        "task": "sst2",
        "output_dir": "runs/demo",
        "teacher": {"model": "t"},
        "student": {"model": "s"},
        "data": {"train": ["a.tsv"], "tokenizer": "t"},
    } | changes


def test_a_task_brings_its_columns_and_a_recipe_may_have_its_own(write):
    run = load_config(write(labelled()))
    assert (run.spec.kind, run.spec.text_columns, run.spec.labels) == (
        "classification",
        ("sentence",),
        ("negative", "positive"),
    )
    data = {"train": ["a.csv"], "tokenizer": "t", "text_columns": ["x", "y"], "label_column": "z", "labels": ["n", "p"]}
    run = load_config(write(labelled(task="classification", data=data)))
    assert (run.spec.text_columns, run.spec.label_column, run.spec.labels) == (("x", "y"), "z", ("n", "p"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "sst3"}, "task: 'sst3' is no task; did you mean sst2?"),
        ({"task": "x"}, "task: 'x' is no task; known are causal-lm, cola, sst2"),
        ({"filters": {"token_fraction": 0.5}}, "task: sst2 has no use for filters.token_fraction: remove it"),
        ({"task": "squad", "data": {"train": ["a"], "tokenizer": "t", "labels": ["a", "b"]}}, "no use for data.labels"),
        ({"task": "causal-lm", "loss": {"mask_padding": False}}, "task: causal-lm has no use for loss.mask_padding"),
        ({"task": "classification"}, "task: classification needs data.text_columns: name them"),
        (
            {"task": "classification", "data": {"train": ["a"], "tokenizer": "t", "text_columns": ["x"]}},
            "task: classification needs data.labels: name them",
        ),
        (
            {"data": {"train": ["a"], "tokenizer": "t", "extra_validation": {"train": ["b"]}}},
            "data.extra_validation: the name 'train' is taken",
        ),
        (
            {"loss": {"kl_top_k": 64, "divergence": "reverse"}},
            "loss.kl_top_k (64) is for the forward KL, loss.divergence is reverse: remove one of them",
        ),
        ({"train": {"steps": 5, "epochs": 2}}, "train.steps (5) and train.epochs (2) exclude each other"),
        ({"filters": {"steps": 5, "epochs": 0.5}}, "filters.steps (5) and filters.epochs (0.5) exclude each other"),
        ({"student": {"init_from_pretrained": True}}, "student.init_from_pretrained needs student.pretrained"),
        (
            {"student": {"pretrained": "p", "init_from_pretrained": True}},
            "method: ted learns the student's filters on a fine-tuned student",
        ),
        ({"train": {"evaluate_every": "week"}}, "train.evaluate_every: 'week' is not allowed"),
        ({"filters": {"learning_rate": -1}}, "filters.learning_rate: "),
        ({"filters": {"learning_rate": {"teacher": 1.0}}}, "filters.learning_rate.student: is missing"),
    ],
)
def test_faults_of_tasks_show_the_remedy(write, changes, message):
    assert message in fault(write(labelled(**changes)))


def test_each_method_may_have_its_own_values(write):
    methods = {
        "kd": {"loss": {"kl_alpha": 5}},
        "ted": {"loss": {"kl_alpha": 4, "mse_alpha": 7}, "train": {"steps": 3}},
    }
    path = write(labelled(methods=methods, train={"steps": 9, "micro_batch_size": 2}))
    ted, kd, ce = (load_config(path, [f"--method={m}"] if m != "ted" else []) for m in ("ted", "kd", "ce"))
    assert (ted.loss.kl_alpha, ted.loss.mse_alpha, ted.train.steps, ted.train.micro_batch_size) == (4, 7, 3, 2)
    assert (kd.loss.kl_alpha, kd.loss.mse_alpha, kd.train.steps) == (5, 0, 9)
    assert (ce.loss.kl_alpha, ce.loss.mse_alpha) == (0, 0)
    assert load_config(path, ["--loss.kl_alpha=1"]).loss.kl_alpha == 1
    assert "methods.tedd: unknown method; known are ce, kd, lwd, ted" in fault(write(labelled(methods={"tedd": {}})))
    assert "methods: is [1], not a mapping" in fault(write(labelled(methods=[1])))


def test_epochs_become_steps_with_the_data(write, tmp_path):
    train = {"epochs": 1.5, "global_batch_size": 32, "evaluate_every": "epoch", "save_every": 10}
    run = load_config(write(labelled(train=train))).resolved(1000)
    assert (run.train.steps, run.train.evaluate_every, run.train.save_every) == (47, 32, 10)
    unresolved = load_config(write(labelled(train=train)))
    dump_config(unresolved, tmp_path / "dumped.yaml", {})
    assert load_config(tmp_path / "dumped.yaml") == unresolved
    assert load_config(write(labelled())).resolved(1000).train.steps == 1000


def test_one_value_serves_both_models(write):
    run = load_config(write(labelled(filters={"learning_rate": 0.1, "warmup_steps": {"teacher": 3, "student": 0}})))
    assert (run.filters.learning_rate.teacher, run.filters.learning_rate.student) == (0.1, 0.1)
    assert run.filters.warmup_steps is not None
    assert (run.filters.warmup_steps.teacher, run.filters.warmup_steps.student) == (3, 0)


AUTHORS = {
    # kl_alpha, mse_alpha of kd, lwd, ted; learning rate, batch, epochs or steps of warm-up of the student
    "mnli": ((5, 0), (5, 100), (5, 7500), 7e-5, 64, 3, 1500),
    "qqp": ((20, 0), (20, 20), (20, 1000), 6e-5, 64, 8, 5000),
    "qnli": ((20, 0), (20, 10), (20, 100), 5e-5, 32, 3, 500),
    "sst2": ((20, 0), (20, 20), (20, 20), 4e-5, 32, 6, 0),
    "rte": ((20, 0), (20, 20), (20, 50), 6e-5, 16, 6, 0),
    "cola": ((20, 0), (0, 5), (0, 10), 6e-5, 32, 6, 0),
    "mrpc": ((20, 0), (20, 5), (20, 100), 7e-5, 32, 6, 0),
    "stsb": ((20, 0), (20, 5), (20, 50), 1e-4, 16, 6, 100),
    "squad_v2": ((10, 0), (10, 100), (10, 5000), 5e-5, 8, 3, 0),
    "squad": ((10, 0), (10, 100), (10, 5000), 5e-5, 8, 3, 0),
}


@pytest.mark.parametrize("task", AUTHORS)
def test_the_recipes_of_tasks_have_the_authors_hyper_parameters(task):
    kd, lwd, ted, rate, batch, epochs, warmup = AUTHORS[task]
    path = ROOT / f"launchers/recipes/{task}.yaml"
    for method, alphas in (("kd", kd), ("lwd", lwd), ("ted", ted), ("ce", (0, 0))):
        run = load_config(path, [f"--method={method}"])
        assert (run.loss.kl_alpha, run.loss.mse_alpha) == alphas
        assert (run.optimizer.learning_rate, run.optimizer.warmup_steps) == (rate, warmup)
        assert (run.train.global_batch_size, run.train.epochs) == (batch, epochs)
        assert (run.task, run.loss.layer_loss, run.loss.mask_padding, run.seed) == (task, "mse", False, 42)
    assert load_config(path, ["--method=kd", "--student.init_from_pretrained=true"]).student.pretrained


def own_data(labels: str = '["no", "yes"]', more: str = "") -> str:
    return (
        "task: classification\nmethod: ce\noutput_dir: o\nstudent: {model: m}\n"
        f"data: {{train: a, tokenizer: t, text_columns: [a], labels: {labels}{more}}}\n"
    )


MISREAD: list[tuple[str, str, str]] = [
    ("[no, yes]", "", 'data.labels.0: YAML reads no as false: quote it: "no"'),
    ("[off, On]", "", 'data.labels.1: YAML reads On as true: quote it: "On"'),
    ("[1, 2]", "", 'data.labels.1: YAML reads 2 as a number: quote it: "2"'),
    ("[010, a]", "", 'data.labels.0: YAML reads 010 as a number: quote it: "010"'),
    ("[1_000, a]", "", 'data.labels.0: YAML reads 1_000 as a number: quote it: "1_000"'),
    ("[1.50, a]", "", 'data.labels.0: YAML reads 1.50 as a number: quote it: "1.50"'),
    ("[a, null]", "", 'data.labels.1: YAML reads null as nothing: quote it: "null"'),
    ("[a, 2024-01-01]", "", 'data.labels.1: YAML reads 2024-01-01 as a date: quote it: "2024-01-01"'),
    ("[a, TRUE]", "", "data.labels.1: YAML reads TRUE as a boolean, and no, yes, on and off too: quote the word"),
    ("[a, b]", ", text_column: on", 'data.text_column: YAML reads on as true: quote it: "on"'),
    ("[a, b]", ", label_column: 3", 'data.label_column: YAML reads 3 as a number: quote it: "3"'),
    ("[a, b]", ", validation: [no, a]", 'data.validation.0: YAML reads no as false: quote it: "no"'),
    ("[a, b]", ", validation: {hub: 7}", 'data.validation.hub: YAML reads 7 as a number: quote it: "7"'),
    ("[a, b]", ", text_column: ", "data.text_column: is empty: give it a value"),
    (
        "[a, b]",
        ", extra_validation: {no: a}",
        'r.yaml:5: not valid YAML: a key: YAML reads no as false: quote it: "no"',
    ),
    ("[a, b]", "}\non: {a: 1", 'r.yaml:6: not valid YAML: a key: YAML reads on as true: quote it: "on"'),
    ("[a, b]", "}\n? [a]\n: {a: 1", "r.yaml:6: not valid YAML: the key ['a'] is no word"),
    ("[a, b]", "}\nteacher: {model: 2024-01-01", "teacher.model: YAML reads 2024-01-01 as a date: quote it"),
    ("[a, b]", "}\nteacher: {model: t, cache: no", "teacher.cache: False is not allowed"),  # is no folder's name
    ("[a, b]", ", validation: off", "data.validation: YAML reads off as false: quote it"),
    ("[a, b]", ", sequence_length: on", "data.sequence_length: True is not allowed: should be a number, not true, on"),
    ("[a, b]", "}\ntrain: {steps: yes", "train.steps: True is not allowed: should be a number"),
    ("[a, b]", "}\noptimizer: {learning_rate: y3, weight_decay: on", "optimizer.weight_decay: True is not allowed"),
    ("[a, b]", "}\nfilters: {learning_rate: {teacher: on, student: 1}", "filters.learning_rate.teacher: True is not"),
    ("[a, b]", "}\nmethods: {ce: {data: {labels: [no, a]}}", "data.labels.0: YAML reads false as a boolean, and no, "),
]


@pytest.mark.parametrize(("labels", "more", "message"), MISREAD)
def test_words_that_yaml_reads_as_something_else_are_to_be_quoted(write, labels: str, more: str, message: str) -> None:
    assert message in fault(write(own_data(labels, more)))


def test_a_label_is_named_once(write) -> None:
    for labels in ("[a, b, a]", "[a, ' a']"):
        assert "data.labels has 'a' twice: name each label once" in fault(write(own_data(labels)))


def test_quoted_words_are_words(write) -> None:
    words = ("no", "1", "010", "null", "2024-01-01")
    assert load_config(write(own_data(str(list(words))))).data.labels == words


def test_overrides_are_to_be_quoted_too(write) -> None:
    path = write(own_data("[no, yes]"))
    assert fault(path, "--data.labels=[a, b]", "--data.labels=[3, off]") == (
        'the command line: data.labels.0: YAML reads 3 as a number: quote it: "3"\n'
        'the command line: data.labels.1: YAML reads off as false: quote it: "off"'
    )
    assert fault(path, "--data.labels=[a, b]", "--data.extra_validation", "{no: a}") == (
        'the command line: --data.extra_validation={no: a}: a key: YAML reads no as false: quote it: "no"'
    )
    assert load_config(path, ["--data.labels=['3', \"off\"]"]).data.labels == ("3", "off")


def test_a_method_that_is_no_word_is_a_fault(write) -> None:
    assert "method: ['ce'] is not allowed: should be 'ce'" in fault(write(recipe(method=["ce"])))
