"""Perplexity of documents, each by itself, against transformers and one document at a time in float64."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Core
from tokenizers import models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ted_ds.batch import IGNORED
from ted_ds.data import documents as module
from ted_ds.data import sources
from ted_ds.data.documents import Document, iter_documents, window_batches
from ted_ds.data.loader import EvaluationRows
from ted_ds.data.prepare import prepare
from ted_ds.data.tokenizers import Tokenizer
from ted_ds.distill.distillation_model import DistillationModel
from ted_ds.errors import DataError
from ted_ds.evaluation.perplexity import document_perplexity, held_out_perplexity
from ted_ds.tasks.causal_lm import CausalLM
from tests.project import loss_config
from tests.tiny_models import tiny_model

VOCAB, IDS = 60, 29
"""Rows of a padded LM head, and ids of the tokenizer: only those take part in a softmax."""
TEXTS = ["a b c", "d", " e  f\n", "a " * 9 + "b", "", "zz \u00e9\u00e8", *(f"{chr(97 + i)} c d" for i in range(20))]


def letters(single: str, *, eos: str | None = "</s>") -> Tokenizer:
    """A token a letter; `single` says what stands around a text."""
    special = {"<s>": 0, "</s>": 1}
    pieces = {chr(97 + i): i + 3 for i in range(26)}
    core = Core(models.WordLevel({**special, "<unk>": 2, **pieces}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(pattern="", behavior="isolated")]
    )
    core.post_processor = processors.TemplateProcessing(single=single, special_tokens=list(special.items()))
    ends = {} if eos is None else {"eos_token": eos}
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", **ends), "t")


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(path)


def score(model: Any, tokenizer: Tokenizer, entry: str, length: int = 128, batch_size: int = 3) -> dict[str, Any]:
    documents = iter_documents([entry], tokenizer)
    cpu = torch.device("cpu")
    return document_perplexity(model, tokenizer, documents, length=length, batch_size=batch_size, device=cpu)


def one_by_one(model: Any, streams: list[list[int]], length: int) -> list[list[float]]:
    """-log p of each stream's tokens behind the first, in windows of `length` inputs, by the model itself."""
    found = []
    with torch.no_grad():
        for stream in streams:
            nll: list[float] = []
            for start in range(0, len(stream) - 1, length):
                log_p = (
                    model(torch.tensor([stream[start : start + length]])).logits[0, :, :IDS].double().log_softmax(-1)
                )
                wanted = stream[start + 1 : start + length + 1]
                nll += (-log_p[range(len(wanted)), wanted]).tolist()
            found.append(nll)
    return found


@pytest.mark.parametrize("length", [128, 5])
@pytest.mark.parametrize(
    ("single", "begin", "shown", "family"),
    [("<s> $A", [0], "<s>", "llama"), ("</s> $A", [1], "</s>", "opt"), ("$A", [1], "</s>", "gpt2")],
)
def test_each_document_is_scored_by_itself(
    data: str, single: str, begin: list[int], shown: str, family: str, length: int
) -> None:
    """Its own tokens and its end, after what the tokenizer begins with, else the token that packed rows have there."""
    model, tokenizer = tiny_model(family, vocab=VOCAB).double().eval(), letters(single)
    texts = [text for text in TEXTS if text]
    own = tokenizer._tokenizer(texts, add_special_tokens=False)["input_ids"]
    nll = one_by_one(model, [[*begin, *ids, 1] for ids in own], length)
    count, words = sum(map(len, nll)), sum(len(re.split(r"\s+", text)) for text in texts)
    size = sum(len(text.encode("utf-8")) for text in texts)
    found = score(model, tokenizer, data, length)
    total, text_total = sum(map(sum, nll)), sum(sum(part[:-1]) for part in nll)
    assert found == {
        "documents_begin_with": shown,
        "documents": len(texts),
        "tokens": count,
        "words": words,
        "bytes": size,
        "loss": pytest.approx(total / count, rel=1e-6),
        "perplexity": pytest.approx(math.exp(total / count), rel=1e-6),
        "word_perplexity": pytest.approx(math.exp(text_total / words), rel=1e-6),
        "byte_perplexity": pytest.approx(math.exp(text_total / size), rel=1e-6),
        "bits_per_byte": pytest.approx(text_total / size / math.log(2), rel=1e-6),
    }
    assert score(model, tokenizer, data, length, batch_size=50)["loss"] == pytest.approx(found["loss"], rel=1e-9)


