from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer as Core
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast, PythonBackend

from ted_ds.data import tokenizer_training as module
from ted_ds.data.prepare import prepare
from ted_ds.data.sentencepiece_models import PROBES
from ted_ds.data.tokenizer_training import train_sentencepiece, train_wordpiece
from ted_ds.data.tokenizers import Tokenizer, load_tokenizer
from ted_ds.errors import DataError, load_failure
from tests.project import make_project

NAMES = ("collector", "config", "deepspeed_config", "eager_grad", "imports", "lambada", "launcher", "layer_loss")
CORPUS = [(Path(__file__).parent / f"test_{name}.py").read_text(encoding="utf-8") for name in NAMES]
AWKWARD = [
    *PROBES,
    "",
    " ",
    "\n",
    "   \n\t  x",
    "\r\n lone \r\x0b\x0c\u2028 ends of lines\u00a0",
    "rare: \U0001f9ff \u0e01\u0e33 \u05d0 \ue000 \ufeff \u200b \uff71\uff9e \u2460\u2163\u2026",
    "names <unk> <s> </s> <pad> <0x0A> spelled out",
    "0123456789 x" * 5,
    "= " * 50 + "_" * 77,
]


def awkward() -> list[str]:
    """AWKWARD, and random strings of what trips tokenizers up."""
    parts = [" ", "  ", "\n", "\t", "\r\n", "a", "self", "return", "\u00e9", "\u6f22", "\x00", "\u3000", "\u00a0"]
    parts += ["12", "__", "==", "\U0001f600", "\u200b", "\u2160", "<s>", "</s>", "<0x0A>", "ab", "ba"]
    draw = random.Random(0)
    return AWKWARD + ["".join(draw.choices(parts, k=draw.randint(1, 12))) for _ in range(500)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "tokenizer"
    train_sentencepiece([*CORPUS, "2026 " * 2000], 500, folder)
    return folder


def word_level(
    *, eos: str | None = "<eos>", added: tuple[str, ...] = (), words: str = "one two three", bos: bool = False
) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<eos>", "<unk>", "<bos>", *words.split()])}
    core = Core(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.decoder = decoders.Fuse()
    core.add_tokens(list(added))
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, unk_token="<unk>")


def bare_model(folder: Path, **changes: Any) -> Path:
    """A SentencePiece model of sentencepiece's own defaults but for `changes`."""
    lines = (line for text in CORPUS for line in text.splitlines())
    options = {"vocab_size": 400, "minloglevel": 2, "num_threads": 1} | changes
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_prefix=str(folder / "m"), **options)
    return folder / "m.model"


@pytest.mark.parametrize("name", [".", "tokenizer.model"])
def test_a_trained_tokenizer_gives_sentencepiece_s_ids_and_loses_nothing(trained: Path, name: str) -> None:
    tokenizer = load_tokenizer(str(trained / name))
    original = sentencepiece.SentencePieceProcessor(model_file=str(trained / "tokenizer.model"))
    texts = awkward()
    ids = tokenizer.encode_batch(texts)
    assert ids == original.encode(texts)
    # "\u2581" is how sentencepiece writes a space
    assert [tokenizer.decode(i) for i in ids] == [text.replace("\u2581", " ") for text in texts]
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.prefix) == (500, original.eos_id(), [])
    assert all(original.unk_id() not in i for i in ids)
    assert tokenizer.decode([*ids[0], 2]) == texts[0] + "</s>"


def test_training_is_lossless_for_digits_and_line_breaks_and_writes_only_the_tokenizer(trained: Path) -> None:
    assert {path.name for path in trained.iterdir()} == {"tokenizer.json", "tokenizer_config.json", "tokenizer.model"}
    assert not trained.with_name("tokenizer.tmp").exists()
    tokenizer = load_tokenizer(str(trained))
    for text in ("2026", "\n\n\t", "\t\n"):
        assert len(tokenizer.encode_batch([text])[0]) == len(text)


