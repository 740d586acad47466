"""Tasks through the whole job: the same losses however it is split, what it leaves behind, how bad input ends."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from ted_ds.telemetry.recorder import read_metrics
from tests.jobs import pretrain_error, pretrain_recipe
from tests.marks import slow
from tests.task_project import KL_ROUNDING, make_task_project, model_folder, write_task_recipe
from tests.workers import Workers

Group = Callable[[int], Workers]
TERMS = ("step", "tokens", "loss", "pred_loss", "kl_loss", "layer_loss")
ZERO0 = "--deepspeed=ds_configs/zero0.json"

SHORT: dict[str, Any] = {"filters__steps": 4, "train__steps": 4, "train__evaluate_every": 2, "train__save_every": 0}
START: dict[str, Any] = {"filters__steps": 2, "train__steps": 2, "train__evaluate_every": 0}
"""Where the first step shows it."""

SPLITS: dict[str, tuple[int, tuple[str, ...]]] = {
    "2 ranks x 2": (2, ()),
    "the whole batch at once": (1, ("--train.micro_batch_size=8",)),
    "4 ranks x 1, and whatever else may be chosen": (
        4,
        (ZERO0, "--teacher.sharding=replicated", "--student.activation_checkpointing=true"),
    ),
}
EVERY, SOME = tuple(SPLITS), ("2 ranks x 2",)

CASES: dict[str, tuple[str, str, dict[str, Any], tuple[str, ...]]] = {
    "classification": ("mnli", "bert", {}, EVERY),
    "deberta, padding counted": (
        "sst2",
        "deberta-v2",
        {"loss__mask_padding": False, "loss__layer_loss": "mse"},
        SOME,
    ),
    # Stage I of questions has gradients that are zero but for rounding, which Adam blows up to its rate
    "questions": ("squad_v2", "roberta", {"method": "lwd"}, SOME),
    "decoder": ("sst2", "llama", {}, SOME),
}


@pytest.fixture(scope="module")
def projects(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[tuple[str, str], Path] = {}

    def project(task: str, family: str = "bert") -> Path:
        if (task, family) not in made:
            made[task, family] = make_task_project(tmp_path_factory.mktemp(task), task, family=family)
        return made[task, family]

    return project


def terms_of(folder: Path) -> list[dict[str, Any]]:
    return [{name: line[name] for name in TERMS} for line in read_metrics(folder) if "loss" in line]


def scores_of(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k.startswith("validation_")} for line in read_metrics(folder)]


def assert_same(ours: Path, expected: Path) -> None:
    assert len(terms_of(ours)) == len(terms_of(expected)) >= SHORT["train__steps"]
    for a, b in zip(terms_of(ours), terms_of(expected), strict=True):
        assert a == pytest.approx(b, rel=2e-5, abs=KL_ROUNDING), (ours, a, b)
    for a, b in zip(scores_of(ours), scores_of(expected), strict=True):
        assert a == pytest.approx(b, rel=1e-4), (ours, a, b)


@pytest.mark.parametrize("case", [slow(case) if case == "decoder" else case for case in CASES])
def test_a_task_does_not_depend_on_how_it_is_split(projects: Callable[..., Path], workers: Group, case: str) -> None:
    task, family, changes, splits = CASES[case]
    project = projects(task, family)
    whole = write_task_recipe(project, task, "one", **SHORT, **changes)
    workers(1).run(pretrain_recipe, whole)
    for split in splits:
        ranks, overrides = SPLITS[split]
        path = write_task_recipe(project, task, "-".join(split.replace(",", "").split()), **SHORT, **changes)
        workers(ranks).run(pretrain_recipe, path, overrides)
        assert_same(project / path.stem, project / "one")
        for side in ("teacher", "student") if changes.get("method") != "lwd" else ():
            stage1 = [
                [line["loss"] for line in read_metrics(project / n / f"{side}_filters")] for n in (path.stem, "one")
            ]
            assert stage1[0] == pytest.approx(stage1[1], rel=2e-5)


def test_a_regressions_kl_is_that_of_the_global_batch(projects: Callable[..., Path], workers: Group) -> None:
    project = projects("stsb")
    settings = {"optimizer__schedule": "constant", "loss__layer_fade": 0, "train__micro_batch_size": 4}
    whole, moved = (write_task_recipe(project, "stsb", name, **settings) for name in ("on-1", "on-2-then-1"))
    workers(1).run(pretrain_recipe, whole, ("--train.micro_batch_size=8",))
    workers(2).run(pretrain_recipe, moved, ("--train.steps=3",))
    # one rank alone has to take all rows of a step at once
    workers(1).run(pretrain_recipe, moved, ("--train.micro_batch_size=8",))
    assert_same(project / moved.stem, project / "on-1")
    assert terms_of(project / "on-1")[0]["kl_loss"] > 0
    (message,) = workers(1).run(pretrain_error, write_task_recipe(project, "stsb", "split"))
    assert (
        "task: stsb with loss.kl_alpha 1 compares a step's rows" in message and "train.micro_batch_size to 8" in message
    )


@pytest.mark.parametrize("method", [slow("ce"), "kd", slow("lwd")])
def test_every_method_starts_from_the_same_student(projects: Callable[..., Path], workers: Group, method: str) -> None:
    project = projects("sst2")
    paths = [write_task_recipe(project, "sst2", f"start-{m}", **START, method=m) for m in ("ted", method)]
    for path, m in zip(paths, ("ted", method), strict=True):
        alphas = {"ce": ("kl_alpha", "mse_alpha"), "kd": ("mse_alpha",)}.get(m, ())
        workers(2).run(pretrain_recipe, path, tuple(f"--loss.{a}=null" for a in alphas))
    first, second = (terms_of(project / path.stem)[0]["pred_loss"] for path in paths)
    assert first == pytest.approx(second, rel=1e-6)
    assert scores_of(project / paths[0].stem)[0] == scores_of(project / paths[1].stem)[0]


def test_a_run_leaves_the_best_student_and_goes_on_after_a_stop(projects: Callable[..., Path], workers: Group) -> None:
    project = projects("mnli")
    extra = {"data__extra_validation": {"mismatched": [str(project / "train.tsv")]}}
    settings = {**extra, "optimizer__schedule": "constant", "train__evaluate_every": 1, "train__steps": 6}
    settings |= {"filters__steps": 2, "loss__layer_fade": 0}  # fading and schedules follow from the steps
    path = write_task_recipe(project, "mnli", "whole", **settings)
    workers(2).run(pretrain_recipe, path)
    folder = project / "whole"
    summary = json.loads((folder / "summary.json").read_text())
    lines = read_metrics(folder)
    accuracies = [line["validation_accuracy"] for line in lines[1:]]
    assert summary["best_step"] == 1 + accuracies.index(max(accuracies))
    assert summary["validation_accuracy"] == max(accuracies)
    assert summary["mismatched_accuracy"] == lines[summary["best_step"]]["mismatched_accuracy"]
    assert sum("mismatched_accuracy" in line for line in lines) < len(lines)  # at a new best alone
    card = json.loads((folder / "best/ted_ds.json").read_text())
    assert card["best_step"] == summary["best_step"]
    best, student = (load_file(folder / n / "model.safetensors") for n in ("best", "student"))
    assert best.keys() == student.keys() and all(torch.equal(best[k], student[k]) for k in best)
    assert not (folder / "student/ted_ds.json").exists()
    plain = AutoModelForSequenceClassification.from_pretrained(folder / "student")
    assert plain.config.id2label == {0: "contradiction", 1: "entailment", 2: "neutral"}

    halves = write_task_recipe(project, "mnli", "halves", **settings)
    workers(2).run(pretrain_recipe, halves, ("--train.steps=3",))
    workers(2).run(pretrain_recipe, halves)
    assert terms_of(project / "halves") == terms_of(folder)
    again = json.loads((project / "halves/summary.json").read_text())
    assert {k: again[k] for k in card} == {k: summary[k] for k in card}


@pytest.mark.parametrize(
    ("task", "family", "dtype"),
    [
        slow("stsb", "electra", "float32"),
        slow("mnli", "xlm-roberta", "bfloat16"),
        ("squad_v2", "deberta-v2", "bfloat16"),
        slow("squad", "modernbert", "float32"),
        slow("mnli", "qwen2", "bfloat16"),
    ],
)
def test_families_go_through_all_stages(
    projects: Callable[..., Path], workers: Group, task: str, family: str, dtype: str
) -> None:
    project = projects(task, family)
    short = {"train__steps": 2, "filters__steps": 2, "train__evaluate_every": 1, "train__micro_batch_size": 4}
    losses = {}
    for name in dict.fromkeys(("float32", dtype)):
        dtypes = {"teacher__dtype": name, "student__dtype": name}
        workers(2).run(pretrain_recipe, write_task_recipe(project, task, f"family-{name}", **short, **dtypes))
        losses[name] = terms_of(project / f"family-{name}")[0]["loss"]
    assert losses[dtype] == pytest.approx(losses["float32"], rel=0.1)
    metrics = {"squad": "f1", "squad_v2": "f1", "stsb": "spearman"}
    assert f"validation_{metrics.get(task, 'accuracy')}" in read_metrics(project / "family-float32")[-1]


def test_a_finished_runs_best_student_is_not_exported_over(projects: Callable[..., Path], workers: Group) -> None:
    project = projects("sst2")
    # neither kl nor layers: the teacher is not looked at
    changes = {"method": "ce", "loss__mse_alpha": None, "teacher__model": "no/where", "train__steps": 2}
    path = write_task_recipe(project, "sst2", "over", **changes)
    workers(2).run(pretrain_recipe, path)
    (message, _) = workers(2).run(pretrain_error, path, (), "export")
    assert "is complete: its student is in" in message


def test_recipes_in_epochs(projects: Callable[..., Path], workers: Group) -> None:
    project = projects("sst2")
    changes = {"train__steps": None, "train__epochs": 1.5, "filters__steps": None, "filters__epochs": 1}
    changes |= {"train__evaluate_every": "epoch", "train__save_every": "epoch"}
    changes |= {"train__global_batch_size": 12, "train__micro_batch_size": 6, "filters__warmup_steps": 1}
    changes |= {"filters__global_batch_size": {"teacher": 24, "student": 12}}
    changes |= {"filters__learning_rate": {"teacher": 0.01, "student": 0.02}}
    path = write_task_recipe(project, "sst2", "epochs", **changes)
    workers(2).run(pretrain_recipe, path)
    lines = read_metrics(project / "epochs")
    assert lines[-1]["step"] == 6  # 1.5 * 48 / 12
    assert [line["step"] for line in lines if "validation_accuracy" in line] == [0, 4, 6]
    assert [read_metrics(project / f"epochs/{s}_filters")[-1]["step"] for s in ("teacher", "student")] == [2, 4]
    rates = [read_metrics(project / f"epochs/{s}_filters")[0]["lr"] for s in ("teacher", "student")]
    assert rates == [0.01, 0.02]
    before = (project / "epochs/metrics.jsonl").read_text()
    workers(2).run(pretrain_recipe, path)
    assert (project / "epochs/metrics.jsonl").read_text() == before


@pytest.mark.parametrize("family", ["deberta-v2", slow("modernbert"), slow("llama")])
def test_a_student_starts_from_a_pretrained_model(tmp_path: Path, workers: Group, family: str) -> None:
    project = make_task_project(tmp_path, "sst2", family=family)
    model = AutoModelForSequenceClassification.from_pretrained(project / "student")
    model.base_model.save_pretrained(project / "pretrained")
    (project / "pretrained/config.json").write_text(model.config.to_json_string())
    start = {**START, "method": "kd", "loss__mse_alpha": None, "student__pretrained": str(project / "pretrained")}
    path = write_task_recipe(project, "sst2", "fresh", **start, student__init_from_pretrained=True)
    workers(2).run(pretrain_recipe, path)
    other = AutoModelForSequenceClassification.from_pretrained(project / "pretrained", num_labels=2)
    other.save_pretrained(project / "headed")  # a head of its own does not count
    start["student__pretrained"] = str(project / "headed")
    headed = write_task_recipe(project, "sst2", "headed-run", **start, student__init_from_pretrained=True)
    workers(2).run(pretrain_recipe, headed, (), "student")
    own, again = (load_file(project / n / "initial_student/model.safetensors") for n in ("fresh", "headed-run"))
    assert all(torch.equal(own[name], again[name]) for name in own)
    base = load_file(project / "pretrained/model.safetensors")
    prefix = model.base_model_prefix
    assert all(torch.equal(own[f"{prefix}.{name}"], tensor) for name, tensor in base.items())
    head = next(name for name in own if name.endswith(("classifier.weight", "score.weight")))
    assert not torch.equal(own[head], model.state_dict()[head])
    (message, _) = workers(2).run(
        pretrain_error, write_task_recipe(project, "sst2", "no-head", student__model=str(project / "pretrained"))
    )
    assert "was not fine-tuned on such a task" in message and "student.init_from_pretrained: true" in message


@pytest.mark.parametrize(
    ("task", "init"),
    [
        (
            "sst2",
            {"config": {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}},
        ),
        ("squad", {"num_blocks": 2}),
    ],
)
def test_stage_0_makes_students_of_tasks(
    projects: Callable[..., Path], workers: Group, task: str, init: dict[str, Any]
) -> None:
    project = projects(task)
    path = write_task_recipe(project, task, "stage0", **START, student={"dtype": "float32", "init": init})
    workers(2).run(pretrain_recipe, path)
    config = json.loads((project / "stage0/initial_student/config.json").read_text())
    assert config["num_hidden_layers"] == 2
    assert task != "sst2" or config["id2label"] == {"0": "negative", "1": "positive"}


def test_a_tokenizer_is_trained_on_the_tasks_texts(tmp_path: Path, workers: Group) -> None:
    project = make_task_project(tmp_path, "sst2")
    shutil.rmtree(project / "tokenizer")
    config = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    student = {"dtype": "float32", "init": {"config": config}}
    changes = {**START, "method": "ce", "teacher": None, "loss__mse_alpha": None, "data__train_tokenizer": 80}
    path = write_task_recipe(project, "sst2", "trained", student=student, **changes)
    workers(2).run(pretrain_recipe, path)
    vocabulary = json.loads((project / "tokenizer/tokenizer.json").read_text())["model"]["vocab"]
    assert len(vocabulary) <= 80 and vocabulary["[PAD]"] == 0 and "w17" in vocabulary


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "a missing column": (
        "sst2",
        {"data__text_columns": ["phrase"]},
        "train.tsv has no column 'phrase', only sentence, label",
    ),
    "a task of other labels": ("sst2", {"task": "mnli"}, "has 2 labels (negative, positive), the task has 3"),
    "a model family without a pooler": (
        "sst2",
        {"teacher__model": "xlnet"},
        "xlnet is a model family without a pooler",
    ),
    "a model of other outputs": ("stsb", {"task": "sst2"}, "has 1 labels"),
    "K that differs": ("sst2", {"filters__layer_map": [[0, 1], [1, 4]]}, "pair [1, 4]"),
    "rows longer than the models' positions": ("sst2", {"data__sequence_length": 67}, "has 66 positions"),
    "more rows a step than there are": ("sst2", {"train__global_batch_size": 64}, "the training data has 48 rows"),
    "a batch of Stage I that does not divide": (
        "sst2",
        {"filters__global_batch_size": {"teacher": 8, "student": 6}},
        "filters.global_batch_size (6) must be a multiple of train.micro_batch_size (2) * world_size (2) = 4",
    ),
    "a stride without room": ("squad", {"data__doc_stride": 30}, "data.doc_stride (30)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_one_sentence_on_every_rank(
    projects: Callable[..., Path], workers: Group, case: str
) -> None:
    task, changes, expected = BAD[case]
    project = projects(task)
    if case.endswith("without a pooler") and not (project / "xlnet").exists():
        from transformers import XLNetConfig, XLNetForSequenceClassification

        config = XLNetConfig(vocab_size=61, d_model=24, n_layer=4, n_head=2, d_inner=48)
        config.id2label = {0: "negative", 1: "positive"}
        XLNetForSequenceClassification(config).save_pretrained(project / "xlnet")
    if "teacher__model" in changes:
        changes = {**changes, "teacher__model": str(project / changes["teacher__model"])}
    name = "bad-" + "-".join(case.replace("'", "").split())
    path = write_task_recipe(project, task, name, **changes, data__prepared=str(project / name / "data"))
    for message in workers(2).run(pretrain_error, path):
        assert expected in message and "\n" not in message


def test_a_teacher_of_other_labels_is_refused(tmp_path: Path, workers: Group) -> None:
    project = make_task_project(tmp_path, "sst2")
    model_folder(project / "teacher", "mnli", "bert", seed=1, blocks=4, width=24)
    (message, _) = workers(2).run(pretrain_error, write_task_recipe(project, "sst2", "labels"))
    assert "has 3 labels (contradiction, entailment, neutral), the task has 2 (negative, positive)" in message


def test_an_answer_that_is_not_in_its_context_is_named(tmp_path: Path, workers: Group) -> None:
    project = make_task_project(tmp_path, "squad")
    content = json.loads((project / "train.json").read_text())
    content["data"][0]["paragraphs"][5]["qas"][0]["answers"][0]["text"] = "elsewhere"
    (project / "train.json").write_text(json.dumps(content))
    for message in workers(2).run(pretrain_error, write_task_recipe(project, "squad", "answers")):
        assert "question q5 in" in message and "'elsewhere' is not" in message
