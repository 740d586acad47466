"""GLUE's metrics (arXiv 1804.07461), by scikit-learn and SciPy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ted_ds.batch import IGNORED
from ted_ds.errors import DataError, NotFiniteError


def glue_scores(metrics: Sequence[str], outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """{metric: score}, a fraction in [-1, 1], for each of `metrics`.

    metrics: "accuracy", "f1" (of class 1) and "matthews" of classes; "pearson" and "spearman" of numbers.
    outputs: [n, C] logits, of which the largest is the predicted class, or [n] predicted numbers.
    labels: [n] integers in [0, C), or [n] floats.
    What is undefined is 0: a correlation if either side is constant, and the F1 of a class that is neither
    predicted nor there. DataError if there is no row, or a row has no label (`IGNORED` or nan); NotFiniteError
    if an output is nan or infinite.
    """
    if len(labels) == 0:
        raise DataError(f"no row to score by {', '.join(metrics)}: the evaluation data is empty")
    unlabelled = np.flatnonzero(np.isnan(labels) if labels.dtype.kind == "f" else labels == IGNORED)
    if unlabelled.size:
        raise DataError(
            f"{unlabelled.size} of {len(labels)} rows to score have no label, the first is row {unlabelled[0]}: "
            "evaluate on a labelled split"
        )
    broken = np.flatnonzero(~np.isfinite(outputs.reshape(len(outputs), -1)).all(1))
    if broken.size:  # argmax would take nan for the likeliest class
        raise NotFiniteError(
            f"the outputs for {broken.size} of {len(outputs)} rows are not finite, the first is row {broken[0]}"
        )
    predictions = outputs.argmax(-1) if outputs.ndim == 2 else outputs.astype(np.float64)
    return {metric: _score(metric, predictions, labels) for metric in metrics}


def _score(metric: str, predictions: np.ndarray, labels: np.ndarray) -> float:
    from scipy.stats import pearsonr, spearmanr  # a second of importing, which other tasks do without
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    if metric == "accuracy":
        return float(accuracy_score(labels, predictions))
    if metric == "f1":
        return float(f1_score(labels, predictions, labels=[1], average="macro", zero_division=0))
    # The libraries return nan or 0 here, and warn.
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    if metric == "matthews":
        return float(matthews_corrcoef(labels, predictions))
    correlation = {"pearson": pearsonr, "spearman": spearmanr}[metric]
    return float(correlation(predictions, labels.astype(np.float64)).statistic)
