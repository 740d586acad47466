"""A model's labels against the data's: compared by name, mapped if the order differs."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from transformers import PreTrainedConfig

from ted_ds.errors import ModelError

logger = logging.getLogger("ted_ds")


def label_order(config: PreTrainedConfig, labels: Sequence[str]) -> list[int] | None:
    """For each of the data's `labels` the model's number of it; None if both have the same order.

    Names are compared without regard to case, "_", "-" and spaces. A model that was saved without names
    ("LABEL_0", ...) is taken to have the data's order, and a warning says so.
    Raises ModelError if numbers or names differ.
    """
    names: Any = config.id2label
    own = [str(names[i]) for i in range(len(names))]
    name = getattr(config, "_name_or_path", "") or config.model_type
    if len(own) != len(labels):
        raise ModelError(
            f"model {name} has {len(own)} labels ({', '.join(own)}), the task has {len(labels)} ({', '.join(labels)}): "
            "use a model of this task"
        )
    if all(re.fullmatch(r"LABEL_\d+", label) for label in own):
        _say_unnamed(name, tuple(labels))
        return None
    numbers = {_plain(label): i for i, label in enumerate(own)}
    missing = [label for label in labels if _plain(label) not in numbers]
    if missing or len(numbers) < len(own):
        raise ModelError(
            f"model {name} has the labels {', '.join(own)}, the task {', '.join(labels)}: they cannot be mapped by "
            "name; correct id2label in the model's config.json"
        )
    order = [numbers[_plain(label)] for label in labels]
    return None if order == list(range(len(labels))) else order


@cache
def _say_unnamed(name: str, labels: tuple[str, ...]) -> None:
    """Once, however often a model is read."""
    logger.warning("model %s does not name its labels: they are taken to be %s", name, ", ".join(labels))


def _plain(label: str) -> str:
    return re.sub(r"[\s_-]+", "", label).lower()
