from __future__ import annotations

import pytest

from ted_ds.config.tasks import TASKS

GLUE = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli")


def test_every_task_is_there_under_its_own_name() -> None:
    others = ("causal-lm", "squad", "squad_v2", "classification", "regression", "question-answering")
    assert set(TASKS) == {*GLUE, *others}
    assert all(spec.name == name for name, spec in TASKS.items())


@pytest.mark.parametrize("name", TASKS)
def test_the_best_weights_are_chosen_by_a_metric_of_the_task(name: str) -> None:
    spec = TASKS[name]
    assert spec.best in spec.metrics or (name == "causal-lm" and not spec.best)
    assert (
        set(spec.metrics)
        <= {
            "causal-lm": set(),
            "classification": {"accuracy", "f1", "matthews"},
            "regression": {"pearson", "spearman"},
            "question-answering": {"exact", "f1"},
        }[spec.kind]
    )


@pytest.mark.parametrize("name", GLUE)
def test_glue_s_official_names_lead_to_columns_of_the_task(name: str) -> None:
    spec = TASKS[name]
    assert spec.tsv is not None
    columns = {*spec.text_columns, spec.label_column}
    assert set(spec.tsv.names.values()) <= columns
    assert spec.tsv.header is None or columns <= set(spec.tsv.header)


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("cola", "unacceptable acceptable"),
        ("sst2", "negative positive"),
        ("mrpc", "not_equivalent equivalent"),
        ("qqp", "not_duplicate duplicate"),
        ("mnli", "entailment neutral contradiction"),
        ("qnli", "entailment not_entailment"),
        ("rte", "entailment not_entailment"),
        ("wnli", "not_entailment entailment"),
    ],
)
def test_labels_are_numbered_as_on_the_hub(name: str, labels: str) -> None:
    assert TASKS[name].labels == tuple(labels.split())


def test_a_recipe_s_columns_and_labels_take_the_place_of_the_task_s() -> None:
    rte = TASKS["rte"]
    assert rte.with_columns(None, None, None) == rte
    labels = rte.with_columns(None, None, ("yes", "no"))
    assert (labels.labels, labels.text_columns, labels.tsv) == (("yes", "no"), rte.text_columns, rte.tsv)
    for own in (rte.with_columns(("a",), None, None), rte.with_columns(None, "class", None)):
        assert own.tsv is None and own.labels == rte.labels
    assert rte.with_columns(("a",), "class", None).text_columns == ("a",)
    assert TASKS["rte"] is rte and rte.label_column == "label"
