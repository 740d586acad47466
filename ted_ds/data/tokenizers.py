"""Tokenizers: what AutoTokenizer loads, and a bare SentencePiece model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ted_ds.data.hub import cause
from ted_ds.data.sentencepiece_models import from_sentencepiece
from ted_ds.data.text_files import refuse_incomplete
from ted_ds.errors import DataError

SPIECE = "tokenizer.model"

_FOLDER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", SPIECE, "spiece.model")

SPECIAL_TOKENS = 4
"""The most that a tokenizer puts around two texts (RoBERTa)."""

PROBED_PIECES = 100
"""Pieces of a vocabulary that may be tried for one that is a text by itself."""


@dataclass(frozen=True)
class Encodings:
    """Rows of token ids, and for each the position of the first token of the second text (its length without one)."""

    ids: list[list[int]]
    seconds: list[int]


@dataclass(frozen=True)
class Windows:
    """Windows of contexts: their ids, which pair each is of, and the characters [S, 2] of the context that each token
    stands for, -1 outside the context.
    """

    encodings: Encodings
    pairs: list[int]
    offsets: list[np.ndarray]


class Tokenizer:
    """A tokenizer of transformers with what distillation needs of it.

    vocab_size: ids run from 0 to vocab_size - 1, added tokens included.
    text_vocab_size: likewise, of the pieces that texts are made of, without added tokens.
    prefix: ids that the tokenizer itself puts before every text (Llama's BOS, OPT's, which is its EOS too; none for
        GPT-2). What it puts behind a text (T5's EOS) is no part of it.
    fingerprint: hash of everything that decides which ids a text becomes.
    trust_remote_code: whether the tokenizer's own code, if it has any, may run.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str, *, trust_remote_code: bool = False) -> None:
        self._tokenizer = tokenizer
        self.name, self.trust_remote_code = name, trust_remote_code
        self._vocabulary: dict[str, int] = tokenizer.get_vocab()
        self.vocab_size = max(self._vocabulary.values()) + 1
        added = tokenizer.get_added_vocab()
        self.text_vocab_size = max((n for piece, n in self._vocabulary.items() if piece not in added), default=-1) + 1
        self.prefix: list[int] = _prefix(tokenizer)
        core = getattr(tokenizer, "backend_tokenizer", None)
        rules = core.to_str() if core is not None else type(tokenizer).__name__ + json.dumps(self._vocabulary)
        split = getattr(tokenizer, "split_special_tokens", False)
        # not `prefix`: prepared data and checkpoints hold this hash
        around = [i for i in tokenizer("")["input_ids"] if i != tokenizer.eos_token_id]
        self.fingerprint = hashlib.sha256(f"{rules}{around}{tokenizer.eos_token_id}{split}".encode()).hexdigest()

    @property
    def eos_id(self) -> int:
        """The end-of-document token. Raises DataError if there is none (BERT's)."""
        if self._tokenizer.eos_token_id is None:
            raise DataError(
                f"tokenizer {self.name} has no end-of-document token: set eos_token in its tokenizer_config.json"
            )
        return int(self._tokenizer.eos_token_id)

    @property
    def end(self) -> list[int]:
        """The end-of-document token, or nothing if there is none."""
        return [] if self._tokenizer.eos_token_id is None else [self.eos_id]

    @property
    def pad_id(self) -> int:
        """The padding token, or the end-of-document token if there is none. Raises DataError for neither."""
        found = self._tokenizer.pad_token_id
        return self.eos_id if found is None else int(found)

    def encode_texts(self, texts: list[tuple[str, ...]], max_length: int) -> Encodings:
        """One or two texts a row, with the tokenizer's special tokens, the longer one cut first.

        A tokenizer that puts nothing between two texts (Qwen's) gets a line break there.
        """
        columns = self._columns(texts)
        return self._encodings(self._tokenizer(*columns, truncation=True, max_length=max_length, verbose=False))

    def lengths(self, texts: list[tuple[str, ...]]) -> list[int]:
        """Tokens of each row that is not cut."""
        columns = self._columns(texts)
        return [len(ids) for ids in self._tokenizer(*columns, verbose=False)["input_ids"]] if texts else []

    def _columns(self, texts: list[tuple[str, ...]]) -> list[list[str]]:
        columns = [list(column) for column in zip(*texts, strict=True)]
        around = [self._tokenizer.num_special_tokens_to_add(pair=pair) for pair in (False, True)]
        if len(columns) == 2 and around[0] == around[1]:
            columns[1] = [f"\n{text}" for text in columns[1]]
        return columns

    def encode_windows(self, pairs: list[tuple[str, str]], max_length: int, stride: int) -> Windows:
        """Overlapping windows of (question, context), in which the context alone is cut.

        stride: tokens that neighbouring windows share, as transformers' doc_stride (BERT's own script advances by
            it). A question longer than half of `max_length` is cut to that.
        Raises DataError for a tokenizer without offsets, and a stride that leaves no room.
        """
        room = max_length - max_length // 2 - SPECIAL_TOKENS
        if not 0 < stride < room:
            raise DataError(
                f"data.doc_stride ({stride}) must be less than {room} at data.sequence_length {max_length}: lower it, "
                "or give longer rows"
            )
        if not self._tokenizer.is_fast:
            raise DataError(f"tokenizer {self.name} knows no offsets: question answering needs a fast tokenizer")
        questions = self._cut([question.lstrip() for question, _ in pairs], max_length // 2)
        found = self._tokenizer(
            questions,
            [context for _, context in pairs],
            truncation="only_second",
            max_length=max_length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            verbose=False,
        )
        offsets = []
        for i, pairs_ in enumerate(found["offset_mapping"]):
            spans = np.array(pairs_, dtype=np.int32)
            spans[[owner != 1 for owner in found.sequence_ids(i)]] = -1
            offsets.append(spans)
        return Windows(self._encodings(found), found["overflow_to_sample_mapping"], offsets)

    def _cut(self, texts: list[str], most: int) -> list[str]:
        found = self._tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [
            text if len(spans) <= most else text[: spans[most - 1][1]]
            for text, spans in zip(texts, found["offset_mapping"], strict=True)
        ]

    def _encodings(self, found: Any) -> Encodings:
        ids = found["input_ids"]
        types = found.get("token_type_ids") or [[0] * len(row) for row in ids]
        return Encodings(ids, [row.index(1) if 1 in row else len(row) for row in types])

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, after `prefix` and without an end-of-document token."""
        encoded = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [self.prefix + ids for ids in encoded] if self.prefix else encoded

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, special tokens included."""
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def spelled(self, number: int) -> str:
        """An id and its token, for messages: `7 ('<pad>')`."""
        return f"{number} ({self._tokenizer.convert_ids_to_tokens(number)!r})"

    def agrees_with(self, other: Tokenizer) -> bool:
        """Whether both give pieces the same ids; either may have more *added* tokens (padding, chat marks)."""
        for one, two in ((self, other), (other, self)):
            added = one._tokenizer.get_added_vocab()
            for piece, number in one._vocabulary.items():
                if two._vocabulary.get(piece, number if piece in added else None) != number:
                    return False
        return True

    def save(self, folder: Path) -> None:
        """Writes the files from which AutoTokenizer loads it."""
        self._tokenizer("")  # the core would keep, and write, the last call's truncation
        self._tokenizer.save_pretrained(folder)


def holds_tokenizer(folder: Path) -> bool:
    """Whether a folder has any file that a tokenizer is loaded from."""
    return any((folder / name).exists() for name in _FOLDER_FILES)


def load_tokenizer(name_or_path: str, *, trust_remote_code: bool = False) -> Tokenizer:
    """The tokenizer of a folder or hub id, or of a bare SentencePiece `.model` file.

    trust_remote_code: run the code that comes with it, if any; nobody is asked.
    Raises DataError if there is none, if it cannot be loaded, and for code that is not trusted.
    """
    path = Path(name_or_path)
    for file in (path, *(path / name for name in _FOLDER_FILES)):
        if file.is_file():
            refuse_incomplete(file)
    if path.is_file():
        return Tokenizer(from_sentencepiece(path), name_or_path)
    if path.is_dir():
        if not holds_tokenizer(path):
            raise DataError(f"{name_or_path} holds no tokenizer ({', '.join(_FOLDER_FILES)}): give one that does")
        if [name for name in _FOLDER_FILES if (path / name).exists()] == [SPIECE]:
            return Tokenizer(from_sentencepiece(path / SPIECE), name_or_path)
    try:
        # by None transformers would ask on the terminal
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises whatever the missing or broken file led to
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise DataError(
                f"tokenizer {name_or_path!r} has code of its own, which runs only if you trust it: read it, then set "
                "data.trust_remote_code: true, or for a model's tokenizer the model's (ted-ds evaluate: "
                "--trust-remote-code)"
            ) from error
        raise DataError(f"tokenizer {name_or_path!r} cannot be loaded: {cause(error)}") from error
    return Tokenizer(tokenizer, name_or_path, trust_remote_code=trust_remote_code)


def _prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids before the text in an encoded text, told by their place; a vocabulary's own piece is the text.

    BERT's own "[CLS]" or OPT's "</s>" can be told from what stands behind a text in no other way.
    """
    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    ordinary = (i for i in sorted(tokenizer.get_vocab().values()) if i not in special)
    for number in islice(ordinary, PROBED_PIECES):
        text = tokenizer.decode([number])
        whole, bare = tokenizer(text)["input_ids"], tokenizer(text, add_special_tokens=False)["input_ids"]
        if not bare or special & set(bare):
            continue
        found = [i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare]
        if len(found) == 1:  # a piece that spells out what the tokenizer puts around texts is found twice
            return list(whole[: found[0]])
    # no piece is a text by itself: without a text between them, what stands before and behind differs by id alone
    return [i for i in tokenizer("")["input_ids"] if i != tokenizer.eos_token_id]
