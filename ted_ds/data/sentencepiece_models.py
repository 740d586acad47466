"""A bare SentencePiece model as a fast tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Core
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges, import_protobuf

from ted_ds.errors import DataError

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


def from_sentencepiece(path: Path) -> PreTrainedTokenizerFast:
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
