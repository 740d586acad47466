"""A small project on disk for tests that run recipes: tokenizer, text, teacher; and plain references."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ted_ds.config.sections import LossConfig
from tests.tiny_models import tiny_model

VOCAB = 61
SEQUENCE = 12


def make_project(folder: Path, *, family: str = "llama", seed: int = 0, **teacher: Any) -> Path:
    """folder/{tokenizer, train.txt, validation.txt, teacher}: 61 words, random text, a random teacher."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["<eos>", "<unk>", *(f"w{i}" for i in range(VOCAB - 2))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>")
    wrapped.save_pretrained(folder / "tokenizer")
    draw = random.Random(seed)
    for name, size in (("train", 2000), ("validation", 150)):
        text = " ".join(draw.choice(words[2:]) + ("\n" if i % 20 == 19 else "") for i in range(size))
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    sizes = {"blocks": 4, "width": 16, "heads": 2, "vocab": VOCAB} | teacher
    tiny_model(family, seed=seed, **sizes).save_pretrained(folder / "teacher")
    return folder


def loss_config(**given: Any) -> LossConfig:
    """A section `loss` with a constant weight of the layer loss, if not said otherwise."""
    return LossConfig(**{"layer_loss": "normalized_mse", "balance": "none", "layer_fade": 0.0, **given})


def recipe(project: Path, output: str, **changes: Any) -> dict[str, Any]:
    """A recipe for the project; `changes` by dotted key with `__` for the dot."""
    base: dict[str, Any] = {
        "method": "ted",
        "output_dir": str(project / output),
        "teacher": {"model": str(project / "teacher"), "dtype": "float32"},
        "student": {"dtype": "float32", "init": {"blocks": "uniform", "num_blocks": 2}},
        "filters": {"learn": "always", "steps": 10, "learning_rate": 0.01, "layer_map": "uniform", "skip_last": 0},
        "loss": {},
        "data": {
            "train": [str(project / "train.txt")],
            "validation": [str(project / "validation.txt")],
            "tokenizer": str(project / "tokenizer"),
            "sequence_length": SEQUENCE,
            "processes": 1,
        },
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 2},
        "train": {
            "steps": 10,
            "global_batch_size": 4,
            "micro_batch_size": 1,
            "evaluate_every": 5,
            "save_every": 5,
        },
        "logging": {"every": 1, "tensorboard": False},
    }
    return changed(base, changes)


def changed(recipe: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The recipe with `changes`, by dotted key with `__` for the dot. A teacher that is cut reads 5 tiny rows."""
    for dotted, value in changes.items():
        *path, last = dotted.split("__")
        place = recipe
        for key in path:
            place = place.setdefault(key, {})
        place[last] = value
    if isinstance(recipe["filters"].get("layer_map"), list):
        recipe["filters"].pop("skip_last", None)
    init = recipe["student"].get("init")
    if isinstance(init, dict) and "config" not in init:
        tokens = 5 * recipe["data"]["sequence_length"]
        recipe["student"] = recipe["student"] | {"init": {"calibration_tokens": tokens} | init}
    return recipe


def write_recipe(project: Path, output: str, **changes: Any) -> Path:
    """The recipe as a YAML file."""
    path = project / f"{output.replace('/', '_')}.yaml"
    path.write_text(yaml.safe_dump(recipe(project, output, **changes)), encoding="utf-8")
    return path


def relative(a: Any, b: Any) -> float:
    """norm(a - b) / norm(b)."""
    a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    return float((a - b).norm() / b.norm().clamp_min(1e-30))
