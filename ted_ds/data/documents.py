"""Held-out documents, each by itself: windows of its tokens, in batches of like lengths, and what its text counts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from ted_ds.batch import IGNORED
from ted_ds.data.bad_rows import BadRows
from ted_ds.data.manifests import Entries
from ted_ds.data.tokenizers import Tokenizer
from ted_ds.data.tokenizing import TextCounts, grouped, tokenized

HELD_TOKENS = 1 << 22
"""Tokens of windows that are sorted by length at a time."""


@dataclass(frozen=True)
class Document:
    """A document's own tokens [n] int32, without special ones, and what its text counts.

    words, bytes: see `TextCounts`.
    """

    ids: np.ndarray
    words: int
    bytes: int


def iter_documents(entries: Entries, tokenizer: Tokenizer, *, text_column: str = "text") -> Iterator[Document]:
    """The documents of all entries, in order; DataError if data is missing or unreadable."""
    held, counts = list[np.ndarray](), TextCounts()
    with BadRows(skip=None) as bad:
        for piece, ids in tokenized(entries, tokenizer, bad, text_column=text_column, processes=None, what="tokenize"):
            held.append(np.array(ids[len(tokenizer.prefix) :], dtype=np.int32))
            counts.add(piece)
            if piece.ends:
                yield Document(np.concatenate(held), counts.words, counts.bytes)
                held, counts = [], TextCounts()


def beginning(tokenizer: Tokenizer, documents: Iterator[Document]) -> tuple[list[int], Iterator[Document]]:
    """(the ids that every document follows, the documents).

    What the tokenizer itself puts before a text. If that is nothing: the end-of-document token, which stands before a
    document in packed rows. If the data is one document, nothing does, and its first token is not predicted.
    """
    first = list(islice(documents, 2))
    alone = len(first) < 2
    return tokenizer.prefix or ([] if alone else tokenizer.end), chain(first, documents)


@dataclass(frozen=True)
class WindowBatch:
    """Windows of documents, padded on the right; causal attention keeps the padding out of sight.

    inputs: [B, S] int64. targets: [B, S] int64, the next id, `IGNORED` on padding and for what precedes a document.
    ends: [B, S] bool, where the target is the end of a document and no part of its text.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    ends: torch.Tensor


Window = tuple[np.ndarray, np.ndarray, np.ndarray]
"""A row of a `WindowBatch`."""


def window_batches(
    documents: Iterator[Document], begin: list[int], end: list[int], *, length: int, batch_tokens: int
) -> Iterator[WindowBatch]:
    """Every document after `begin` and before `end`, in disjoint windows of `length` inputs at most.

    The last position of a window predicts the first token of the next: each token is predicted exactly once.
    Batches have windows of like lengths, and `batch_tokens` positions at most, or one window.
    """
    windows = (window for document in documents for window in _windows(document, begin, end, length))
    for held in grouped(windows, lambda window: len(window[0]), HELD_TOKENS):
        yield from _batches(held, batch_tokens)


def _windows(document: Document, begin: list[int], end: list[int], length: int) -> Iterator[Window]:
    stream = np.concatenate([begin, document.ids, end]).astype(np.int64)
    targets = stream[1:].copy()
    targets[: max(0, len(begin) - 1)] = IGNORED
    ends = np.arange(len(targets)) >= len(targets) - bool(end)
    for start in range(0, len(targets), length):
        part = slice(start, min(start + length, len(targets)))
        yield stream[part], targets[part], ends[part]


def _batches(windows: list[Window], batch_tokens: int) -> Iterator[WindowBatch]:
    windows = sorted(windows, key=lambda window: len(window[0]), reverse=True)
    start = 0
    while start < len(windows):
        longest = len(windows[start][0])
        group = windows[start : start + max(1, batch_tokens // longest)]
        start += len(group)
        inputs, targets, ends = ([torch.from_numpy(array) for array in arrays] for arrays in zip(*group, strict=True))
        yield WindowBatch(
            pad_sequence(inputs, batch_first=True),
            pad_sequence(targets, batch_first=True, padding_value=IGNORED),
            pad_sequence(ends, batch_first=True),
        )
