"""LAMBADA (arXiv 1606.06031): can the model say a passage's last word, given all of the passage?

Scored as OpenAI and lm-evaluation-harness do: the word with its leading space, all of its tokens greedy for
accuracy; perplexity per word, not per token.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from ted_ds.batch import IGNORED
from ted_ds.errors import DataError
from ted_ds.evaluation.perplexity import perplexity
from ted_ds.models.structure import find_structure
from ted_ds.ops import Head, token_scores


class Encoder(Protocol):
    """A tokenizer; special tokens, if it adds any, come before the text."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...

    def spelled(self, number: int) -> str: ...


def split_last_word(text: str) -> tuple[str, str]:
    """(context, word): the word after the last white space, which it keeps in front; trailing space is cut.

    DataError if the text has fewer than two words: there would be no context to predict from.
    """
    text = text.rstrip()
    found = re.search(r"(?<=\S)\s+\S+$", text)
    if found is None:
        raise DataError(
            f"LAMBADA needs a context and a last word, but this passage has fewer than two words: {text!r:.80}"
        )
    return text[: found.start()], found.group()


def _numbered_split(number: int, text: str) -> tuple[str, str]:
    try:
        return split_last_word(text)
    except DataError as error:
        raise DataError(f"passage {number}: {error}: complete or drop it") from error


def lambada(
    model: Any, tokenizer: Encoder, texts: Sequence[str], *, batch_size: int, device: torch.device
) -> dict[str, float]:
    """{"accuracy", "perplexity", "examples"} of a causal Hugging Face model on passages.

    accuracy: the fraction of passages whose last word's tokens are all the model's greedy choice;
    perplexity: exp(mean over passages of the word's -log p, summed over its tokens).
    batch_size: passages a forward, padded on the right. A passage longer than the model's positions loses
    its beginning. The model is evaluated in eval mode, and left in the mode it was in.
    Raises DataError for a passage that is too short, or holds an id that the model has no row for.
    """
    found = list(_encode(tokenizer, texts, _longest_input(model)))
    rows = find_structure(model).vocab_rows
    for number, (ids, _) in enumerate(found, 1):
        if max(ids) >= rows:
            raise DataError(
                f"LAMBADA's passage {number} has the id {tokenizer.spelled(max(ids))}, the model has {rows} vocabulary "
                "rows: use the tokenizer that the model was trained with"
            )
    examples = sorted(found, key=lambda e: len(e[0]), reverse=True)
    was_training = model.training
    model.eval()
    try:
        parts = [_score(model, examples[i : i + batch_size], device) for i in range(0, len(examples), batch_size)]
    finally:
        model.train(was_training)
    nll, hits = (torch.cat(part) for part in zip(*parts, strict=True))
    score = perplexity(float(nll.sum()), len(examples))
    accuracy = float(hits.double().mean())
    return {"accuracy": accuracy, "perplexity": score.perplexity, "examples": len(examples)}


def _longest_input(model: Any) -> int | None:
    positions = getattr(model.config, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def _encode(tokenizer: Encoder, texts: Sequence[str], longest: int | None) -> Iterator[tuple[list[int], int]]:
    """(tokens of the passage, how many at the end belong to the word).

    Context and word are tokenized together, as the model met them in training. The word begins where the
    passage's tokens part from the context's own: the context's token count, unless the tokenizer merges
    across the boundary; then the merged token is the word's, and none of the word is given away.
    """
    splits = [_numbered_split(number, text) for number, text in enumerate(texts, 1)]
    contexts = tokenizer.encode_batch([context for context, _ in splits])
    wholes = tokenizer.encode_batch([context + word for context, word in splits])
    for context, whole, (_, word) in zip(contexts, wholes, splits, strict=True):
        shared = 0
        while shared < min(len(context), len(whole)) and context[shared] == whole[shared]:
            shared += 1
        if not 0 < shared < len(whole):
            raise DataError(f"the tokenizer leaves no token of context or of the word {word!r}: LAMBADA has no answer")
        # The last token is predicted, never fed: an input of `longest` tokens scores one more.
        kept = whole if longest is None else whole[-(longest + 1) :]
        yield kept, min(len(whole) - shared, len(kept) - 1)


@torch.no_grad()
def _score(
    model: Any, examples: list[tuple[list[int], int]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """-log p of each example's word [B] float64, and whether each of its tokens is greedy [B] bool."""
    inputs, targets, mask = (t.to(device) for t in _pad(examples))
    structure = find_structure(model)
    hidden = structure.backbone(input_ids=inputs, attention_mask=mask, use_cache=False).last_hidden_state
    head = Head(structure.lm_head.weight, structure.lm_head.bias, structure.logit_softcap, structure.logit_scale)
    # The LM head sees the words' positions alone: a few of every passage's hundred.
    example, position = (targets != IGNORED).nonzero(as_tuple=True)
    nll, greedy = token_scores(hidden[example, position], head, targets[example, position])
    nll_sum = torch.zeros(len(examples), dtype=torch.float64, device=device)
    misses = torch.zeros(len(examples), dtype=torch.int64, device=device)
    nll_sum.index_add_(0, example, nll.double())
    misses.index_add_(0, example, (~greedy).long())
    return nll_sum, misses == 0


def _pad(examples: list[tuple[list[int], int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """inputs, targets, attention mask, all [B, S] int64, padded on the right; only word tokens are targets."""
    shape = (len(examples), max(len(tokens) for tokens, _ in examples) - 1)
    inputs, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    targets = torch.full(shape, IGNORED)
    for row, (tokens, word_tokens) in enumerate(examples):
        length = len(tokens) - 1
        inputs[row, :length] = torch.tensor(tokens[:-1])
        mask[row, :length] = 1
        targets[row, length - word_tokens : length] = torch.tensor(tokens[-word_tokens:])
    return inputs, targets, mask
