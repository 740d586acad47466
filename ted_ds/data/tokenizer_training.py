"""Tokenizers that are trained on a corpus."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer as Core
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ted_ds.data.sentencepiece_models import from_sentencepiece
from ted_ds.data.tokenizers import SPIECE, Tokenizer
from ted_ds.errors import DataError
from ted_ds.job.files import new_folder

logger = logging.getLogger("ted_ds")

LINE_BYTES = 1 << 20
"""SentencePiece leaves longer lines out of its training."""

TRAINING_LINES = 2_000_000
"""More are sampled in SentencePiece's training: it holds them in memory."""

RESERVED = "\u2585"
"""SentencePiece leaves lines with this character out of its training."""


def train_sentencepiece(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Trains a SentencePiece BPE model on `texts` and writes `folder`, renamed into place when whole.

    Lossless: no normalisation, bytes for what is rare, line breaks and tabs are pieces of their own, digits
    are single. Lines that sentencepiece would leave out are cut; of more than `TRAINING_LINES`, that many at random
    are seen. The log says so.
    Raises DataError if the corpus is too small for `vocab_size` pieces, or has no text.
    """
    sentencepiece.set_random_generator_seed(0)
    lines = _TrainingLines(texts)
    with new_folder(folder) as new:
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_prefix=str(new / "tokenizer"),
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
            said = re.sub(r"^[A-Z]+: \S+\(\d+\) \[.*\] *", "", str(error).splitlines()[-1]) or error
            reason = said if lines.count else "it has no text"
            raise DataError(f"no tokenizer of {vocab_size} pieces from this corpus: {reason}") from error
        lines.report()
        (new / "tokenizer.vocab").unlink()
        Tokenizer(from_sentencepiece(new / SPIECE), str(folder)).save(new)
        shutil.rmtree(folder, ignore_errors=True)


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
            for line in (line for text in self._texts for line in text.splitlines()):
                self._reserved += RESERVED in line
                for part in line.split(RESERVED):
                    for short in self._cut(part):
                        self.count += 1
                        yield short
        except Exception as error:
            self.failure = error
            raise

    def _cut(self, line: str) -> Iterator[str]:
        """Parts of a line that is too long, cut at spaces if there are any, else between characters."""
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
        at = "training the tokenizer: "
        if self._long:
            logger.warning(at + "lines of more than %d bytes, which were cut: %d", LINE_BYTES, self._long)
        if self._reserved:
            kept = at + "lines with U+%04X, which sentencepiece keeps for itself, and which were cut there: %d"
            logger.warning(kept, ord(RESERVED), self._reserved)
        if self.count > TRAINING_LINES:
            logger.warning(at + "%d of %d lines, drawn at random, were seen", TRAINING_LINES, self.count)


def train_wordpiece(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Trains an uncased WordPiece tokenizer as BERT's and writes `folder`, renamed into place when whole.

    The same texts give the same tokenizer. Few texts give less than `vocab_size` pieces; texts of more characters
    than that give a piece for each. All texts are held in memory, for they are read twice.
    Raises DataError if there is no text.
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
    with new_folder(folder) as new:
        fast.save_pretrained(new)
        shutil.rmtree(folder, ignore_errors=True)
