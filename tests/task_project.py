"""Small labelled data, a tokenizer and models on disk, for tests that run recipes of tasks."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, PreTrainedTokenizerFast

from ted_ds.models.task_head import AUTO_CLASSES
from tests.project import changed
from tests.tiny_encoders import encoder_config

VOCAB = 61
GOOD, BAD = range(5, 30), range(30, VOCAB)
"""Ids of the words that positive and negative texts are made of."""

KL_ROUNDING = 5e-7
"""Half a step of float32 for log-probabilities around 2, times T^2 = 4: a regression's KL here is below 1e-3."""

KINDS: dict[str, Any] = {
    "sst2": "classification",
    "mnli": "classification",
    "stsb": "regression",
    "squad": "question-answering",
    "squad_v2": "question-answering",
}


def make_task_project(folder: Path, task: str, *, family: str = "bert", seed: int = 0) -> Path:
    """folder/{tokenizer, train.*, validation.*, teacher, student}: learnable rows, random models with task heads."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder / "tokenizer")
    draw = random.Random(seed)
    for split, count in (("train", 48), ("validation", 21)):
        if task.startswith("squad"):
            write_questions(folder / f"{split}.json", count, draw, impossible=task == "squad_v2")
        else:
            write_rows(folder / f"{split}.tsv", task, count, draw)
    for name, sizes in (("teacher", {"blocks": 4, "width": 24}), ("student", {"blocks": 2, "width": 16})):
        model_folder(folder / name, task, family, seed=len(name), **sizes)
    return folder


def write_tokenizer(folder: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(5, VOCAB))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=core, **{f"{k}_token": v for k, v in names.items()})
    wrapped.save_pretrained(folder)


def text_of(words: range, draw: random.Random, least: int = 2, most: int = 14) -> str:
    return " ".join(f"w{draw.choice(words)}" for _ in range(draw.randint(least, most)))


def write_rows(path: Path, task: str, count: int, draw: random.Random) -> None:
    """GLUE's layout; a text of good words is positive, entailed, or 4 of 5."""
    lines = {
        "sst2": ["sentence\tlabel"],
        "mnli": ["index\tsentence1\tsentence2\tgold_label"],
        "stsb": ["index\tsentence1\tsentence2\tscore"],
    }[task]
    for i in range(count):
        good = draw.random() < 0.5
        text = text_of(GOOD if good else BAD, draw)
        if task == "sst2":
            lines.append(f"{text}\t{int(good)}")
        else:
            label = {"mnli": ("contradiction", "entailment")[good], "stsb": f"{1 + 3 * good + draw.random():.3f}"}[task]
            lines.append(f"{i}\t{text}\t{text_of(GOOD, draw)}\t{label}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_questions(path: Path, count: int, draw: random.Random, *, impossible: bool) -> None:
    """SQuAD's layout; the answer is the word of the context that the question names."""
    paragraphs = []
    for i in range(count):
        words = text_of(BAD, draw, 8, 40).split()
        place = draw.randrange(len(words))
        context = " ".join([*words[:place], "w7", words[place], "w8", *words[place + 1 :]])
        answer = {"text": words[place], "answer_start": len(" ".join([*words[:place], "w7"])) + 1}
        answers = [] if impossible and i % 3 == 0 else [answer]
        qas = [{"id": f"q{i}", "question": "w7 w9 w8", "answers": answers, "is_impossible": not answers}]
        paragraphs.append({"context": context, "qas": qas})
    path.write_text(json.dumps({"version": "t", "data": [{"title": "t", "paragraphs": paragraphs}]}), encoding="utf-8")


def model_folder(folder: Path, task: str, family: str, *, seed: int, **sizes: int) -> None:
    """A random model with the task's head and label names, and no tokenizer."""
    labels: dict[str, Any] = {
        "sst2": {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}},
        "mnli": {"id2label": {0: "contradiction", 1: "entailment", 2: "neutral"}},
        "stsb": {"num_labels": 1},
    }.get(task, {})
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**encoder_config(family, vocab=VOCAB, **sizes), **labels)
    model = AUTO_CLASSES[KINDS[task]].from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 1.0 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder)


def write_task_recipe(project: Path, task: str, output: str, /, **changes: Any) -> Path:
    """A recipe for the project as a YAML file; `changes` by dotted key with `__` for the dot."""
    suffix = "json" if task.startswith("squad") else "tsv"
    base: dict[str, Any] = {
        "task": task,
        "method": "ted",
        "output_dir": str(project / output),
        "teacher": {"model": str(project / "teacher"), "dtype": "float32"},
        "student": {"dtype": "float32", "model": str(project / "student")},
        "filters": {"steps": 6, "learning_rate": 0.01, "output_dim": 8, "skip_last": 0},
        "loss": {"mse_alpha": 1.0},
        "data": {
            "train": [str(project / f"train.{suffix}")],
            "validation": [str(project / f"validation.{suffix}")],
            "tokenizer": str(project / "tokenizer"),
            "sequence_length": 32,
            "doc_stride": 4,
            "prepared": str(project / "data"),
        },
        "optimizer": {"learning_rate": 0.005, "warmup_steps": 1},
        "train": {"steps": 6, "global_batch_size": 8, "micro_batch_size": 2, "evaluate_every": 3, "save_every": 3},
        "logging": {"every": 1, "tensorboard": False},
    }
    file = project / f"{output.replace('/', '_')}.yaml"
    file.write_text(yaml.safe_dump(changed(base, changes)), encoding="utf-8")
    return file
