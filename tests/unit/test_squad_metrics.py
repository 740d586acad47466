"""SQuAD: scores by hand and by a plain reading of their definition; spans against a loop over all pairs."""

from __future__ import annotations

import math
import random
import string
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from ted_ds.errors import DataError, NotFiniteError
from ted_ds.evaluation.squad_metrics import CANDIDATES, MAX_ANSWER_TOKENS, best_spans, select_answers, squad_scores


@dataclass(frozen=True)
class Asked:
    id: str
    answers: tuple[tuple[str, int], ...] = ()
    context: str = ""


def asked(name: str, *golds: str) -> Asked:
    return Asked(name, tuple((gold, 0) for gold in golds))


def one(prediction: str, *golds: str) -> tuple[float, float]:
    scores = squad_scores({"q": prediction}, [asked("q", *golds)])
    assert scores["total"] == 1
    return scores["exact"], scores["f1"]


@pytest.mark.parametrize(
    "prediction, golds, exact, f1",
    [
        ("The  cat,\tsat!", ["a cat sat"], 100, 100),  # articles, punctuation, white space, case
        ("theory", ["ory"], 0, 0),  # an article is a whole word
        ("well-known", ["wellknown"], 100, 100),  # punctuation is deleted, not a space
        ("don't", ["dont"], 100, 100),
        ("“Größe”", ["größe"], 0, 0),  # typographic quotes are not ASCII punctuation
        ("GRÖSSE", ["grösse"], 100, 100),
        ("“the cat”", ["“ cat”"], 100, 100),  # an article beside one still goes
        ("東京 都", ["東京"], 0, 100 * 2 / 3),  # P 1/2, R 1
        ("black cat", ["cat", "a black dog", "big black cat"], 0, 80),  # 2/3, 1/2, and P 1, R 2/3
        ("cat", ["dog", "the cat"], 100, 100),
        ("cat cat cat", ["cat cat"], 0, 80),  # bags: P 2/3, R 1
        ("b c", ["c b"], 0, 100),
        ("", ["cat"], 0, 0),
        ("the", ["cat"], 0, 0),
        ("the", ["a", "cat"], 0, 0),  # the empty "a" is no gold beside another
        ("an", ["the", "!"], 100, 100),  # all golds are empty
        ("cat", ["the"], 0, 0),
    ],
)
def test_one_prediction(prediction: str, golds: list[str], exact: float, f1: float):
    assert one(prediction, *golds) == pytest.approx((exact, f1))


def test_squad_1_has_three_scores():
    questions = [asked("p", "red cat"), asked("q", "dog")]
    assert squad_scores({"p": "cat", "q": "the dog", "other": "x"}, questions) == pytest.approx(
        {"exact": 50, "f1": 100 * (2 / 3 + 1) / 2, "total": 2}
    )


def test_unanswerable_questions_want_nothing():
    questions = [asked("yes", "cat"), asked("no"), asked("said")]
    scores = squad_scores({"yes": "cat", "no": "", "said": "cat"}, questions)
    assert scores == pytest.approx(
        {
            "exact": 200 / 3,
            "f1": 200 / 3,
            "total": 3,
            "HasAns_exact": 100,
            "HasAns_f1": 100,
            "HasAns_total": 1,
            "NoAns_exact": 50,
            "NoAns_f1": 50,
            "NoAns_total": 2,
        }
    )


def test_predictions_above_the_threshold_are_dropped():
    """At 0.5: has (2/3 of F1), hidden dropped, none dropped and right, at-threshold kept and wrong."""
    questions = [asked("has", "red cat"), asked("hidden", "dog"), asked("none"), asked("edge")]
    answers = {"has": "cat", "hidden": "dog", "none": "cat", "edge": "cat"}
    no_answer = {"has": 0.1, "hidden": 0.7, "none": 0.9, "edge": 0.5}
    scores = squad_scores(answers, questions, no_answer=no_answer)
    assert scores == pytest.approx(
        {
            "exact": 25,
            "f1": 100 * (2 / 3 + 1) / 4,
            "total": 4,
            "HasAns_exact": 0,
            "HasAns_f1": 100 / 3,
            "HasAns_total": 2,
            "NoAns_exact": 50,
            "NoAns_f1": 50,
            "NoAns_total": 2,
            # all dropped scores 2; keeping `has` 2 and 2 2/3, then `edge` 1 and 1 2/3, then `hidden` 2 and 2 2/3
            "best_exact": 50,
            "best_exact_thresh": 0.0,
            "best_f1": 100 * (2 + 2 / 3) / 4,
            "best_f1_thresh": 0.1,
        }
    )
    assert squad_scores(answers, questions, no_answer=no_answer, threshold=0.8)["exact"] == 50
    assert squad_scores(answers, questions, no_answer=no_answer, threshold=0.0)["exact"] == 50


