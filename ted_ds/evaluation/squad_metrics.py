"""SQuAD (arXiv 1606.05250, 1806.03822): answers from a model's logits, and their official scores."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from scipy.special import expit

from ted_ds.errors import DataError, NotFiniteError

CANDIDATES = 20
"""How many starts, and how many ends, of a window are combined into spans, as BERT's script does."""

MAX_ANSWER_TOKENS = 30
"""Longer spans are no answers, as in BERT's script."""

_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Question(Protocol):
    """What scoring needs of a question; `answers` are (text, start in the context), none if it has no answer."""

    @property
    def id(self) -> str: ...

    @property
    def context(self) -> str: ...

    @property
    def answers(self) -> tuple[tuple[str, int], ...]: ...


def best_spans(start_logits: torch.Tensor, end_logits: torch.Tensor) -> torch.Tensor:
    """The best candidates of each window, so that logits need not leave the device: [B, 4 * CANDIDATES + 1] float32.

    start_logits, end_logits: [B, S], very low or -inf at padding. A row is the positions of the CANDIDATES
    highest starts, their logits, the same of the ends, and last the null score, start[0] + end[0]. Logits
    descend, and equal ones are in order of position. Where S < CANDIDATES, the rest has position 0 and
    logit -inf.
    """
    starts, ends = start_logits.float(), end_logits.float()
    null = starts[:, :1] + ends[:, :1]
    return torch.cat([*_candidates(starts), *_candidates(ends), null], dim=-1)


