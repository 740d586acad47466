"""Tasks as a user starts them: the fine-tuning launcher on two ranks, scoring, preparing, and what is refused."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification, AutoTokenizer

from ted_ds.cli.report import main as report
from tests.integration.test_commands import DEEPSPEED, TED_DS, run
from tests.task_project import make_task_project, write_task_recipe

FINETUNE = [*DEEPSPEED, "launchers/finetune.sh"]
"""A launcher is Python as well: started by itself it is one rank, and spares DeepSpeed's own start."""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_task_project(tmp_path_factory.mktemp("tasks"), "sst2")


def test_the_launcher_fine_tunes_and_does_not_start_over(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_task_recipe(project, "sst2", "ted")
    run(*FINETUNE, "--config", path)
    summary = json.loads((project / "ted/summary.json").read_text())
    assert (summary["method"], summary["steps"]) == ("ted", 6)
    before = (project / "ted/metrics.jsonl").read_text()
    again = run(sys.executable, "launchers/finetune.sh", "--config", path)
    assert "is complete (6 steps); nothing to do" in again.stdout + again.stderr
    assert (project / "ted/metrics.jsonl").read_text() == before

    student, data = project / "ted/student", project / "validation.tsv"
    command = [*TED_DS, "evaluate", student, "--task", "sst2", "--data", data, "--tokenizer", project / "tokenizer"]
    found = json.loads(run(*command, "--sequence-length", "32").stdout)
    model = AutoModelForSequenceClassification.from_pretrained(student).eval()
    tokenizer = AutoTokenizer.from_pretrained(student)
    hits = []
    with data.open(newline="") as file, torch.no_grad():
        for row in csv.DictReader(file, delimiter="\t"):
            logits = model(**tokenizer(row["sentence"], return_tensors="pt")).logits[0]
            hits.append(model.config.id2label[int(logits.argmax())] == ("negative", "positive")[int(row["label"])])
    assert len(hits) == 21
    assert found == {"model": str(student), "accuracy": pytest.approx(sum(hits) / 21)}
    assert found["accuracy"] == pytest.approx(summary["validation_accuracy"])

    assert report([str(project / "ted"), "--spread"]) == 0
    spread = [line.split() for line in capsys.readouterr().out.splitlines()]
    number = f"{sum(hits) / 21:.4f}"
    assert spread[1] == ["sst2", "ted", "1", "accuracy", number, "-", number, number]


@pytest.mark.parametrize(
    ("launcher", "task", "message"),
    [
        ("pretrain", "sst2", "task: sst2 is for launchers/finetune.sh, this is pretrain.sh: start that one"),
        ("finetune", "causal-lm", "task: causal-lm is for launchers/pretrain.sh, this is finetune.sh: start that one"),
        ("finetune", "sst3", "task: 'sst3' is no task; did you mean sst2?"),
    ],
)
def test_a_recipe_for_another_launcher_is_refused(project: Path, launcher: str, task: str, message: str) -> None:
    data = {"sequence_length": 32, "prepared": str(project / "data"), "tokenizer": str(project / "tokenizer")}
    data |= {"train": [str(project / "train.tsv")]}
    path = write_task_recipe(project, "sst2", f"{launcher}-{task}", task=task, data=data)
    done = run(sys.executable, f"launchers/{launcher}.sh", "--config", path, code=2)
    assert done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("ted_ds: ") and message in done.stderr


def test_questions_are_scored_as_a_plain_loop_scores_them(tmp_path: Path) -> None:
    project = make_task_project(tmp_path, "squad_v2")
    command = [*TED_DS, "evaluate", project / "student", "--task", "squad_v2", "--data", project / "validation.json"]
    found = json.loads(
        run(*command, "--tokenizer", project / "tokenizer", "--sequence-length", "60", "--doc-stride", "9").stdout
    )
    model = AutoModelForQuestionAnswering.from_pretrained(project / "student").eval()
    tokenizer = AutoTokenizer.from_pretrained(project / "tokenizer")
    exact, shared, golds = [], [], []
    for paragraph in json.loads((project / "validation.json").read_text())["data"][0]["paragraphs"]:
        (question,) = paragraph["qas"]
        inputs = tokenizer(question["question"], paragraph["context"], return_tensors="pt")
        with torch.no_grad():
            output = model(**inputs)
        starts, ends = output.start_logits[0], output.end_logits[0]
        first, last = 5, len(starts) - 2  # [CLS], three words, [SEP]; the context; [SEP]
        assert last < 60  # every context in one window
        # BERT's script: spans of the 20 best starts and ends, of at most 30 tokens
        spans = [
            (float(starts[s] + ends[e]), s, e)
            for s in starts.argsort(descending=True)[:20].tolist()
            for e in ends.argsort(descending=True)[:20].tolist()
            if first <= s <= e <= last and e - s < 30
        ]
        score, start, end = max(spans, default=(-1e9, 0, -1))
        words = paragraph["context"].split()[start - first : end - first + 1]
        if float(starts[0] + ends[0]) > score:
            words = []
        gold = [answer["text"] for answer in question["answers"]]
        exact.append(words == gold)
        # one gold word: precision 1 / n where it is among the n, recall 1
        shared.append(2 / (len(words) + 1) if gold and gold[0] in words else float(words == gold))
        golds.append(bool(gold))
    assert 0 < sum(golds) < 21 and any(shared)
    assert found["exact"] == pytest.approx(100 * sum(exact) / 21)
    assert found["f1"] == pytest.approx(100 * sum(shared) / 21)
    answered = [s for s, gold in zip(shared, golds, strict=True) if gold]
    assert found["HasAns_f1"] == pytest.approx(100 * sum(answered) / len(answered))


def test_prepare_encodes_a_recipes_splits(project: Path) -> None:
    path = write_task_recipe(project, "sst2", "prepared", data__prepared=str(project / "prepared-data"))
    lines = run(*TED_DS, "prepare", "--config", path).stdout.splitlines()
    tokens = {}
    for split in ("train", "validation"):
        texts = [line.split("\t")[0] for line in (project / f"{split}.tsv").read_text().splitlines()[1:]]
        tokens[split] = sum(len(text.split()) + 2 for text in texts)  # [CLS] and [SEP]
    assert lines == [
        f"{project}/prepared-data/train: 48 rows, {tokens['train']} tokens",
        f"{project}/prepared-data/validation: 21 rows, {tokens['validation']} tokens",
    ]
    assert not (project / "prepared").exists()  # no run was started