def test_groups_without_questions_are_left_out():
    scores = squad_scores({"q": "cat"}, [asked("q", "cat")], no_answer={"q": 0.2})
    assert list(scores) == [
        *("exact", "f1", "total", "HasAns_exact", "HasAns_f1", "HasAns_total"),
        *("best_exact", "best_exact_thresh", "best_f1", "best_f1_thresh"),
    ]
    assert (scores["best_exact"], scores["best_exact_thresh"]) == (100, 0.2)
    assert "HasAns_exact" not in squad_scores({"q": ""}, [asked("q")])


def test_equal_probabilities_are_parted_as_the_official_script_does():
    """No threshold parts p from q, yet the best score is of p kept and q dropped."""
    questions = [asked("p", "cat"), asked("q")]
    scores = squad_scores({"p": "cat", "q": "cat"}, questions, no_answer={"p": 0.3, "q": 0.3})
    assert (scores["best_exact"], scores["best_exact_thresh"]) == (100, 0.3)


def test_an_article_alone_is_an_answer_to_the_threshold_search():
    """It scores as empty where it is kept; the search looks at the raw text."""
    questions = [asked("p"), asked("q", "cat")]
    scores = squad_scores({"p": "the", "q": "cat"}, questions, no_answer={"p": 0.2, "q": 0.3})
    assert scores["exact"] == 100
    assert (scores["best_exact"], scores["best_exact_thresh"]) == (50, 0.0)


WORDS = ["the", "a", "An", "cat", "cat,", "dog", "Red", "red", "!", "-", "blue-green", "é"]


def random_case(seed: int) -> tuple[list[Asked], dict[str, str], dict[str, float]]:
    """Questions of which a third has no answer, predictions with an empty one here and there; no probability twice."""
    draw = random.Random(seed)

    def text(least: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(least, 4)))

    names = [f"q{i}" for i in range(draw.randint(1, 30))]
    questions = [asked(name, *(text(1) for _ in range(draw.choice([0, 1, 3])))) for name in names]
    return questions, {name: text(0) for name in names}, {name: draw.random() for name in names}


def plain_words(text: str) -> list[str]:
    """The words left of a text of WORDS, whose articles have spaces around them."""
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return [word for word in kept.split() if word not in ("a", "an", "the")]


def plain_scores(prediction: str, question: Asked) -> tuple[float, float]:
    """(exact, F1) by crossing off words."""
    golds = [words for gold, _ in question.answers if (words := plain_words(gold))] or [[]]
    said, exact, f1 = plain_words(prediction), 0.0, 0.0
    for gold in golds:
        left, shared = list(gold), 0
        for word in said:
            if word in left:
                left.remove(word)
                shared += 1
        exact = max(exact, float(said == gold))
        f1 = max(f1, 2 * shared / (len(said) + len(gold)) if said or gold else 1.0)
    return exact, f1


@pytest.mark.parametrize("seed", range(40))
def test_scores_equal_a_plain_reading(seed: int):
    questions, predictions, no_answer = random_case(seed)
    expected: dict[str, list[tuple[float, float]]] = {}
    for q in questions:
        kept = plain_scores(predictions[q.id], q)
        score = kept if no_answer[q.id] <= 0.4 else (float(not q.answers),) * 2
        for group in ("", "HasAns_" if q.answers else "NoAns_"):
            expected.setdefault(group, []).append(score)
    scores = squad_scores(predictions, questions, no_answer=no_answer, threshold=0.4)
    flat = {f"{group}total": len(rows) for group, rows in expected.items()}
    for i, name in enumerate(("exact", "f1")):
        flat |= {f"{g}{name}": 100 * sum(row[i] for row in rows) / len(rows) for g, rows in expected.items()}
    assert {k: v for k, v in scores.items() if not k.startswith("best")} == pytest.approx(flat)


@pytest.mark.parametrize("seed", range(40))
def test_the_best_threshold_equals_trying_all(seed: int):
    """A prediction of no word is made empty: the official search scores it otherwise (see above)."""
    questions, predictions, no_answer = random_case(seed)
    predictions = {name: text if plain_words(text) else "" for name, text in predictions.items()}
    scores = squad_scores(predictions, questions, no_answer=no_answer)
    for name in ("exact", "f1"):
        tried = {
            t: squad_scores(predictions, questions, no_answer=no_answer, threshold=t)[name]
            for t in [0.0, *no_answer.values()]
        }
        assert scores[f"best_{name}"] == pytest.approx(max(tried.values()))
        # the lowest of the best, up to the rounding of sums
        best = min(t for t, score in tried.items() if score >= max(tried.values()) - 1e-9)
        assert scores[f"best_{name}_thresh"] == pytest.approx(best)