def _candidates(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions and logits, [B, CANDIDATES] float32 each; float32 is exact for positions below 2^24."""
    # A stable sort, for topk orders equal logits as it likes.
    values, positions = (t[:, :CANDIDATES] for t in logits.sort(dim=-1, descending=True, stable=True))
    missing = (0, CANDIDATES - values.shape[1])
    pad = torch.nn.functional.pad
    return pad(positions.float(), missing), pad(values, missing, value=-torch.inf)


def select_answers(
    spans: np.ndarray, window_of: Callable[[int], tuple[int, np.ndarray]], questions: Sequence[Question]
) -> tuple[dict[str, str], dict[str, float]]:
    """({id: answer}, {id: probability that there is none}) for every question.

    spans: [W, 4 * CANDIDATES + 1], rows of `best_spans`. window_of: the number of a window -> (the number of
    its question, [S, 2] characters of the context at which each position begins and ends, -1 outside of it);
    padding on the right may be left off, positions beyond S are outside.
    The answer is the span of highest start + end logit over all windows of the question, with at most
    MAX_ANSWER_TOKENS tokens, all in the context; of equal ones the first window's, then the one with the
    highest start logit, then with the first start, then the first end.
    The probability is sigmoid(null - answer's score), with the lowest null score of the windows: 0.5 is
    where BERT's script has a difference of 0. Without any span the answer is "" and the probability 1.
    NotFiniteError if a window's row has a nan or +inf, or no start or end that is finite.
    """
    _refuse_not_finite(spans)
    texts = [""] * len(questions)
    best, null = np.full(len(questions), -np.inf), np.full(len(questions), np.inf)
    for window, row in enumerate(spans.astype(np.float64)):
        question, offsets = window_of(window)
        null[question] = min(null[question], row[-1])
        score, begin, end = _best_span(row, offsets)
        if score > best[question]:
            best[question] = score
            texts[question] = questions[question].context[begin:end]
    found = best > -np.inf
    probabilities = np.ones(len(questions))
    probabilities[found] = expit(null[found] - best[found])
    ids = [q.id for q in questions]
    return dict(zip(ids, texts, strict=True)), dict(zip(ids, probabilities.tolist(), strict=True))


def _refuse_not_finite(spans: np.ndarray) -> None:
    """-inf fills up rows of short windows, which is no fault; the highest logits come first."""
    highest = spans[:, [CANDIDATES, 3 * CANDIDATES]]
    broken = np.flatnonzero(~((spans < np.inf).all(1) & np.isfinite(highest).all(1)))
    if broken.size:
        raise NotFiniteError(
            f"the outputs for {broken.size} of {len(spans)} windows are not finite, the first is window {broken[0]}"
        )


def _best_span(row: np.ndarray, offsets: np.ndarray) -> tuple[float, int, int]:
    """(score, first character, character behind the last) of a window's best span; the score is -inf for none."""
    starts, start_logits, ends, end_logits = row[:-1].reshape(4, CANDIDATES)
    begins, stops = _characters(offsets[:, 0], starts), _characters(offsets[:, 1], ends)
    tokens = ends - starts[:, None] + 1
    valid = (tokens >= 1) & (tokens <= MAX_ANSWER_TOKENS) & (begins >= 0)[:, None] & (stops >= 0)
    scores = np.where(valid, start_logits[:, None] + end_logits, -np.inf)
    start, end = divmod(int(scores.argmax()), CANDIDATES)
    return float(scores[start, end]), int(begins[start]), int(stops[end])


def _characters(offsets: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The offsets [S] of positions, -1 beyond S."""
    last = len(offsets) - 1
    return np.where(positions <= last, offsets[np.minimum(positions, last).astype(np.intp)], -1)


def squad_scores(
    predictions: Mapping[str, str],
    questions: Sequence[Question],
    *,
    no_answer: Mapping[str, float] | None = None,
    threshold: float = 0.5,
) -> dict[str, float]:
    """The scores of SQuAD's official script, 2.0, under its names; percentages, each the mean over questions.

    Those of the 1.1 script differ only if an answer is nothing but articles and punctuation.
    "exact" and "f1" of the answers with "total", their number. If a question has no answer or `no_answer` is
    given, also "HasAns_exact" and so on, over questions with an answer, and "NoAns_exact" and so on, over those
    without; a group without questions is left out. If `no_answer` is given, also "best_exact", what the best
    threshold "best_exact_thresh" would have scored, and "best_f1" and "best_f1_thresh".
    predictions: {id: answer}, "" for none. no_answer: {id: probability that there is no answer}; a prediction
    with one above `threshold` counts as none.
    DataError if there is no question, or one is not in `predictions` or in `no_answer`.
    """
    if not questions:
        raise DataError("no question to score: the evaluation data is empty")
    for given, what in ((predictions, "prediction"), (no_answer, "no-answer probability")):
        missing = None if given is None else next((q.id for q in questions if q.id not in given), None)
        if missing is not None:
            raise DataError(f"question {missing!r} has no {what}: give one for every question that is scored")
    texts = [predictions[q.id] for q in questions]
    raw = np.array([_best_match(text, _golds(q)) for text, q in zip(texts, questions, strict=True)])
    has_answer = np.array([bool(q.answers) for q in questions])
    if no_answer is None:
        groups = {} if has_answer.all() else {"HasAns_": has_answer, "NoAns_": ~has_answer}
        return _means(raw, {"": np.ones_like(has_answer), **groups})
    probabilities = np.array([no_answer[q.id] for q in questions])
    kept = np.where((probabilities > threshold)[:, None], ~has_answer[:, None], raw)
    scores = _means(kept, {"": np.ones_like(has_answer), "HasAns_": has_answer, "NoAns_": ~has_answer})
    answered = np.array([text != "" for text in texts])
    for name, column in (("exact", raw[:, 0]), ("f1", raw[:, 1])):
        gains = np.where(has_answer, column, -answered.astype(np.float64))
        scores[f"best_{name}"], scores[f"best_{name}_thresh"] = _best_threshold(gains, probabilities, ~has_answer)
    return scores


def _means(scores: np.ndarray, groups: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Percentages of scores [n, 2], exact and f1, over each non-empty group, a mask [n], under its prefix."""
    means: dict[str, float] = {}
    for prefix, group in groups.items():
        if group.any():
            exact, f1 = 100.0 * scores[group].mean(0)
            means |= {f"{prefix}exact": float(exact), f"{prefix}f1": float(f1), f"{prefix}total": int(group.sum())}
    return means


def _best_threshold(gains: np.ndarray, probabilities: np.ndarray, unanswerable: np.ndarray) -> tuple[float, float]:
    """(percentage, threshold): the first best threshold, all [n].

    gains: what each question adds once its prediction is kept. With none kept, the unanswerable ones score 1
    each; then predictions are kept one by one in order of probability, also where probabilities are equal, as
    the official script does.
    """
    order = np.argsort(probabilities, kind="stable")
    totals = np.cumsum(np.concatenate([[unanswerable.sum()], gains[order]]))
    at = int(totals.argmax())
    return float(100.0 * totals[at] / len(gains)), float(probabilities[order[at - 1]]) if at else 0.0


def _golds(question: Question) -> list[str]:
    """The normalised answers that are not empty, or an empty one."""
    return [gold for text, _ in question.answers if (gold := _normalise(text))] or [""]


def _best_match(text: str, golds: Sequence[str]) -> tuple[float, float]:
    """(exact, f1) of a prediction, each the best over the normalised answers."""
    prediction = _normalise(text)
    return float(prediction in golds), max(_f1(prediction.split(), gold.split()) for gold in golds)


def _normalise(text: str) -> str:
    """Lower case, without ASCII punctuation, articles and repeated white space."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split())


def _f1(prediction: Sequence[str], gold: Sequence[str]) -> float:
    """F1 of the bags of words; 1 if both are empty."""
    if not prediction or not gold:
        return float(prediction == gold)
    shared = (Counter(prediction) & Counter(gold)).total()
    if shared == 0:
        return 0.0
    precision, recall = shared / len(prediction), shared / len(gold)
    return 2 * precision * recall / (precision + recall)
