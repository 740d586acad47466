"""Tokenizers: what AutoTokenizer loads, a bare SentencePiece model, and one trained on the corpus."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Core
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges, import_protobuf

from ted_ds.errors import DataError

logger = logging.getLogger("ted_ds")

SPIECE = "tokenizer.model"
_FOLDER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", SPIECE, "spiece.model")
_UNIGRAM, _BPE = 1, 2
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6

PROBES = (
    "Two  words,\n\tthen\r\n   an indented line; 12345.678 and \u00e9\u00df\u6f22\u5b57 \U0001f600 e\u0301 \ufb01.",
    " leading, trailing ",
    "def f(x):\n    return {'a': x ** 2}  # \u2192\n\n\n",
    "\u2581 already there, \x00 nothing, \u3000 wide\u00a0space",
    "\n\u3000 ends by other spaces\u00a0\n",
    "a mark of spaces ends it \u2581",
)
"""Texts by which a converted SentencePiece model must agree with sentencepiece itself."""


SPECIAL_TOKENS = 4
"""The most that a tokenizer puts around two texts (RoBERTa)."""

LINE_BYTES = 1 << 20
"""SentencePiece leaves longer lines out of its training."""

TRAINING_LINES = 2_000_000
"""More are sampled in SentencePiece's training: it holds them in memory."""