@pytest.mark.parametrize(
    ("changes", "loads"),
    [
        ({}, True),
        ({"normalization_rule_name": "identity"}, True),
        ({"normalization_rule_name": "nfkc"}, None),
        ({"byte_fallback": True}, True),
        ({"add_dummy_prefix": False}, True),
        ({"remove_extra_whitespaces": False}, None),
        ({"user_defined_symbols": ["<x>", "self"]}, None),
        ({"model_type": "bpe"}, True),
        ({"model_type": "bpe", "byte_fallback": True, "split_by_whitespace": False}, None),
        ({"treat_whitespace_as_suffix": True}, False),
        ({"model_type": "char", "vocab_size": 80}, False),
    ],
    ids=str,
)
def test_a_bare_model_gives_sentencepiece_s_ids_or_an_error(
    tmp_path: Path, changes: dict[str, Any], loads: bool | None
) -> None:
    path = bare_model(tmp_path, **changes)
    try:
        tokenizer = load_tokenizer(str(path))
    except DataError as error:
        assert not loads
        assert str(path) in str(error) and ("cannot repeat" in str(error) or "words or characters" in str(error))
        return
    assert loads is not False
    texts = awkward()
    for text, ours in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert ours == sentencepiece.SentencePieceProcessor(model_file=str(path)).encode(text), repr(text)


def test_the_tokenizer_s_own_beginning_is_the_prefix_of_every_text() -> None:
    tokenizer = Tokenizer(word_level(bos=True), "t")
    assert tokenizer.prefix == [2] and tokenizer.eos_id == 0
    assert tokenizer.encode_batch(["one two", "", "three"]) == [[2, 3, 4], [2], [2, 5]]
    plain = Tokenizer(word_level(), "t")
    assert plain.prefix == [] and plain.encode_batch(["one two", ""]) == [[3, 4], []]
    assert plain.fingerprint != tokenizer.fingerprint
    assert tokenizer.agrees_with(plain)


