from __future__ import annotations

import logging

import pytest
from transformers import AutoConfig

from ted_ds.errors import ModelError
from ted_ds.models.labels import label_order

MNLI = ("entailment", "neutral", "contradiction")


def config(*labels: str):
    return AutoConfig.for_model("bert", id2label=dict(enumerate(labels)), num_labels=len(labels))


@pytest.mark.parametrize(
    ("own", "order"),
    [
        (MNLI, None),
        (("CONTRADICTION", "Neutral", "entailment"), [2, 1, 0]),
        (("neutral", "contradiction", "entailment"), [2, 0, 1]),
    ],
)
def test_labels_are_mapped_by_name(own: tuple[str, ...], order: list[int] | None) -> None:
    assert label_order(config(*own), MNLI) == order


def test_spelling_does_not_matter() -> None:
    assert label_order(config("Not Equivalent", "equivalent"), ("equivalent", "not_equivalent")) == [1, 0]


def test_a_model_without_names_is_taken_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="ted_ds"):
        assert label_order(AutoConfig.for_model("bert", num_labels=3), MNLI) is None
    assert "does not name its labels: they are taken to be entailment, neutral, contradiction" in caplog.text


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (("yes", "no"), r"has 2 labels \(yes, no\), the task has 3 \(entailment, neutral, contradiction\)"),
        (("entailment", "neutral", "unknown"), r"labels entailment, neutral, unknown, the task .* cannot be mapped"),
        (("entailment", "neutral", "Neutral"), "cannot be mapped by name; correct id2label"),
    ],
)
def test_labels_that_do_not_match_are_refused(own: tuple[str, ...], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        label_order(config(*own), MNLI)