def test_what_is_missing_is_named():
    questions = [asked("p", "cat"), asked("q", "cat")]
    with pytest.raises(DataError, match="question 'q' has no prediction"):
        squad_scores({"p": "cat"}, questions)
    with pytest.raises(DataError, match="question 'p' has no no-answer probability"):
        squad_scores({"p": "", "q": ""}, questions, no_answer={"q": 0.0})
    with pytest.raises(DataError, match="no question to score"):
        squad_scores({}, [])


# Spans


def letters(length: int) -> Asked:
    """A context of one-letter words and its question."""
    return Asked("q", context=" ".join(string.ascii_letters[:length]))


def offsets_of(context: str, *, prefix: int, start: int = 0, suffix: int = 1) -> np.ndarray:
    """Offsets of one-letter tokens from word `start` on, `prefix` positions of question before and `suffix` after."""
    words = [(i, i + 1) for i in range(2 * start, len(context), 2)]
    return np.array([(-1, -1)] * prefix + words + [(-1, -1)] * suffix)


def rows(*windows: tuple[torch.Tensor, torch.Tensor]) -> np.ndarray:
    return np.concatenate([best_spans(starts[None], ends[None]).numpy() for starts, ends in windows])


def loop(windows: list[tuple[torch.Tensor, torch.Tensor, np.ndarray]], context: str) -> tuple[str, float]:
    """Every pair of positions of every window; ties to the first."""
    best, text, null = -math.inf, "", math.inf
    for starts, ends, offsets in windows:
        null = min(null, float(starts[0]) + float(ends[0]))
        for i in range(len(offsets)):
            for j in range(i, min(i + 30, len(offsets))):
                score = float(starts[i]) + float(ends[j])
                if offsets[i][0] >= 0 and offsets[j][0] >= 0 and score > best:
                    best, text = score, context[offsets[i][0] : offsets[j][1]]
    return text, 1 / (1 + math.exp(best - null)) if text else 1.0


def test_the_constants_are_those_of_berts_script():
    assert (CANDIDATES, MAX_ANSWER_TOKENS) == (20, 30)


@pytest.mark.parametrize("seed", range(20))
def test_answers_equal_a_loop_over_all_pairs(seed: int):
    """Three questions with one to three windows each, in turns; 16 positions or fewer, all of them candidates."""
    random_, torch_ = random.Random(seed), torch.Generator().manual_seed(seed)
    questions = [Asked(f"q{i}", context=letters(10 + i).context) for i in range(3)]
    windows = [0, 1, 2, *(random_.choices(range(3), k=3))]
    tables = [offsets_of(questions[q].context, prefix=4 - i % 3, start=i) for i, q in enumerate(windows)]
    pairs = [(torch.randn(len(t), generator=torch_), torch.randn(len(t), generator=torch_)) for t in tables]
    answers, no_answer = select_answers(rows(*pairs), lambda w: (windows[w], tables[w]), questions)
    for i, question in enumerate(questions):
        own = [(*pairs[w], tables[w]) for w, q in enumerate(windows) if q == i]
        text, probability = loop(own, question.context)
        assert answers[question.id] == text
        assert no_answer[question.id] == pytest.approx(probability, abs=1e-6)


def test_best_spans_of_a_long_window():
    """Positions 0..49 with known logits; the candidates are the 20 highest, in order."""
    starts = torch.arange(50.0)
    ends = -torch.arange(50.0)
    (row,) = best_spans(starts[None], ends[None]).tolist()
    assert len(row) == 81
    assert row[:20] == row[20:40] == [float(i) for i in range(49, 29, -1)]
    assert row[40:60] == [float(i) for i in range(20)]
    assert row[60:80] == [-float(i) for i in range(20)]
    assert row[80] == 0.0 + 0.0


