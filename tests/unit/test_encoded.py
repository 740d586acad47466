from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from ted_ds.config.data_section import HubDataset
from ted_ds.config.tasks import TASKS, TaskSpec
from ted_ds.data import encoding as module
from ted_ds.data.encoded import ROWS, EncodedRows
from ted_ds.data.encoding import ensure_encoded
from ted_ds.data.manifests import MANIFEST
from ted_ds.data.squad import iter_questions
from ted_ds.data.tokenizer_training import train_wordpiece
from ted_ds.data.tokenizers import Tokenizer, load_tokenizer
from ted_ds.errors import DataError

WORDS = [f"{a}{b}" for a in ("red", "blue", "dark", "light") for b in ("fish", "bird", "stone", "")]
PAIRS = TASKS["classification"].with_columns(("a", "b"), None, ("0", "1"))
SINGLE = TASKS["regression"].with_columns(("a",), None, None)
SQUAD = TASKS["squad_v2"]
LONG = " ".join(f"{WORDS[i % 16]}, {WORDS[i * 7 % 16]}" for i in range(60))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """folder/tokenizer and folder/other."""
    folder = tmp_path_factory.mktemp("encoded")
    train_wordpiece(WORDS * 3, 60, folder / "tokenizer")
    train_wordpiece(WORDS * 3, 70, folder / "other")
    return folder


@pytest.fixture
def tokenizer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
    monkeypatch.setattr(module, "GROUP", 8)  # several groups of little data
    return load_tokenizer(str(folder / "tokenizer"))


def rows_file(path: Path, rows: list[tuple[Any, ...]]) -> str:
    path.write_text("".join(json.dumps(dict(zip(("a", "b", "label"), row, strict=True))) + "\n" for row in rows))
    return str(path)


LABELLED = [(" ".join(WORDS[: i % 9]), " ".join(WORDS[: i % 5]), i % 2) for i in range(21)]


def encode(
    entry: str, spec: TaskSpec, tokenizer: Tokenizer, folder: Path, length: int = 40, *, training: bool = True
) -> EncodedRows:
    return ensure_encoded([entry], spec, tokenizer, folder, max_length=length, stride=4, training=training)


@pytest.mark.parametrize("length", [40, 12])
def test_batches_are_what_transformers_pads(tmp_path: Path, folder: Path, tokenizer: Tokenizer, length: int) -> None:
    entry = rows_file(tmp_path / "a.jsonl", LABELLED)
    rows = encode(entry, PAIRS, tokenizer, tmp_path / "data", length)
    plain = AutoTokenizer.from_pretrained(folder / "tokenizer")
    first, second = ([row[i] for row in LABELLED] for i in (0, 1))
    whole = plain(first, second, truncation=True, max_length=length, padding="max_length", return_tensors="pt")
    assert rows.lengths.dtype == np.int32 and rows.lengths.tolist() == whole.attention_mask.sum(1).tolist()
    assert rows.targets.tolist() == [row[2] for row in LABELLED]
    for wanted in (np.array([20, 3, 3, 7, 8, 0]), np.arange(len(rows))):
        batch = rows.batch(wanted, length)
        expected = {name: whole[name][wanted] for name in ("input_ids", "attention_mask", "token_type_ids")}
        for name, tensor in expected.items():
            assert getattr(batch, name).dtype == torch.int64 and torch.equal(getattr(batch, name), tensor), name
        assert batch.targets.dtype == torch.int64 and batch.targets.tolist() == [wanted_ % 2 for wanted_ in wanted]
        assert batch.ends is None and batch.rows is None
    cut = sum(len(ids) > length for ids in plain(first, second).input_ids)
    assert (cut > 0) is (length == 12) and rows.manifest.cut == cut
    assert rows.manifest.rows == rows.manifest.examples == len(rows) == 21


