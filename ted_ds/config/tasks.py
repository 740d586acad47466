from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["causal-lm", "classification", "regression", "question-answering"]


@dataclass(frozen=True)
class TaskSpec:
    name: str
    kind: Kind
    text_columns: tuple[str, ...] = ()
    label_column: str = ""
    labels: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    best: str = ""

    def with_columns(self, text_columns, label_column, labels) -> TaskSpec:
        return self


TASKS = {"causal-lm": TaskSpec("causal-lm", "causal-lm")}
