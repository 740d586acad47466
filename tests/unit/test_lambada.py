"""LAMBADA's scores against one unpadded forward a passage, and its reading of files."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from ted_ds.errors import DataError, NotFiniteError
from ted_ds.evaluation.lambada import lambada, split_last_word
from ted_ds.evaluation.perplexity import perplexity
from tests.tiny_models import tiny_model

TEXTS = [
    "the cat sat on the mat",
    "a much longer passage than all others which ends in some word",
    "two words",
    "it was never clear why the engine stopped running",
]


class Letters:
    """A token a letter, spaces joined to the letter behind them; `merged` are strings that become one token."""

    def __init__(self, *merged: str) -> None:
        self._pattern = re.compile("|".join([*map(re.escape, merged), r"\s?\S"]))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [[sum(map(ord, piece)) * len(piece) % 97 for piece in self._pattern.findall(t)] for t in texts]


def loop(model: Any, tokenizer: Letters, texts: list[str]) -> dict[str, float]:
    """One passage at a time; the word's tokens are those behind the context's."""
    nll, hits = [], 0
    for text in texts:
        context, word = text.rsplit(" ", 1)
        (head,), (whole,) = tokenizer.encode_batch([context]), tokenizer.encode_batch([f"{context} {word}"])
        log_p = model(torch.tensor([whole[:-1]])).logits[0].double().log_softmax(-1)
        positions = range(len(head) - 1, len(whole) - 1)
        nll.append(-sum(float(log_p[i, whole[i + 1]].detach()) for i in positions))
        hits += all(int(log_p[i].argmax()) == whole[i + 1] for i in positions)
    return {"accuracy": hits / len(texts), "perplexity": math.exp(sum(nll) / len(nll)), "examples": len(texts)}


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_scores_equal_a_loop(family: str, batch_size: int) -> None:
    model, tokenizer = tiny_model(family), Letters()
    got = lambada(model, tokenizer, TEXTS, batch_size=batch_size, device=torch.device("cpu"))
    assert got == pytest.approx(loop(model, tokenizer, TEXTS), rel=1e-4)


def test_accuracy_wants_every_token_of_the_word() -> None:
    """A passage that the model itself continued greedily is a hit; with its last letter changed, a miss."""
    model, tokenizer = tiny_model("gpt2"), Greedy()
    with torch.no_grad():
        tokens = [5, 6, 7]
        for _ in range(3):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    right = " ".join(map(str, tokens[:3])) + " " + "_".join(map(str, tokens[3:]))
    wrong = right.rsplit("_", 1)[0] + f"_{(tokens[-1] + 1) % 97}"

    def accuracy(*texts: str) -> float:
        return lambada(model, tokenizer, texts, batch_size=2, device=torch.device("cpu"))["accuracy"]

    assert accuracy(right) == 1.0
    assert accuracy(wrong) == 0.0
    assert accuracy(right, wrong, right, right) == 0.75


class Greedy:
    """Token ids written out, parted by spaces or underscores."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [[int(n) for n in re.findall(r"\d+", text)] for text in texts]


def test_a_token_across_the_boundary_belongs_to_the_word() -> None:
    """With `n s` one token, "on sea" shares one token with "on", and the context's count would skip it."""
    model, merging = tiny_model("gpt2"), Letters("n s")
    (context,), (whole,) = merging.encode_batch(["on"]), merging.encode_batch(["on sea"])
    assert context[:1] == whole[:1] and context[1] != whole[1]
    got = lambada(model, merging, ["on sea"], batch_size=1, device=torch.device("cpu"))
    log_p = model(torch.tensor([whole[:-1]])).logits[0].log_softmax(-1)
    want = math.exp(-sum(float(log_p[i, whole[i + 1]].detach()) for i in range(len(whole) - 1)))
    assert got["perplexity"] == pytest.approx(want, rel=1e-4)


def test_long_passages_lose_their_beginning() -> None:
    model, tokenizer = tiny_model("gpt2"), Letters()  # 64 positions
    text = "x" * 90 + " end"
    got = lambada(model, tokenizer, [text], batch_size=1, device=torch.device("cpu"))
    short = lambada(model, tokenizer, ["x" * 62 + " end"], batch_size=1, device=torch.device("cpu"))
    assert got == pytest.approx(short)


def test_the_models_mode_is_kept() -> None:
    model = tiny_model("gpt2").train()
    lambada(model, Letters(), TEXTS, batch_size=2, device=torch.device("cpu"))
    assert model.training


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a b c", ("a b", " c")),
        ("so he said: “no.”", ("so he said:", " “no.”")),
        ("ends in space \n", ("ends in", " space")),
        ("double  space", ("double", "  space")),
        ("line\nbreak", ("line", "\nbreak")),
    ],
)
def test_split_last_word(text: str, parts: tuple[str, str]) -> None:
    assert split_last_word(text) == parts


@pytest.mark.parametrize("text", ["", "word", "  word  "])
def test_one_word_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="needs a context and a last word"):
        split_last_word(text)
    with pytest.raises(DataError, match=r"^passage 2: LAMBADA needs .*: complete or drop it$"):
        lambada(tiny_model("gpt2"), Letters(), ["a b", text], batch_size=2, device=torch.device("cpu"))


def test_perplexity() -> None:
    score = perplexity(3 * math.log(7.0), 3)
    assert (score.loss, score.perplexity, score.tokens) == pytest.approx((math.log(7.0), 7.0, 3))
    assert math.isfinite(perplexity(1e9, 1).perplexity)
    with pytest.raises(DataError, match="no token to predict"):
        perplexity(0.0, 0)
    for broken in (math.nan, math.inf):
        with pytest.raises(NotFiniteError, match=rf"^the loss of 3 tokens is {broken}, which is not finite$"):
            perplexity(broken, 3)
