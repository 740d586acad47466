"""Held-out perplexity: of a run's packed rows from its engine, and of documents, each by itself, from a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ted_ds.batch import IGNORED, Batch
from ted_ds.data.documents import Document, beginning, window_batches
from ted_ds.data.tokenizers import Tokenizer
from ted_ds.errors import DataError, NotFiniteError
from ted_ds.job.world import World
from ted_ds.models.structure import find_structure
from ted_ds.ops import Head, token_scores

_LARGEST_EXPONENT = 700.0
"""exp of more overflows a float; a diverged model's perplexity stays a number that JSON can hold."""


@dataclass(frozen=True)
class Perplexity:
    """loss: mean nats a token; perplexity: exp(loss), at most exp(700); tokens: how many were predicted."""

    loss: float
    perplexity: float
    tokens: int


def perplexity(nll_sum: float, count: int) -> Perplexity:
    """nll_sum: sum of -log p(token), in nats, over `count` predicted tokens.

    DataError if count is 0, NotFiniteError if the sum is nan or infinite.
    """
    if count < 1:
        raise DataError("perplexity: no token to predict; the data is empty or its sequences have one token")
    if not math.isfinite(nll_sum):
        raise NotFiniteError(f"the loss of {count} tokens is {nll_sum}, which is not finite")
    loss = nll_sum / count
    return Perplexity(loss, math.exp(min(loss, _LARGEST_EXPONENT)), count)


def held_out_perplexity(
    engine: Any, rows: Iterable[Batch], world: World, *, words: int | None = None, size: int | None = None
) -> dict[str, float]:
    """validation_loss (nats a token) and validation_perplexity = exp of it; a collective.

    words, size (bytes): of the text, see `TextCounts`. With them also validation_word_perplexity,
    validation_byte_perplexity and validation_bits_per_byte, of the documents' own tokens alone.

    rows: as many batches on every rank (ranks without rows get batches without targets), since ZeRO-3
    gathers weights collectively. Sums are float64: the split over ranks shows in the last digits only.
    """
    engine.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=world.device)
    with torch.no_grad():
        for batch in rows:
            sums += torch.stack(engine(batch=batch.to(world.device))).to(sums)
    engine.train()
    nll, count, own = world.sum(sums).tolist()
    score = perplexity(nll, int(count))
    scores = {"loss": score.loss, "perplexity": score.perplexity}
    if words and size:
        scores |= _of_text(own, words, size)
    return {f"validation_{name}": value for name, value in scores.items()}


def _of_text(nll: float, words: int, size: int) -> dict[str, float]:
    """What does not depend on the tokenizer, of the nats of documents' own tokens."""
    return {
        "word_perplexity": perplexity(nll, words).perplexity,
        "byte_perplexity": perplexity(nll, size).perplexity,
        "bits_per_byte": nll / size / math.log(2),
    }


def document_perplexity(
    model: Any,
    tokenizer: Tokenizer,
    documents: Iterator[Document],
    *,
    length: int,
    batch_size: int,
    device: torch.device,
) -> dict[str, Any]:
    """Perplexities of a causal Hugging Face model, each document by itself: it sees nothing of the others.

    loss, perplexity: a token's, of the documents' own and of their ends. word_perplexity, byte_perplexity,
    bits_per_byte: of the documents' own tokens alone, over words and bytes (see `TextCounts`), as lm-evaluation-harness
    has them. documents_begin_with: the tokens that each document follows, null if none (see `beginning`). Further
    documents, tokens (predicted ones), words, bytes.
    length: tokens a window. batch_size: windows of full length a forward; of shorter ones it takes more. The model is
    in eval mode on `device`. Raises DataError for an id that the model has no row for.
    """
    begin, documents = beginning(tokenizer, documents)
    counts = _Counts(tokenizer, find_structure(model).vocab_rows)
    counts.check(np.array(begin + tokenizer.end), "what stands around documents")
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    batches = window_batches(
        counts.counted(documents), begin, tokenizer.end, length=length, batch_tokens=batch_size * length
    )
    for batch in batches:
        sums += _sums(model, batch.inputs.to(device), batch.targets.to(device), batch.ends.to(device), tokenizer)
    nll, own, tokens = sums.tolist()
    token = perplexity(nll, int(tokens))
    return {
        "documents_begin_with": tokenizer.decode(begin) if begin else None,
        "documents": counts.documents,
        "tokens": int(tokens),
        "words": counts.words,
        "bytes": counts.bytes,
        "loss": token.loss,
        "perplexity": token.perplexity,
        **_of_text(own, counts.words, counts.bytes),
    }


class _Counts:
    """What documents count, as they go by; DataError for an id that is none of the model's `rows`."""

    def __init__(self, tokenizer: Tokenizer, rows: int) -> None:
        self._tokenizer, self._rows = tokenizer, rows
        self.documents = self.words = self.bytes = 0

    def check(self, ids: np.ndarray, what: str) -> None:
        largest = int(ids.max(initial=0))
        if largest >= self._rows:
            raise DataError(
                f"{what} has the id {self._tokenizer.spelled(largest)}, the model has {self._rows} vocabulary rows: "
                "use the tokenizer that the model was trained with, or take it out of the text"
            )

    def counted(self, documents: Iterator[Document]) -> Iterator[Document]:
        for document in documents:
            self.documents += 1
            self.check(document.ids, f"document {self.documents}")
            self.words += document.words
            self.bytes += document.bytes
            yield document


@torch.no_grad()
def _sums(
    model: Any, inputs: torch.Tensor, targets: torch.Tensor, ends: torch.Tensor, tokenizer: Tokenizer
) -> torch.Tensor:
    """[3] float64: nats of all targets, of those that are no document's end, and how many targets there are."""
    structure = find_structure(model)
    # a mask of ones is as none, but transformers, which looks for padding, does not warn
    hidden = structure.backbone(
        input_ids=inputs, attention_mask=torch.ones_like(inputs), use_cache=False
    ).last_hidden_state
    head = Head(structure.lm_head.weight, structure.lm_head.bias, structure.logit_softcap, structure.logit_scale)
    vocabulary = min(tokenizer.vocab_size, structure.vocab_rows)
    nll, _ = token_scores(hidden.flatten(0, 1), head, targets.flatten(), vocab_size=vocabulary)
    own = nll.masked_fill(ends.flatten(), 0.0)
    return torch.stack(
        [nll.sum(dtype=torch.float64), own.sum(dtype=torch.float64), (targets != IGNORED).sum().double()]
    )