def surrounded(single: str, *, eos: str | None, bos: str | None = None) -> PreTrainedTokenizerFast:
    """Words between special tokens, e.g. "</s> $A"."""
    special = ["<s>", "</s>", "[CLS]", "[SEP]"]
    core = Core(models.WordLevel({w: i for i, w in enumerate([*special, "<unk>", "one", "two"])}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(w, i) for i, w in enumerate(special)]
    )
    names = {"eos_token": eos, "bos_token": bos, "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **{n: v for n, v in names.items() if v is not None})


@pytest.mark.parametrize(
    ("single", "eos", "prefix"),
    [
        ("</s> $A", "</s>", [1]),  # OPT
        ("<s> $A", "</s>", [0]),  # Llama
        ("<s> $A </s>", "</s>", [0]),  # BART
        ("$A </s>", "</s>", []),  # T5
        ("</s> $A </s>", "</s>", [1]),
        ("[CLS] $A [SEP]", None, [2]),  # BERT
        ("$A [SEP] [CLS]", "</s>", []),  # XLNet
        ("[CLS] <s> $A", "</s>", [2, 0]),  # GLM
        ("$A", "</s>", []),  # GPT-2
    ],
)
def test_a_prefix_is_told_by_its_place(single: str, eos: str | None, prefix: list[int]) -> None:
    tokenizer = Tokenizer(surrounded(single, eos=eos, bos=eos), "t")
    assert tokenizer.prefix == prefix
    assert tokenizer.encode_batch(["one two", ""]) == [[*prefix, 5, 6], prefix]


class Slow(PythonBackend):
    """A tokenizer in plain Python, of letters; OPT's beginning."""

    def __init__(self, **options: Any) -> None:
        super().__init__(bos_token="</s>", eos_token="</s>", **options)

    @property
    def vocab_size(self) -> int:
        return 26

    def get_vocab(self) -> dict[str, int]:
        return {chr(97 + i): i for i in range(26)} | self.added_tokens_encoder

    def _tokenize(self, text: str) -> list[str]:
        return [letter for letter in text if letter.isalpha()]

    def _convert_token_to_id(self, token: str) -> int:
        return ord(token) - 97

    def _convert_id_to_token(self, index: int) -> str:
        return chr(97 + index)

    def build_inputs_with_special_tokens(self, ids: list[int], other: list[int] | None = None) -> list[int]:
        return [self.bos_token_id, *ids]


def test_a_slow_tokenizer_s_prefix_is_told_by_its_place() -> None:
    tokenizer = Tokenizer(Slow(), "t")
    assert tokenizer.prefix == [26] and tokenizer.encode_batch(["ab"]) == [[26, 0, 1]]
    assert Tokenizer(ByT5Tokenizer(), "t").prefix == []


@pytest.mark.parametrize("single", ["</s> $A", "<s> $A", "$A </s>", "[CLS] $A [SEP]", "$A"])
def test_the_fingerprint_is_the_one_that_data_on_disk_has(single: str) -> None:
    fast = surrounded(single, eos="</s>")
    around = [i for i in fast("")["input_ids"] if i != 1]
    known = f"{fast.backend_tokenizer.to_str()}{around}1False"
    assert Tokenizer(fast, "t").fingerprint == hashlib.sha256(known.encode()).hexdigest()


CODE = """
from transformers import PreTrainedTokenizerFast
class Own(PreTrainedTokenizerFast):
    trusted = True
"""


def own_code(folder: Path) -> Path:
    word_level().save_pretrained(folder)
    (folder / "own.py").write_text(CODE)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    path.write_text(json.dumps(config))
    return folder


def test_a_tokenizer_s_own_code_runs_only_if_it_is_trusted_and_nobody_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(own_code(tmp_path / "own"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a prompt"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(
        DataError, match=r"has code of its own.*set data\.trust_remote_code: true, or .*\(ted-ds evaluate: --"
    ):
        load_tokenizer(folder)
    tokenizer = load_tokenizer(folder, trust_remote_code=True)
    assert tokenizer.encode_batch(["one two"]) == [[3, 4]] and tokenizer.trust_remote_code
    assert type(tokenizer._tokenizer).trusted


def test_vocab_size_counts_added_tokens_and_decoding_shows_special_ones() -> None:
    tokenizer = Tokenizer(word_level(added=("<a>", "<b>")), "t")
    assert (tokenizer.vocab_size, tokenizer.text_vocab_size, tokenizer.spelled(7)) == (8, 6, "7 ('<b>')")
    assert tokenizer.decode([3, 7, 0]).replace(" ", "") == "one<b><eos>"


@pytest.mark.parametrize(
    ("make", "same"),
    [
        (lambda: word_level(), True),
        (lambda: word_level(added=("<pad>", "<chat>")), True),
        (lambda: word_level(words="one two three four"), False),
        (lambda: word_level(words="one three two"), False),
        (lambda: word_level(words="one two"), False),
        (lambda: word_level(words="one two threes"), False),
    ],
)
def test_agreement(make: Callable[[], PreTrainedTokenizerFast], same: bool) -> None:
    one, two = Tokenizer(word_level(), "one"), Tokenizer(make(), "two")
    assert one.agrees_with(two) is two.agrees_with(one) is same


def test_the_same_added_token_with_another_id_disagrees() -> None:
    one, two = (Tokenizer(word_level(added=added), "t") for added in (("<a>", "<b>"), ("<b>", "<a>")))
    assert not one.agrees_with(two)


def test_the_fingerprint_follows_the_vocabulary_and_stays_after_saving(trained: Path, tmp_path: Path) -> None:
    make_project(tmp_path)
    others = [word_level(), word_level(words="one two four"), word_level(added=("<a>",)), word_level(eos="<unk>")]
    tokenizers = [Tokenizer(other, "t") for other in others]
    tokenizers += [load_tokenizer(str(path)) for path in (trained, tmp_path / "tokenizer")]
    assert len({tokenizer.fingerprint for tokenizer in tokenizers}) == len(tokenizers)
    for i, tokenizer in enumerate(tokenizers):
        tokenizer.encode_batch(["one two", "three"])
        tokenizer.save(tmp_path / f"saved{i}")
        again = load_tokenizer(str(tmp_path / f"saved{i}"))
        assert again.fingerprint == tokenizer.fingerprint
        assert again.encode_batch(awkward()) == tokenizer.encode_batch(awkward())
    assert load_tokenizer(str(trained / "tokenizer.model")).fingerprint == tokenizers[4].fingerprint


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "x.model"])
def test_a_pointer_of_git_lfs_is_no_tokenizer(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(DataError, match=rf"^{path} is a pointer of git LFS, not the file itself: run `git lfs pull`"):
        load_tokenizer(str(path if name == "x.model" else tmp_path))


def test_what_is_raised_without_a_word_is_named() -> None:
    assert load_failure(NotImplementedError()) == "NotImplementedError"
    assert load_failure(ValueError("\none\ntwo")) == "one"


def test_errors_name_the_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(DataError, match="tokenizer named has no end-of-document token: set eos_token"):
        _ = Tokenizer(word_level(eos=None), "named").eos_id
    with pytest.raises(DataError, match=rf"{tmp_path} holds no tokenizer \(tokenizer\.json, "):
        load_tokenizer(str(tmp_path))
    for data in (b"no model", b""):
        (tmp_path / "x.model").write_bytes(data)
        with pytest.raises(DataError, match=r"x\.model is no SentencePiece model: ."):
            load_tokenizer(str(tmp_path / "x.model"))
    (own_code(tmp_path / "own") / "own.py").write_text(
        f"{CODE}\n    def __init__(self, **_): raise NotImplementedError"
    )
    with pytest.raises(DataError, match=r"own' cannot be loaded: NotImplementedError$"):
        load_tokenizer(str(tmp_path / "own"), trust_remote_code=True)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=rf"tokenizer '{tmp_path}' cannot be loaded: ."):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("texts", [["too little"], ["\n \n"], []])