RESERVED = "\u2585"
"""SentencePiece leaves lines with this character out of its training."""

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
        """The end-of-document token. Raises DataError where there is none (BERT's)."""
        if self._tokenizer.eos_token_id is None:
            raise DataError(
                f"tokenizer {self.name} has no end-of-document token: set eos_token in its tokenizer_config.json"
            )
        return int(self._tokenizer.eos_token_id)

    @property
    def end(self) -> list[int]:
        """The end-of-document token, or nothing where there is none."""
        return [] if self._tokenizer.eos_token_id is None else [self.eos_id]

    @property
    def pad_id(self) -> int:
        """The padding token, or the end-of-document token where there is none. Raises DataError for neither."""
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
    Raises DataError where there is none, where it cannot be loaded, and for code that is not trusted.
    """
    path = Path(name_or_path)
    if path.is_file():
        return Tokenizer(_from_sentencepiece(path), name_or_path)
    if path.is_dir():
        if not holds_tokenizer(path):
            raise DataError(f"{name_or_path} holds no tokenizer ({', '.join(_FOLDER_FILES)}): give one that does")
        if [name for name in _FOLDER_FILES if (path / name).exists()] == [SPIECE]:
            return Tokenizer(_from_sentencepiece(path / SPIECE), name_or_path)
    try:
        # by None transformers would ask on the terminal
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises whatever the missing or broken file led to
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise DataError(
                f"tokenizer {name_or_path!r} has code of its own, which runs only if you trust it: read it, then set "
                "data.trust_remote_code: true (ted-ds evaluate: --trust-remote-code)"
            ) from error
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"tokenizer {name_or_path!r} cannot be loaded: {reason}") from error
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


def train_sentencepiece(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Trains a SentencePiece BPE model on `texts` and writes `folder`, renamed into place when whole.

    Lossless: no normalisation, bytes for what is rare, line breaks and tabs are pieces of their own, digits
    are single. Lines that sentencepiece would leave out are cut; of more than `TRAINING_LINES`, that many at random
    are seen. The log says so.
    Raises DataError where the corpus is too small for `vocab_size` pieces, or has no text.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    sentencepiece.set_random_generator_seed(0)
    lines = _TrainingLines(texts)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_prefix=str(temporary / "tokenizer"),
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n", "\t"],
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            max_sentence_length=LINE_BYTES,
            input_sentence_size=TRAINING_LINES,
            shuffle_input_sentence=True,
            minloglevel=2,
        )
    except RuntimeError as error:
        if lines.failure is not None:
            raise lines.failure from error
        # "INTERNAL: src/trainer_interface.cc(744) [condition] what a reader needs"
        reason = (
            re.sub(r"^[A-Z]+: \S+\(\d+\) \[.*\] *", "", str(error).splitlines()[-1])
            if lines.count
            else "it has no text"
        )
        raise DataError(f"no tokenizer of {vocab_size} pieces from this corpus: {reason or error}") from error
    lines.report()
    (temporary / "tokenizer.vocab").unlink()
    Tokenizer(_from_sentencepiece(temporary / SPIECE), str(folder)).save(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


class _TrainingLines:
    """The lines of texts as sentencepiece takes them: none empty, too long, or with its reserved character.

    count: lines given so far. failure: what ended the texts, of which sentencepiece keeps a line of its trace.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self.failure: Exception | None = None
        self.count = self._long = self._reserved = 0

    def __iter__(self) -> Iterator[str]:
        try:
            yield from self._lines()
        except Exception as error:
            self.failure = error
            raise

    def _lines(self) -> Iterator[str]:
        for text in self._texts:
            for line in text.splitlines():
                self._reserved += RESERVED in line
                for part in line.split(RESERVED):
                    for short in self._cut(part):
                        self.count += 1
                        yield short

    def _cut(self, line: str) -> Iterator[str]:
        """Parts of a line that is too long, cut at spaces where there are any, else between characters."""
        most = LINE_BYTES // 4  # a character has four bytes at most
        if len(line) > most and len(line.encode()) > LINE_BYTES:
            self._long += 1
            while len(line) > most:
                space = line.rfind(" ", most // 2, most)
                end = most if space < 0 else space
                yield line[:end]
                line = line[end:]
        if line:
            yield line

    def report(self) -> None:
        """Says in the log what was done to the lines."""
        if self._long:
            logger.warning(
                "training the tokenizer: lines of more than %d bytes, which were cut: %d", LINE_BYTES, self._long
            )
        if self._reserved:
            logger.warning(
                "training the tokenizer: lines with U+%04X, which sentencepiece keeps for itself, and which were cut "
                "there: %d",
                ord(RESERVED),
                self._reserved,
            )
        if self.count > TRAINING_LINES:
            logger.warning(
                "training the tokenizer: %d of %d lines, drawn at random, were seen", TRAINING_LINES, self.count
            )


def train_wordpiece(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Trains an uncased WordPiece tokenizer as BERT's and writes `folder`, renamed into place when whole.

    The same texts give the same tokenizer. Few texts give less than `vocab_size` pieces; texts of more characters
    than that give a piece for each. All texts are held in memory, for they are read twice.
    Raises DataError where there is no text.
    """
    held = list(texts)
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    alphabet = sorted(set(normalizer.normalize_str("".join(sorted(set().union(*held))))) - {" "})
    if not alphabet:
        raise DataError(f"no tokenizer of {vocab_size} pieces from this corpus: it has no text")
    special = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    # The trainer numbers the characters within words as a hash table gives them, and breaks ties of merges by
    # these numbers, so that each run would make another tokenizer; what is named as special has its number.
    within = [f"##{mark}" for mark in alphabet if len(splitter.pre_tokenize_str(f"a{mark}")) == 1]
    scratch = Core(models.WordPiece(unk_token=special["unk"]))
    scratch.normalizer, scratch.pre_tokenizer = normalizer, splitter
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=[*special.values(), *within], show_progress=False
    )
    scratch.train_from_iterator(held, trainer)
    core = Core(models.WordPiece(scratch.get_vocab(), unk_token=special["unk"]))
    core.normalizer, core.pre_tokenizer, core.decoder = normalizer, splitter, decoders.WordPiece()
    ends = [(special[name], core.token_to_id(special[name])) for name in ("cls", "sep")]
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **{f"{name}_token": token for name, token in special.items()},
    )
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    fast.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def _from_sentencepiece(path: Path) -> PreTrainedTokenizerFast:
    """The SentencePiece model as a fast tokenizer with the same ids, which is checked by `PROBES`.

    No BOS is added, as by sentencepiece itself. Two rarities differ, as in the tokenizers of transformers: of
    models that normalise (NFKC), combining marks after compatibility characters and single Hangul jamo; of
    unigram models that do not know "<", names of control pieces that a text spells out.
    """
    model: Any = import_protobuf().ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
        original = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except Exception as error:  # protobuf and sentencepiece each raise their own
        raise DataError(f"{path} is no SentencePiece model: {str(error).splitlines()[0]}") from error
    core = _core(model, path)
    special = {
        f"{name}_token": model.pieces[number].piece
        for name, number in (("unk", original.unk_id()), ("bos", original.bos_id()), ("eos", original.eos_id()))
        if number >= 0
    }
    # as by sentencepiece, a document that spells out "</s>" does not end there
    fast = PreTrainedTokenizerFast(tokenizer_object=core, split_special_tokens=True, **special)
    # sentencepiece tends to spaces around a user-defined symbol as it does within a text
    around = [f" {p.piece}a{p.piece}  b" for p in model.pieces if p.type == _USER_DEFINED]
    for text in (*PROBES, *around):
        ours, theirs = fast(text, add_special_tokens=False)["input_ids"], original.encode(text)
        if ours != theirs:
            raise DataError(
                f"the SentencePiece model {path} has rules that a fast tokenizer cannot repeat (it splits {text!r} "
                "otherwise): give the Hugging Face folder of its model"
            )
    return fast


def _core(model: Any, path: Path) -> Core:
    trainer, rules = model.trainer_spec, model.normalizer_spec
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    if trainer.model_type == _UNIGRAM:
        # no text becomes these, not even one that spells them out: its other paths are likelier
        never = 10 * min(score for _, score in pieces) - 1000
        scores = [(p.piece, never if p.type in (_UNKNOWN, _CONTROL, _UNUSED, _BYTE) else p.score) for p in model.pieces]
        core = Core(models.Unigram(scores, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback))
    elif trainer.model_type == _BPE:
        vocabulary = {piece: number for number, (piece, _) in enumerate(pieces)}
        unmerged = {p.piece for p in model.pieces if p.type in (_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE)}
        merges = generate_merges(vocabulary, pieces, unmerged)
        core = Core(
            models.BPE(
                vocabulary, merges, unk_token=trainer.unk_piece, fuse_unk=True, byte_fallback=trainer.byte_fallback
            )
        )
    else:
        raise DataError(f"{path} is a SentencePiece model by words or characters: give a unigram or BPE one")
    core.add_tokens(
        [
            AddedToken(p.piece, normalized=False, special=p.type == _CONTROL)
            for p in model.pieces
            if p.type in (_CONTROL, _USER_DEFINED)
        ]
    )
    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +|[ \u2581]+\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend("\u2581"))
    core.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    if not any("\u2581" in piece.lstrip("\u2581") for piece, _ in pieces):
        # no piece runs over the beginning of a word, so words can be merged, and cached, by themselves
        core.pre_tokenizer = pre_tokenizers.Split(Regex("\u2581+[^\u2581]*|[^\u2581]+"), "isolated")
    strip = [decoders.Strip(" ", 1, 0)] if rules.add_dummy_prefix else []
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return core
