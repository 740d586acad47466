"""GLUE's metrics against values by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ted_ds.errors import DataError, NotFiniteError
from ted_ds.evaluation.glue import glue_scores

CLASS_METRICS = ("accuracy", "f1", "matthews")


def logits(classes: list[int], count: int = 2) -> np.ndarray:
    """Logits [n, count] whose largest is at `classes`; none of them positive."""
    return (np.eye(count)[classes] - 3.0).astype(np.float32)


def test_classes_by_their_confusion_matrix():
    """3 true positives, 1 false positive, 2 false negatives, 4 true negatives."""
    labels = np.array([1, 1, 1, 0, 1, 1, 0, 0, 0, 0])
    scores = glue_scores(CLASS_METRICS, logits([1, 1, 1, 1, 0, 0, 0, 0, 0, 0]), labels)
    assert scores == pytest.approx(
        {
            "accuracy": 7 / 10,
            "f1": 2 * 3 / (2 * 3 + 1 + 2),
            "matthews": (3 * 4 - 1 * 2) / math.sqrt((3 + 1) * (3 + 2) * (4 + 1) * (4 + 2)),
        }
    )


def test_f1_is_of_class_1_among_three():
    """Class 1 has 1 true positive, 1 false positive and 1 false negative."""
    scores = glue_scores(["accuracy", "f1"], logits([0, 1, 1, 2, 2], 3), np.array([0, 1, 0, 1, 2]))
    assert scores == pytest.approx({"accuracy": 3 / 5, "f1": 1 / 2})


def test_only_what_is_asked_for():
    assert glue_scores(["accuracy"], logits([1, 0]), np.array([1, 1])) == {"accuracy": 0.5}


def test_all_wrong_is_minus_one():
    assert glue_scores(CLASS_METRICS, logits([1, 0, 1]), np.array([0, 1, 0])) == {
        "accuracy": 0.0,
        "f1": 0.0,
        "matthews": -1.0,
    }


@pytest.mark.parametrize("labels", [[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]])
@pytest.mark.parametrize("predicted", [0, 1])
def test_a_constant_class_is_uncorrelated(labels: list[int], predicted: int):
    scores = glue_scores(CLASS_METRICS, logits([predicted] * 4), np.array(labels))
    assert scores["matthews"] == 0.0
    assert scores["accuracy"] == labels.count(predicted) / 4
    hits = labels.count(1) * predicted
    assert scores["f1"] == pytest.approx(2 * hits / (4 * predicted + labels.count(1)) if hits else 0.0)


def test_numbers_by_hand():
    """Deviations of predictions (-1.5, -.5, .5, 1.5), of labels (-2, 0, -1, 3): 7 / sqrt(5 * 14).

    Ranks (1, 2, 3, 4) and (1, 3, 2, 4): 1 - 6 * 2 / (4 * 15).
    """
    predictions = np.array([0.0, 1.0, 2.0, 3.0], dtype=np.float32)
    labels = np.array([0.0, 2.0, 1.0, 5.0], dtype=np.float32)
    scores = glue_scores(["pearson", "spearman"], predictions, labels)
    assert scores == pytest.approx({"pearson": 7 / math.sqrt(70), "spearman": 0.8})
    assert glue_scores(["pearson", "spearman"], -predictions, labels) == pytest.approx(
        {k: -v for k, v in scores.items()}
    )


def test_equal_labels_share_a_rank():
    """Ranks (1, 2, 3) and (1, 2.5, 2.5): deviations (-1, 0, 1) and (-1, .5, .5), 1.5 / sqrt(2 * 1.5)."""
    scores = glue_scores(["spearman"], np.array([1.0, 5.0, 9.0]), np.array([0.0, 4.0, 4.0]))
    assert scores == pytest.approx({"spearman": 1.5 / math.sqrt(3)})


@pytest.mark.parametrize(
    "predictions, labels",
    [
        ([2.0, 2.0, 2.0], [0.0, 1.0, 5.0]),
        ([0.1, 0.2, 0.3], [4.0, 4.0, 4.0]),
        ([2.0], [3.0]),
    ],
)
def test_undefined_correlations_are_zero(predictions: list[float], labels: list[float]):
    scores = glue_scores(["pearson", "spearman"], np.float32(predictions), np.float32(labels))
    assert scores == {"pearson": 0.0, "spearman": 0.0}


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_outputs_that_are_not_finite_have_no_score(broken: float):
    """argmax takes nan for the likeliest class."""
    classes, numbers = logits([0, 1, 1, 0]), np.float32([0.0, 1.0, broken, broken])
    classes[2:, 1] = broken
    for outputs, metrics, labels in (
        (classes, CLASS_METRICS, np.array([0, 1, 1, 0])),
        (numbers, ["pearson", "spearman"], np.float32([0.0, 1.0, 2.0, 3.0])),
    ):
        with pytest.raises(NotFiniteError, match=r"^the outputs for 2 of 4 rows are not finite, the first is row 2$"):
            glue_scores(metrics, outputs, labels)


def test_a_label_of_minus_hundred_is_a_number():
    assert glue_scores(["pearson"], np.array([0.0, 1.0]), np.array([-100.0, 1.0])) == pytest.approx({"pearson": 1.0})


@pytest.mark.parametrize(
    "outputs, labels",
    [(logits([0, 1, 1]), np.array([0, -100, -100])), (np.zeros(3), np.array([1.0, math.nan, math.nan]))],
)
def test_rows_without_labels(outputs: np.ndarray, labels: np.ndarray):
    with pytest.raises(DataError, match=r"2 of 3 rows .* no label.* row 1"):
        glue_scores(["accuracy"], outputs, labels)


def test_no_rows():
    with pytest.raises(DataError, match="no row to score by accuracy, f1"):
        glue_scores(["accuracy", "f1"], np.zeros((0, 2)), np.zeros(0, dtype=np.int64))