def test_a_corpus_too_small_for_the_vocabulary(tmp_path: Path, texts: list[str]) -> None:
    with pytest.raises(DataError, match=r"^no tokenizer of 900 pieces from this corpus: ."):
        train_sentencepiece(texts, 900, tmp_path / "tokenizer")
    assert not (tmp_path / "tokenizer").exists()


GREEK = "\u03bf \u03c0\u03bf\u03c4\u03b1\u03bc\u03cc\u03c2 \u03ba\u03b1\u03b9 "


@pytest.mark.parametrize("long", [GREEK * 400, GREEK.replace(" ", "") * 500])
def test_no_line_is_too_long_to_be_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, long: str
) -> None:
    monkeypatch.setattr(module, "LINE_BYTES", 2000)
    train_sentencepiece(["the river\n" * 50, f"short\n{long}\n", long], 310, tmp_path / "tokenizer")
    assert "lines of more than 2000 bytes, which were cut: 2" in caplog.text
    pieces = load_tokenizer(str(tmp_path / "tokenizer"))._vocabulary
    assert any("\u03c0\u03bf\u03c4\u03b1" in piece for piece in pieces)


def test_cut_lines_hold_the_whole_line_and_words_are_kept_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINE_BYTES", 80)
    words = [f"word{i}" for i in range(100)]
    lines = list(module._TrainingLines([" ".join(words), "x" * 333, "\u03bf" * 41, "short"]))
    assert max(len(line.encode()) for line in lines) <= 80
    first = [line for line in lines if "word" in line]
    assert "".join(first) == " ".join(words) and " ".join(first).split() == words
    assert [line for line in lines if "word" not in line] == ["x" * 20] * 16 + ["x" * 13] + ["\u03bf" * 20] * 2 + [
        "\u03bf",
        "short",
    ]


def test_a_line_with_sentencepiece_s_own_character_is_trained_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train_sentencepiece(["the river\n" * 50, f"{GREEK}\u2585{GREEK}\n" * 50], 310, tmp_path / "tokenizer")
    assert "lines with U+2585, which sentencepiece keeps for itself, and which were cut there: 50" in caplog.text
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    assert any("\u03c0" in piece for piece in tokenizer._vocabulary)
    text = f"{GREEK}\u2585\u2585 x"
    assert tokenizer.decode(tokenizer.encode_batch([text])[0]) == text