def test_one_document_without_a_beginning_begins_the_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text file, read and tokenized in pieces: its first token follows nothing, and is not predicted."""
    monkeypatch.setattr(sources, "PIECE_CHARACTERS", 10)
    text = "a b c d e f\n" * 7 + "\n  x\n\n y z \n"
    (tmp_path / "a.txt").write_text(text)
    model, tokenizer = tiny_model("gpt2", vocab=IDS).double().eval(), letters("$A")
    (ids,) = tokenizer.encode_batch([text])
    (nll,) = one_by_one(model, [[*ids, 1]], 12)
    found = score(model, tokenizer, str(tmp_path / "a.txt"), 12)
    assert found["loss"] == pytest.approx(sum(nll) / len(ids), rel=1e-9)
    assert (found["documents_begin_with"], found["documents"], found["tokens"]) == (None, 1, len(ids))
    assert (found["words"], found["bytes"]) == (len(re.split(r"\s+", text)), len(text))


def test_a_tokenizer_without_an_end_scores_what_the_documents_hold(data: str) -> None:
    model, tokenizer = tiny_model("llama", vocab=IDS).double().eval(), letters("<s> $A </s>", eos=None)
    own = tokenizer._tokenizer([text for text in TEXTS if text], add_special_tokens=False)["input_ids"]
    nll = one_by_one(model, [[0, *ids] for ids in own], 128)
    found = score(model, tokenizer, data)
    assert found["loss"] == pytest.approx(sum(map(sum, nll)) / sum(map(len, own)), rel=1e-9)
    assert found["documents_begin_with"] == "<s>"


@pytest.mark.parametrize("begin", [[], [7], [7, 8]])
@pytest.mark.parametrize("length", [1, 4, 100])
def test_windows_predict_each_token_once_and_have_like_lengths(
    monkeypatch: pytest.MonkeyPatch, begin: list[int], length: int
) -> None:
    monkeypatch.setattr(module, "HELD_TOKENS", 60)
    sizes = [1, 9, 2, 30, 4, 4, 11, 1, 1, 3]
    documents = [Document(np.arange(100 * i, 100 * i + n, dtype=np.int32), 1, 1) for i, n in enumerate(sizes, 1)]
    predicted, ends = [], 0
    for batch in window_batches(iter(documents), begin, [9], length=length, batch_tokens=2 * length):
        assert batch.inputs.numel() <= 2 * length
        kept = batch.targets != IGNORED
        predicted += batch.targets[kept].tolist()
        ends += int(batch.ends.sum())
        assert (batch.targets[batch.ends] == 9).all()
    wanted = [i for document in documents for i in [*document.ids.tolist(), 9][not begin :]]
    assert sorted(predicted) == sorted(wanted) and ends == len(documents)


def test_an_id_without_a_row_is_refused_only_if_a_text_holds_it(tmp_path: Path) -> None:
    tokenizer = letters("<s> $A")
    tokenizer._tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer = Tokenizer(tokenizer._tokenizer, "t")
    model = tiny_model("llama", vocab=IDS).eval()
    assert tokenizer.vocab_size == 30
    (tmp_path / "good.jsonl").write_text('{"text": "a b"}\n{"text": "c"}\n')
    (tmp_path / "bad.jsonl").write_text('{"text": "a b"}\n{"text": "c <image>"}\n')
    assert score(model, tokenizer, str(tmp_path / "good.jsonl"))["documents"] == 2
    with pytest.raises(DataError, match=r"document 2 has the id 29 \('<image>'\), the model has 29 vocabulary rows"):
        score(model, tokenizer, str(tmp_path / "bad.jsonl"))


@pytest.mark.parametrize("texts", [["a", None, 3], [None, None]])
def test_bad_rows_are_all_counted_and_refused(tmp_path: Path, texts: list[Any]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with pytest.raises(
        DataError, match=r"^2 rows cannot be used: .*: fix or drop such rows, or set data\.text_column$"
    ):
        list(iter_documents([str(path)], letters("$A")))


@pytest.mark.parametrize(("single", "prefix"), [("<s> $A", [0]), ("</s> $A", [1]), ("$A", [])])
def test_a_run_s_own_score_leaves_out_the_beginnings_and_has_a_word_s_and_a_byte_s(
    data: str, tmp_path: Path, single: str, prefix: list[int]
) -> None:
    """Packed rows: documents see those before them; OPT's </s> stands once between two of them."""
    model, tokenizer = tiny_model("llama", vocab=IDS).double().eval(), letters(single)
    blocks = prepare([data], tokenizer, 8, tmp_path / "packed", drop_tail=False, processes=1)
    rows = EvaluationRows(blocks, batch_size=3, rank=0, world_size=1)
    engine = DistillationModel(
        model, torch.nn.ModuleList(), loss_config(kl_alpha=0.0, mse_alpha=0.0), task=CausalLM(IDS)
    )
    world: Any = SimpleNamespace(device=torch.device("cpu"), sum=lambda tensor: tensor)
    made = blocks.manifest
    found = held_out_perplexity(engine, rows, world, words=made.words, size=made.bytes)
    texts = [text for text in TEXTS if text]
    stream: list[int] = []
    kinds: list[str] = []
    for ids in tokenizer._tokenizer(texts, add_special_tokens=False)["input_ids"]:
        begin = [] if prefix == stream[-1:] else prefix
        stream += [*begin, *ids, 1]
        kinds += ["begin"] * len(begin) + ["own"] * len(ids) + ["end"]
    (nll,) = one_by_one(model, [stream], 8)
    kept = [value for value, kind in zip(nll, kinds[1:], strict=True) if kind != "begin"]
    own = sum(value for value, kind in zip(nll, kinds[1:], strict=True) if kind == "own")
    assert found == pytest.approx(
        {
            "validation_loss": sum(kept) / len(kept),
            "validation_perplexity": math.exp(sum(kept) / len(kept)),
            "validation_word_perplexity": math.exp(own / sum(len(re.split(r"\s+", text)) for text in texts)),
            "validation_byte_perplexity": math.exp(own / sum(len(text.encode()) for text in texts)),
            "validation_bits_per_byte": own / sum(len(text.encode()) for text in texts) / math.log(2),
        },
        rel=1e-6,
    )
    before = held_out_perplexity(engine, rows, world)
    assert before == {name: found[name] for name in ("validation_loss", "validation_perplexity")}