def test_rows_are_padded_as_far_as_asked(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = encode(rows_file(tmp_path / "a.jsonl", LABELLED), PAIRS, tokenizer, tmp_path / "data")
    shortest = int(rows.lengths.argmin())
    assert rows.lengths[shortest] == 3
    batch = rows.batch(np.array([shortest]), 8)
    assert batch.attention_mask is not None and batch.attention_mask.tolist() == [[1] * 3 + [0] * 5]
    assert batch.input_ids[0, 3:].tolist() == [tokenizer.pad_id] * 5


def test_values_of_a_regression_are_float32(tmp_path: Path, tokenizer: Tokenizer) -> None:
    entry = rows_file(tmp_path / "a.jsonl", [("red", "", 0.1), ("blue", "", "-3")])
    rows = encode(entry, SINGLE, tokenizer, tmp_path / "data")
    batch = rows.batch(np.array([1, 0]), 8)
    assert batch.targets.dtype == torch.float32
    assert torch.equal(batch.targets, torch.tensor([-3.0, 0.1]))
    assert batch.token_type_ids is not None and not batch.token_type_ids.any()


def test_rows_fill_up_to_the_longest_allowed_without_being_cut(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    entry = rows_file(tmp_path / "a.jsonl", [("redfish " * n, "", 1) for n in (1, 2, 3)])
    one = int(encode(entry, SINGLE, tokenizer, tmp_path / "one").lengths[1])
    with caplog.at_level(logging.INFO, "ted_ds"):
        rows = encode(entry, SINGLE, tokenizer, tmp_path / "data", one)
    assert rows.lengths.tolist()[1:] == [one, one] and rows.manifest.cut == 1
    assert [record.getMessage() for record in caplog.records] == [f"data: 1 of 3 rows were cut at {one} tokens"]


@pytest.mark.parametrize("training", [True, False])
def test_a_row_without_a_label_is_an_error(tmp_path: Path, tokenizer: Tokenizer, training: bool) -> None:
    entry = rows_file(tmp_path / "a.jsonl", [("red", "", 1), ("red", "", -1)])
    with pytest.raises(
        DataError, match=r"^.*a\.jsonl, line 2 has no label: training and scoring need one in every row"
    ):
        encode(entry, PAIRS, tokenizer, tmp_path / "data", training=training)
    assert not (tmp_path / "data").exists()


def squad_file(path: Path, *rows: tuple[str, str, str, list[tuple[str, int]]]) -> str:
    lines = (
        {
            "id": name,
            "question": q,
            "context": c,
            "answers": {"text": [t for t, _ in a], "answer_start": [s for _, s in a]},
        }
        for name, q, c, a in rows
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def every_answer(context: str) -> list[tuple[str, int]]:
    """Each word of the context, and each two words with what stands between."""
    words = [(match.group(), match.start()) for match in re.finditer(r"\w+", context)]
    pairs = [(context[s : t + len(w)], s) for (_, s), (w, t) in pairwise(words)]
    return words + pairs


def test_gold_answers_are_the_same_characters_in_every_window(tmp_path: Path, tokenizer: Tokenizer) -> None:
    answers = every_answer(LONG)
    asked = [(str(i), " red bird", LONG, [answer, ("red", 0)]) for i, answer in enumerate(answers)]
    asked[5] = ("none", "red", LONG, [])
    entry = squad_file(tmp_path / "a.jsonl", *asked)
    rows = encode(entry, SQUAD, tokenizer, tmp_path / "data", training=False)
    questions = rows.questions
    assert questions == list(iter_questions([entry], impossible=True)) and len(questions) == len(asked)
    found: dict[int, int] = dict.fromkeys(range(len(asked)), 0)
    for i in range(len(rows)):
        number, offsets = rows.window(i)
        assert offsets.dtype == np.int32 and offsets.shape == (rows.lengths[i], 2)
        batch = rows.batch(np.array([i]), 40)
        assert batch.ends is not None and batch.token_type_ids is not None
        start, end = int(batch.targets[0]), int(batch.ends[0])
        context = np.flatnonzero(offsets[:, 0] >= 0)
        # the second text, without its [SEP]
        types = batch.token_type_ids[0].numpy()
        assert context.tolist() == np.flatnonzero(types)[:-1].tolist()
        text, first = questions[number].answers[0] if questions[number].answers else ("", -1)
        inside = first >= 0 and offsets[context[0], 0] <= first and first + len(text) <= offsets[context[-1], 1]
        if inside:
            assert LONG[offsets[start, 0] : offsets[end, 1]] == text and offsets[start, 0] == first
            found[number] += 1
        else:
            assert (start, end) == (0, 0)
    assert found[5] == 0 and all(count >= 1 for number, count in found.items() if number != 5)
    assert max(found.values()) == 2  # windows overlap
    assert rows.manifest.examples == len(asked) < rows.manifest.rows == len(rows)


def test_windows_cover_the_context_and_share_stride_tokens(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = encode(
        squad_file(tmp_path / "a.jsonl", ("q", "red", LONG, [])), SQUAD, tokenizer, tmp_path / "d", training=False
    )
    windows = [rows.window(i)[1] for i in range(len(rows))]
    inside = [[tuple(span) for span in offsets.tolist() if span[0] >= 0] for offsets in windows]
    for before, after in pairwise(inside):
        assert before[-4:] == after[:4]
    joined = inside[0] + [span for window in inside[1:] for span in window[4:]]
    assert "".join(LONG[a:b] for a, b in joined) == LONG.replace(" ", "")


def test_training_counts_answers_that_are_whole_in_no_window(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    far = LONG.index("lightstone")
    asked = [
        ("a", "red", LONG, [(LONG[:200], 0)]),
        ("b", "red", LONG, [(LONG[far : far + 10], far)]),
        ("c", "?", LONG, []),
    ]
    entry = squad_file(tmp_path / "a.jsonl", *asked)
    with caplog.at_level(logging.INFO, "ted_ds"):
        rows = encode(entry, SQUAD, tokenizer, tmp_path / "data")
    assert rows.manifest.cut == 1 and rows.manifest.examples == 3
    assert [r.getMessage() for r in caplog.records] == ["data: 1 of 3 answers are whole in no window at 40 tokens"]
    assert (rows.targets > 0).sum() >= 1


def test_an_answer_within_a_token_or_of_many_tokens_a_character() -> None:
    def question(*answer: Any) -> Any:
        return module.Question("q", "", "", (answer,), False, "")

    outside = [-1, -1]
    # question, "ab" with a space before it as byte-level tokenizers have it, two tokens of one character, "cd"
    offsets = np.array([outside, outside, [0, 3], [3, 4], [3, 4], [4, 6], outside], dtype=np.int32)
    for text, start, span in [
        ("ab", 1, (2, 2)),
        ("b", 2, (2, 2)),
        ("\u00e9", 3, (3, 4)),
        ("b\u00e9", 2, (2, 4)),
        ("\u00e9c", 3, (3, 5)),
        ("d", 5, (5, 5)),
        ("de", 5, (0, 0)),
    ]:
        assert module._answer_tokens(question(text, start), offsets) == span, text


def test_ids_of_questions_to_score_must_differ(tmp_path: Path, tokenizer: Tokenizer) -> None:
    entry = squad_file(tmp_path / "a.jsonl", *[(str(i % 9), f"red {i}", "blue", []) for i in range(11)])
    with pytest.raises(
        DataError,
        match=rf"^2 rows cannot be used: question 0 in {entry}, line 10: its id was there before; question 1 in "
        rf"{entry}, line 11: its id was there before: fix or drop such rows, or give every question its own, or set",
    ):
        encode(entry, SQUAD, tokenizer, tmp_path / "data", training=False)
    assert encode(entry, SQUAD, tokenizer, tmp_path / "data").manifest.examples == 11


def test_a_question_that_stands_twice_is_scored_once(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    entry = squad_file(tmp_path / "a.jsonl", *[(str(i % 9), f"red {i % 9}", "blue", []) for i in range(11)])
    with caplog.at_level(logging.WARNING, "ted_ds"):
        rows = encode(entry, SQUAD, tokenizer, tmp_path / "data", training=False)
    assert rows.manifest.examples == len(rows.questions) == 9 and rows.manifest.left_out == 0
    assert [record.getMessage() for record in caplog.records] == [
        "of questions that stand in the held-out data more than once, 2 are left out"
    ]


@pytest.mark.parametrize("training", [True, False])
def test_bad_rows_are_left_out_if_asked(tmp_path: Path, tokenizer: Tokenizer, training: bool) -> None:
    """Of whole groups of them, of one that is found before it is tokenized, and of those that are found after."""
    labels = [*[-1] * 17, 1, "0", "fair", 0]
    entry = rows_file(tmp_path / "a.jsonl", [("red", "", label) for label in labels])

    def made(folder: str, skip: bool | None) -> EncodedRows:
        options = {"max_length": 40, "stride": 4, "training": training, "skip_bad_rows": skip}
        return ensure_encoded([entry], PAIRS, tokenizer, tmp_path / folder, **options)

    rows = made("data", True)
    assert rows.targets.tolist() == [1, 0, 0]
    assert (rows.manifest.examples, rows.manifest.left_out) == (3, 18)
    assert made("data", True).manifest == rows.manifest
    with pytest.raises(DataError, match=r"data was prepared without 18 bad rows, which data\.skip_bad_rows: false ref"):
        made("data", False)
    for skip in (False, None):
        with pytest.raises(DataError, match=r"^18 rows cannot be used: .* line 1 has no label: .* and 15 more: fix or"):
            made("other", skip)
    entry = rows_file(tmp_path / "b.jsonl", [("red", "", "fair"), ("red", "", "")])
    with pytest.raises(DataError, match=r"^no row is left: 2 rows cannot be used: .*b\.jsonl, line 1: the label is"):
        made("third", True)
    assert not (tmp_path / "other").exists() and not (tmp_path / "third").exists()


def test_a_folder_without_bad_rows_serves_both_settings_and_an_older_one_says_nothing_of_them(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    entry = rows_file(tmp_path / "a.jsonl", LABELLED)
    first = encode(entry, PAIRS, tokenizer, tmp_path / "data")
    path = tmp_path / "data" / MANIFEST
    values = json.loads(path.read_text())
    del values["left_out"]
    path.write_text(json.dumps(values))
    for skip in (True, False):
        again = ensure_encoded(
            [entry], PAIRS, tokenizer, tmp_path / "data", max_length=40, stride=4, training=True, skip_bad_rows=skip
        )
        assert again.manifest == first.manifest


def test_bad_questions_are_left_out_if_asked(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [(str(i), "red", "blue fish", [("fish", 5 - 4 * (i % 2))]) for i in range(9)]
    entry = squad_file(tmp_path / "a.jsonl", *rows)
    found = ensure_encoded(
        [entry], SQUAD, tokenizer, tmp_path / "data", max_length=40, stride=4, training=False, skip_bad_rows=True
    )
    assert [question.id for question in found.questions] == list("02468") and found.manifest.left_out == 4
    assert [found.window(row)[0] for row in range(len(found))] == list(range(5))


Change = Callable[[Path, dict[str, Any]], Any]
CHANGES: list[tuple[str, Change]] = [
    ("task", lambda folder, made: made.update(spec=replace(PAIRS, name="rte"))),
    ("columns", lambda folder, made: made.update(spec=replace(PAIRS, text_columns=("b", "a")))),
    ("data.labels", lambda folder, made: made.update(spec=replace(PAIRS, labels=("1", "0")))),
    ("tokenizer", lambda folder, made: made.update(tokenizer=load_tokenizer(str(folder / "other")))),
    ("data.sequence_length", lambda folder, made: made.update(max_length=41)),
    ("data entries", lambda folder, made: made["entries"].append(HubDataset(hub="a/b"))),
    ("data entries", lambda folder, made: made["entries"].append("none.csv")),
    ("use (training: true or false)", lambda folder, made: made.update(training=False)),
]


def test_what_was_encoded_is_read_again_unless_it_was_made_otherwise(
    tmp_path: Path, folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = rows_file(tmp_path / "a.jsonl", LABELLED)
    asked: dict[str, Any] = {
        "spec": PAIRS,
        "tokenizer": tokenizer,
        "folder": tmp_path / "data",
        "max_length": 40,
        "training": True,
    }
    first = ensure_encoded([entry], stride=4, **asked)
    monkeypatch.setattr(module, "_write", None)
    again = ensure_encoded([entry], stride=5, **asked)  # texts have no windows
    assert again.manifest == first.manifest
    assert torch.equal(again.batch(np.arange(21), 40).input_ids, first.batch(np.arange(21), 40).input_ids)
    said = (
        rf"^{tmp_path / 'data'} was prepared with other {{}}: .*: delete that folder to prepare it anew, or set data\."
    )
    for what, change in CHANGES:
        other = {**asked, "entries": [entry]}
        change(folder, other)
        with pytest.raises(DataError, match=said.format(re.escape(what))):
            ensure_encoded(stride=4, **other)
    rows_file(tmp_path / "a.jsonl", LABELLED[1:])
    with pytest.raises(DataError, match=said.format("sizes of data files")):
        ensure_encoded([entry], stride=4, **asked)


def test_windows_made_with_another_stride_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    entry = squad_file(tmp_path / "a.jsonl", ("q", "red", LONG, []))
    encode(entry, SQUAD, tokenizer, tmp_path / "data")
    with pytest.raises(DataError, match=r"was prepared with other data\.doc_stride: 4, now 5: delete"):
        ensure_encoded([entry], SQUAD, tokenizer, tmp_path / "data", max_length=40, stride=5, training=True)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (ROWS, lambda data: data[:-40], "holds no whole prepared data"),
        (ROWS, lambda data: b"", "holds no whole prepared data"),
        (MANIFEST, lambda data: data[:-40], "holds no whole prepared data"),
        (MANIFEST, lambda data: b"{}", "holds no whole prepared data"),
        (MANIFEST, lambda data: data.replace(b'"rows": 21', b'"rows": 20'), r"rows\.arrow and manifest\.json differ"),
    ],
)
def test_a_folder_that_is_not_whole(
    tmp_path: Path, tokenizer: Tokenizer, name: str, change: Callable[[bytes], bytes], message: str
) -> None:
    encode(rows_file(tmp_path / "a.jsonl", LABELLED), PAIRS, tokenizer, tmp_path / "data")
    file = tmp_path / "data" / name
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(DataError, match=rf"^{tmp_path / 'data'}:? {message}.*: delete .* to prepare it anew"):
        EncodedRows(tmp_path / "data")


def test_an_interrupted_encoding_leaves_no_folder_and_the_next_one_succeeds(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = rows_file(tmp_path / "a.jsonl", LABELLED)

    def interrupted(*args: Any) -> Any:
        for i, example in enumerate(real(*args)):
            yield example
            if i == 10:
                raise KeyboardInterrupt

    real = module.iter_examples
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "iter_examples", interrupted)
        encode(entry, PAIRS, tokenizer, tmp_path / "data")
    assert not (tmp_path / "data").exists()
    assert len(encode(entry, PAIRS, tokenizer, tmp_path / "data")) == 21
    assert not (tmp_path / "data.tmp").exists()