def test_sampling_of_lines_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    text = "the river and the stone\n"
    train_sentencepiece([text * 150], 290, tmp_path / "whole")
    assert not [record for record in caplog.records if record.name == "ted_ds"]
    monkeypatch.setattr(module, "TRAINING_LINES", 120)
    train_sentencepiece([text * 150], 290, tmp_path / "some")
    assert "120 of 150 lines, drawn at random, were seen" in caplog.text


@pytest.mark.parametrize(
    ("texts", "reason"),
    [([], "it has no text"), (["\u2585\n"], "it has no text"), (["ab"], "Vocabulary size too high")],
)
def test_why_there_is_no_tokenizer_is_said_plainly(tmp_path: Path, texts: list[str], reason: str) -> None:
    with pytest.raises(DataError, match=f"^no tokenizer of 900 pieces from this corpus: {reason}"):
        train_sentencepiece(texts, 900, tmp_path / "tokenizer")


def test_packing_without_an_end_of_document_fails_before_it_begins(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two")
    with pytest.raises(DataError, match="tokenizer named has no end-of-document token"):
        prepare([str(tmp_path / "a.txt")], Tokenizer(word_level(eos=None), "named"), 4, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_padding_is_the_tokenizer_s_own_or_the_end_of_document() -> None:
    padded = word_level(added=("<pad>",))
    padded.pad_token = "<pad>"
    assert [Tokenizer(fast, "t").pad_id for fast in (padded, word_level())] == [6, 0]
    with pytest.raises(DataError, match="tokenizer named has no end-of-document token: set eos_token"):
        _ = Tokenizer(word_level(eos=None), "named").pad_id


@pytest.fixture(scope="module")
def wordpiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wordpiece") / "tokenizer"
    train_wordpiece(iter(CORPUS), 500, folder)
    return folder


def test_a_trained_wordpiece_tokenizer_gives_what_bert_s_would_with_its_vocabulary(
    wordpiece: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(str(wordpiece))
    plain = AutoTokenizer.from_pretrained(wordpiece)
    numbers = plain.get_vocab()
    vocabulary = sorted(numbers, key=numbers.__getitem__)
    assert vocabulary[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert (len(vocabulary), tokenizer.vocab_size, tokenizer.pad_id) == (500, 500, 0)
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    bert = AutoTokenizer.from_pretrained(tmp_path)
    first, second = awkward(), awkward()[::-1]
    for texts in ((first,), (first, second)):
        ours = plain(*texts)
        assert dict(ours) == dict(bert(*texts)) and set(ours) == {"input_ids", "token_type_ids", "attention_mask"}
    assert "[UNK]" not in plain.tokenize(CORPUS[0])
    assert plain.decode(plain("The Test,\nThe").input_ids).startswith("[CLS] the test, the [SEP]")


def test_training_wordpiece_twice_gives_one_tokenizer(wordpiece: Path, tmp_path: Path) -> None:
    train_wordpiece(CORPUS, 500, tmp_path / "again")
    assert {path.name for path in wordpiece.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    for path in wordpiece.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    assert not (tmp_path / "again.tmp").exists()


@pytest.mark.parametrize("texts", [[], ["", " \n"]])
def test_no_text_trains_no_wordpiece_tokenizer(tmp_path: Path, texts: list[str]) -> None:
    with pytest.raises(DataError, match=r"^no tokenizer of 90 pieces from this corpus: it has no text"):
        train_wordpiece(texts, 90, tmp_path / "tokenizer")
    assert not (tmp_path / "tokenizer").exists()


def pairing() -> Tokenizer:
    """Single letters, ids from 3: a 3, b 4, and so on; "<c> A <s> B <s>" with <c> 1 and <s> 2."""
    vocabulary = {piece: i for i, piece in enumerate(["<p>", "<c>", "<s>", *"abcdefghijklmnopqrstuvwxyz"])}
    core = Core(models.WordLevel(vocabulary, unk_token="<p>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="<c> $A <s>", pair="<c> $A <s> $B:1 <s>:1", special_tokens=[("<c>", 1), ("<s>", 2)]
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=core, model_input_names=names, pad_token="<p>"), "t")


def letters(text: str) -> list[int]:
    return [3 + ord(letter) - ord("a") for letter in text]


def test_texts_get_their_special_tokens_and_the_longer_one_is_cut() -> None:
    tokenizer = pairing()
    found = tokenizer.encode_texts([("a b", "c"), ("a", "c d e f g"), ("", "c d e f g")], 7)
    assert found.ids == [[1, 3, 4, 2, 5, 2], [1, 3, 2, 5, 6, 7, 2], [1, 2, 5, 6, 7, 8, 2]]
    assert found.seconds == [4, 3, 2]
    assert tokenizer.lengths([("a b", "c"), ("a", "c d e f g")]) == [6, 9] and tokenizer.lengths([]) == []
    alone = tokenizer.encode_texts([("a b c",), ("a b c d e f g",)], 5)
    assert alone.ids == [[1, 3, 4, 5, 2], [1, 3, 4, 5, 2]]
    assert alone.seconds == [5, 5]


def test_saving_after_encoding_writes_no_truncation(tmp_path: Path) -> None:
    tokenizer = pairing()
    tokenizer.encode_texts([("a b c d e",)], 4)
    tokenizer.save(tmp_path)
    assert Core.from_file(str(tmp_path / "tokenizer.json")).encode("a b c d e").ids == [1, 3, 4, 5, 6, 7, 2]


def test_windows_of_a_context_share_stride_tokens_and_know_their_characters() -> None:
    # room for the context: 20 - 3 special - 2 of the question = 15; the second window begins 15 - 4 = 11 on, with l
    context = " ".join("abcdefghijklmnopqrstuvwxyz")
    windows = pairing().encode_windows([("  x y", context), ("z", "a  b")], 20, 4)
    assert windows.pairs == [0, 0, 1]
    assert windows.encodings.ids == [
        [1, *letters("xy"), 2, *letters("abcdefghijklmno"), 2],
        [1, *letters("xy"), 2, *letters("lmnopqrstuvwxyz"), 2],
        [1, *letters("z"), 2, *letters("ab"), 2],
    ]
    assert windows.encodings.seconds == [4, 4, 3]
    outside = [-1, -1]
    for window, first in ((0, 0), (1, 11)):
        spans = [[2 * i, 2 * i + 1] for i in range(first, first + 15)]
        assert windows.offsets[window].tolist() == [*[outside] * 4, *spans, outside]
    assert windows.offsets[2].tolist() == [*[outside] * 3, [0, 1], [3, 4], outside]


def test_a_long_question_is_cut_to_half_a_window() -> None:
    (ids,) = pairing().encode_windows([("a b c d e f g h i j k l", "x")], 20, 4).encodings.ids
    assert ids == [1, *letters("abcdefghij"), 2, *letters("x"), 2]


def test_windows_need_room_and_offsets() -> None:
    with pytest.raises(DataError, match=r"data\.doc_stride \(6\) must be less than 6 at data\.sequence_length 20"):
        pairing().encode_windows([("a", "b")], 20, 6)
    slow = Tokenizer(ByT5Tokenizer(), "slow")
    with pytest.raises(DataError, match="tokenizer slow knows no offsets: question answering needs a fast tokenizer"):
        slow.encode_windows([("a", "b")], 40, 4)
    assert slow.encode_texts([("a", "b")], 9).ids == [[100, 1, 101, 1]]


def test_spaces_before_a_question_are_dropped(trained: Path) -> None:
    tokenizer = load_tokenizer(str(trained))
    spaced, bare = (tokenizer.encode_windows([(question, " red")], 40, 4).encodings for question in ("  \n def", "def"))
    assert spaced == bare
    assert tokenizer.decode(bare.ids[0]) == "def red"