def test_best_spans_of_a_short_window_are_filled_up():
    row = best_spans(torch.tensor([[1.0, 3.0, 3.0]]), torch.tensor([[2.0, -math.inf, 5.0]]))
    assert row.dtype == torch.float32
    nothing = [0.0] * 17, [-math.inf] * 17
    expected = [1, 2, 0, *nothing[0], 3, 3, 1, *nothing[1], 2, 0, 1, *nothing[0], 5, 2, -math.inf, *nothing[1], 3]
    assert row.tolist() == [expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_best_spans_are_independent(dtype: torch.dtype):
    starts, ends = torch.randn(2, 3, 40, dtype=dtype)
    together = best_spans(starts, ends)
    assert together.dtype == torch.float32
    assert torch.equal(together, torch.cat([best_spans(starts[i : i + 1], ends[i : i + 1]) for i in range(3)]))


def peaks(length: int, **at: float) -> torch.Tensor:
    """Logits -5 everywhere but at the positions named p3=7.0."""
    logits = torch.full((length,), -5.0)
    for name, value in at.items():
        logits[int(name[1:])] = value
    return logits


def select_one(question: Asked, offsets: np.ndarray, *windows: tuple[torch.Tensor, torch.Tensor]) -> tuple[str, float]:
    answers, no_answer = select_answers(rows(*windows), lambda _: (0, offsets), [question])
    return answers["q"], no_answer["q"]


def test_the_null_score_is_the_lowest_of_the_windows():
    """Answers of 7 and 10, null scores of 4 and 9: sigmoid(4 - 10)."""
    question = letters(10)
    offsets = offsets_of(question.context, prefix=2)
    first = peaks(13, p0=1.0, p3=4.0), peaks(13, p0=3.0, p4=3.0)
    second = peaks(13, p0=4.0, p5=5.0), peaks(13, p0=5.0, p7=5.0)
    text, probability = select_one(question, offsets, first, second)
    assert text == "d e f"
    assert probability == pytest.approx(1 / (1 + math.exp(6)))
    assert select_one(question, offsets, second, first) == (text, probability)


@pytest.mark.parametrize("tokens, found", [(30, True), (31, False)])
def test_an_answer_has_at_most_30_tokens(tokens: int, found: bool):
    question = letters(40)
    starts, ends = peaks(43, p3=9.0), peaks(43)
    ends[3 + tokens - 1] = 9.0
    text, _ = select_one(question, offsets_of(question.context, prefix=2), (starts, ends))
    assert (len(text.split()) == tokens) is found


def test_ties_go_to_the_first_window_and_then_to_the_higher_start():
    question = letters(5)
    offsets = offsets_of(question.context, prefix=1)
    low, high = (peaks(7, p1=1.0), peaks(7, p1=2.0)), (peaks(7, p3=1.0), peaks(7, p3=2.0))
    assert select_one(question, offsets, low, high)[0] == "a"
    assert select_one(question, offsets, high, low)[0] == "c"
    # a..b and c..c both score 3
    assert select_one(question, offsets, (peaks(7, p1=1.0, p3=2.0), peaks(7, p2=2.0, p3=1.0)))[0] == "c"
    assert select_one(question, offsets, (torch.zeros(7), torch.zeros(7)))[0] == "a"


def test_padding_may_lack_offsets():
    """Positions 4 to 8 have none: no answer of any score, though the last offsets are in the context."""
    question = letters(3)
    offsets = offsets_of(question.context, prefix=1, suffix=0)
    assert select_one(question, offsets, (peaks(9, p1=1.0, p5=8.0), peaks(9, p2=1.0, p6=9.0)))[0] == "a b"


def test_no_valid_span_is_no_answer():
    """All starts lie behind all ends, the context is masked, or there is no window."""
    question = letters(3)
    offsets = offsets_of(question.context, prefix=1)
    masked = peaks(5, p0=0.0).masked_fill(torch.arange(5) > 0, -math.inf)
    behind = (
        masked.clone().index_fill_(0, torch.tensor([3]), 1.0),
        masked.clone().index_fill_(0, torch.tensor([1]), 1.0),
    )
    assert select_one(question, offsets, behind) == ("", 1.0)
    assert select_one(question, offsets, (masked, masked)) == ("", 1.0)
    assert select_answers(np.zeros((0, 81)), lambda _: (0, offsets), [question]) == ({"q": ""}, {"q": 1.0})


@pytest.mark.parametrize("end", [0, 1])
@pytest.mark.parametrize("broken", [peaks(5, p2=math.nan), peaks(5, p4=math.inf), torch.full((5,), -math.inf)])
def test_a_diverged_window_has_no_answer(broken: torch.Tensor, end: int):
    question = letters(3)
    offsets = offsets_of(question.context, prefix=1)
    good = peaks(5, p0=0.0, p1=1.0)
    bad = (good, broken) if end else (broken, good)
    for windows, which in (
        ([bad], "1 of 1 windows are not finite, the first is window 0"),
        (
            [(good, good), bad, (good, good)],
            "1 of 3 windows are not finite, the first is window 1",
        ),
    ):
        with pytest.raises(NotFiniteError, match=f"^the outputs for {which}$"):
            select_one(question, offsets, *windows)
