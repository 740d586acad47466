from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tokenizers import Tokenizer as Core
from tokenizers import models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ted_ds.config.data_section import DataConfig, HubDataset
from ted_ds.config.tasks import TASKS
from ted_ds.data import packed as packed_module
from ted_ds.data import sources, tokenizing
from ted_ds.data.manifests import MANIFEST
from ted_ds.data.packed import BLOCKS, PackedBlocks
from ted_ds.data.prepare import prepare
from ted_ds.data.sources import Piece
from ted_ds.data.tokenizers import Tokenizer, load_tokenizer
from ted_ds.errors import DataError
from ted_ds.tasks.registry import ensure_tokenizer

LONG = "".join(f"w{i % 40} w{i % 7}{' ' * (i % 3)}\n" for i in range(90))
TORN = "holds no whole prepared data"
SHORT = ["w1 w2", "w3", " ", "w4\nw5 w6 " * 9, "unknown", *(f"w{i}" for i in range(40))]


def tokenizer_in(folder: Path, *, bos: bool = False, prefix: str = "") -> Tokenizer:
    """A tokenizer of words, so that a text cut at line ends keeps its ids. prefix: tokens that it begins texts with."""
    prefix = "<bos>" if bos else prefix
    words = ["<eos>", "<unk>", "<bos>", *(f"w{i}" for i in range(40))]
    core = Core(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if prefix:
        special = [(word, i) for i, word in enumerate(words[:3])]
        core.post_processor = processors.TemplateProcessing(single=f"{prefix} $A", special_tokens=special)
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>").save_pretrained(folder)
    return load_tokenizer(str(folder))


@pytest.fixture
def entries(tmp_path: Path) -> list[str]:
    (tmp_path / "long.txt").write_text(LONG)
    (tmp_path / "short.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in ["", *SHORT]))
    return [str(tmp_path / "lo*.txt"), str(tmp_path / "short.jsonl")]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return tokenizer_in(tmp_path / "tokenizer", bos=True)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many pieces, groups and record batches of little text."""
    monkeypatch.setattr(sources, "PIECE_CHARACTERS", 60)
    monkeypatch.setattr(tokenizing, "TASK_CHARACTERS", 150)
    monkeypatch.setattr(packed_module, "BATCH_TOKENS", 50)


def stream_of(tokenizer: Tokenizer) -> list[int]:
    """What the documents of `entries` become, by the shortest way."""
    return [i for document in tokenizer.encode_batch([LONG, *SHORT]) for i in [*document, tokenizer.eos_id]]


def packed(entries: list[str], tokenizer: Tokenizer, folder: Path, length: int = 7, **changes: Any) -> PackedBlocks:
    return prepare(entries, tokenizer, length, folder, text_column="body", **({"processes": 1} | changes))


@pytest.mark.parametrize("length", [1, 7, 64, "all", "all but one"])
@pytest.mark.parametrize("drop_tail", [True, False])
@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.usefixtures("small")
def test_rows_are_the_stream_of_documents_cut(
    tmp_path: Path, entries: list[str], bos: bool, drop_tail: bool, length: int | str
) -> None:
    tokenizer = tokenizer_in(tmp_path / "words", bos=bos)
    stream = stream_of(tokenizer)
    size = length if isinstance(length, int) else len(stream) - (length == "all but one")
    full, rest = divmod(len(stream), size)
    count = full + bool(rest and not drop_tail)
    padded = stream + [tokenizer.eos_id] * size
    blocks = packed(entries, tokenizer, tmp_path / "data", size, drop_tail=drop_tail)
    assert len(blocks) == count
    assert (rows := blocks.rows(np.arange(count))).dtype == np.int64
    assert rows.tolist() == [padded[i * size : (i + 1) * size] for i in range(count)]
    assert [blocks.row_length(i) for i in range(count)] == [size] * full + [rest] * (count - full)
    assert np.array_equal(PackedBlocks(tmp_path / "data").rows(np.arange(count)[::-1]), rows[::-1])
    with pa.memory_map(str(tmp_path / "data" / BLOCKS)) as file:
        assert pa.ipc.open_file(file).num_record_batches == -(-count // max(1, 50 // size))


@pytest.mark.usefixtures("small")
def test_the_manifest_says_what_was_packed(tmp_path: Path, entries: list[str], tokenizer: Tokenizer) -> None:
    stream = stream_of(tokenizer)
    padded = np.array(stream + [tokenizer.eos_id] * (-len(stream) % 8), dtype=np.int32)
    made = packed(entries, tokenizer, tmp_path / "data", 8, drop_tail=False).manifest
    assert made == PackedBlocks(tmp_path / "data").manifest
    assert json.loads((tmp_path / "data" / MANIFEST).read_text()) == {
        "tokenizer": str(tmp_path / "tokenizer"),
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "sequence_length": 8,
        "rows": -(-len(stream) // 8),
        "last_row_length": len(stream) % 8,
        "tokens": len(stream),
        "documents": 1 + len(SHORT),
        "text_column": "body",
        "entries": entries,
        "sources": {str(path): path.stat().st_size for path in (tmp_path / "long.txt", tmp_path / "short.jsonl")},
        "digest": hashlib.sha256(padded.tobytes()).hexdigest(),
        "prefix": [2],
        "largest_id": 42,
        "left_out": 0,
        "words": sum(len(re.split(r"\s+", text)) for text in (LONG, *SHORT)),
        "bytes": sum(len(text.encode()) for text in (LONG, *SHORT)),
    }


@pytest.mark.parametrize("length", [1, 7, 8, 64])
@pytest.mark.parametrize("prefix", ["<bos>", "<bos> <unk>"])
@pytest.mark.usefixtures("small")
def test_the_rows_know_by_place_what_the_tokenizer_put_there(
    tmp_path: Path, entries: list[str], prefix: str, length: int
) -> None:
    """Also when a document spells it out, and when it is cut by the end of a row."""
    tokenizer = tokenizer_in(tmp_path / "words", prefix=prefix)
    (tmp_path / "spelled.txt").write_text("w1 <bos> w2 <bos> <unk> w3")
    texts = [LONG, *SHORT, "w1 <bos> w2 <bos> <unk> w3"]
    size = len(tokenizer.prefix)
    marks = [i < size for ids in tokenizer.encode_batch(texts) for i in range(len(ids) + 1)]
    blocks = packed([*entries, str(tmp_path / "spelled.txt")], tokenizer, tmp_path / "data", length, drop_tail=False)
    found = blocks.inserted(np.arange(len(blocks)))
    assert found is not None and found.dtype == bool and found.shape == (len(blocks), length)
    assert found.reshape(-1).tolist() == marks + [False] * (found.size - len(marks))
    closing = [i == len(ids) for ids in tokenizer.encode_batch(texts) for i in range(len(ids) + 1)]
    ends = blocks.ends(np.arange(len(blocks)))
    assert ends is not None and ends.reshape(-1).tolist() == closing + [False] * (ends.size - len(closing))
    again = PackedBlocks(tmp_path / "data").inserted(np.array([3, 0]))
    assert again is not None and np.array_equal(again, found[[3, 0]])


@pytest.mark.usefixtures("small")
def test_one_token_stands_between_documents_where_the_end_is_the_beginning_too(
    tmp_path: Path, entries: list[str]
) -> None:
    tokenizer, plain = (tokenizer_in(tmp_path / (p or "none"), prefix=p) for p in ("<eos>", ""))
    assert (tokenizer.prefix, plain.prefix) == ([0], [])
    blocks = packed(entries, tokenizer, tmp_path / "data", 8, drop_tail=False)
    stream = blocks.rows(np.arange(len(blocks))).reshape(-1)[: blocks.manifest.tokens]
    assert stream.tolist() == [0, *stream_of(plain)]
    assert blocks.inserted(np.arange(2)) is None


@pytest.mark.usefixtures("small")
def test_a_folder_of_before_is_what_it_was(tmp_path: Path, entries: list[str], tokenizer: Tokenizer) -> None:
    """Neither the column nor the manifest's new keys: rows, digest and checks as ever, nothing is inserted."""
    new = packed(entries, tokenizer, tmp_path / "data", 8)
    rows = new.rows(np.arange(len(new)))
    folder = tmp_path / "before"
    folder.mkdir()
    with pa.OSFile(str(folder / BLOCKS), "wb") as sink, pa.memory_map(str(tmp_path / "data" / BLOCKS)) as made:
        file = pa.ipc.open_file(made)
        batches = [file.get_batch(i).select(["input_ids"]) for i in range(file.num_record_batches)]
        with pa.ipc.new_file(sink, batches[0].schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
    values = json.loads((tmp_path / "data" / MANIFEST).read_text())
    for name in ("prefix", "largest_id", "words", "bytes"):
        del values[name]
    (folder / MANIFEST).write_text(json.dumps(values))
    old = PackedBlocks(folder)
    assert np.array_equal(old.rows(np.arange(len(old))), rows) and old.inserted(np.arange(len(old))) is None
    assert (old.manifest.prefix, old.manifest.largest_id, old.largest_id()) == (None, None, int(rows.max()))
    assert hashlib.sha256(rows.astype(np.int32).tobytes()).hexdigest() == old.manifest.digest
    prepare(entries, tokenizer, 8, folder, text_column="body")


def test_nothing_is_added_to_the_file_of_a_tokenizer_without_a_beginning(tmp_path: Path, entries: list[str]) -> None:
    blocks = packed(entries, tokenizer_in(tmp_path / "words", bos=False), tmp_path / "data", 8)
    with pa.memory_map(str(tmp_path / "data" / BLOCKS)) as file:
        assert pa.ipc.open_file(file).schema.names == ["input_ids"]
    assert (blocks.manifest.words, blocks.manifest.bytes) == (None, None)
    assert blocks.inserted(np.arange(3)) is None and blocks.largest_id() == 42


def test_processes_that_tokenize_trust_what_the_recipe_trusts(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr(tokenizing.threading, "Thread", lambda **_: SimpleNamespace(start=lambda: None))
    monkeypatch.setattr(tokenizing, "load_tokenizer", lambda name, **options: given.append((name, options)))
    monkeypatch.setattr(tokenizing, "_worker_tokenizer", None, raising=False)
    tokenizing._start_worker("t", True)
    assert given == [("t", {"trust_remote_code": True})]


@pytest.mark.usefixtures("small")
def test_the_files_do_not_depend_on_the_number_of_processes(
    tmp_path: Path, entries: list[str], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizing, "ALONE_BYTES", 0)
    for processes in (1, 2):
        packed(entries, tokenizer, tmp_path / f"data{processes}", processes=processes)
    for name in (BLOCKS, MANIFEST):
        assert (tmp_path / "data1" / name).read_bytes() == (tmp_path / "data2" / name).read_bytes()


def test_what_is_one_task_of_work_starts_no_processes(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizing, "ALONE_BYTES", 0)  # the size of a hub's data set is not known, either
    monkeypatch.setattr(tokenizing, "ProcessPoolExecutor", None)
    (tmp_path / "few.txt").write_text("w1 w2 w3 w4 w5 w6 w7 w8 w9")
    assert len(packed([str(tmp_path / "few.txt")], tokenizer, tmp_path / "data", processes=2))


Change = Callable[[Path, dict[str, Any]], Any]
CHANGES: list[tuple[str, Change]] = [
    ("tokenizer", lambda folder, made: made.update(tokenizer=tokenizer_in(folder / "other", bos=False))),
    ("data.sequence_length", lambda folder, made: made.update(sequence_length=8)),
    ("data.text_column", lambda folder, made: made.update(text_column="text")),
    ("data entries", lambda folder, made: made["entries"].append(HubDataset(hub="a/b"))),
    ("sizes of data files", lambda folder, made: (folder / "long.txt").write_text(LONG + "w")),
    ("sizes of data files", lambda folder, made: (folder / "lots.txt").touch()),
]


@pytest.mark.parametrize(("what", "change"), CHANGES)
def test_other_data_than_was_prepared_is_refused(
    tmp_path: Path, entries: list[str], tokenizer: Tokenizer, what: str, change: Change
) -> None:
    folder = tmp_path / "data"
    asked: dict[str, Any] = {"entries": entries, "tokenizer": tokenizer, "sequence_length": 7}
    asked |= {"folder": folder, "text_column": "body"}
    prepare(**asked, processes=1)
    inode = folder.stat().st_ino
    assert prepare(**asked, processes=1) and folder.stat().st_ino == inode
    change(tmp_path, asked)
    said = rf"^{folder} was prepared with other {re.escape(what)}: (.+), now (?!\1:).+: delete that folder .* data"
    with pytest.raises(DataError, match=said):
        prepare(**asked, processes=1)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (MANIFEST, lambda data: data[:50], TORN),
        (MANIFEST, lambda data: b"{}", TORN),
        (MANIFEST, lambda data: data.replace(b'"tokens"', b'"token"'), TORN),
        (BLOCKS, lambda data: b"", TORN),
        (BLOCKS, lambda data: data[: len(data) // 2], TORN),
        (MANIFEST, lambda data: data.replace(b'"rows": ', b'"rows": 1'), f": {BLOCKS} and {MANIFEST} differ in rows"),
    ],
)
def test_a_torn_folder_is_named(
    tmp_path: Path, entries: list[str], tokenizer: Tokenizer, name: str, change: Callable[[bytes], bytes], message: str
) -> None:
    packed(entries, tokenizer, tmp_path / "data")
    data = (file := tmp_path / "data" / name).read_bytes()
    file.unlink()  # not written over, as a map of it may be open
    said = rf"^{tmp_path / 'data'} ?{{}}.*: delete .* to prepare it anew"
    with pytest.raises(DataError, match=said.format(TORN)):
        PackedBlocks(tmp_path / "data")
    file.write_bytes(change(data))
    with pytest.raises(DataError, match=said.format(message)):
        PackedBlocks(tmp_path / "data")


def test_too_little_data_for_a_row(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("w1 w2")
    asked = ([str(tmp_path / "a.txt")], tokenizer, tmp_path / "data", 5)
    with pytest.raises(DataError, match=r"a\.txt has 4 tokens, less than one row of data\.sequence_length \(5\): give"):
        packed(*asked)
    assert not (tmp_path / "data").exists() and len(packed(*asked, drop_tail=False)) == 1


@pytest.mark.usefixtures("small")
def test_an_interrupted_preparation_leaves_no_folder_and_the_next_one_succeeds(
    tmp_path: Path, entries: list[str], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **names: Any) -> Iterator[Piece]:
        for i, piece in enumerate(sources.iter_pieces(*args, **names)):
            yield piece
            if i == 20:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tokenizing, "iter_pieces", interrupted)
        packed(entries, tokenizer, tmp_path / "data")
    assert not (tmp_path / "data").exists()
    rows = packed(entries, tokenizer, tmp_path / "data").rows(np.arange(5)).ravel()
    assert rows.tolist() == stream_of(tokenizer)[:35]
    assert not (tmp_path / "data.tmp").exists()


def test_bad_rows_are_left_out_if_asked(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = [SHORT[0], None, SHORT[1], 7]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    entries = [str(tmp_path / "a.jsonl")]
    blocks = packed(entries, tokenizer, tmp_path / "data", 1, skip_bad_rows=True)
    stream = [i for document in tokenizer.encode_batch(SHORT[:2]) for i in [*document, tokenizer.eos_id]]
    assert blocks.rows(np.arange(len(blocks))).reshape(-1).tolist() == stream
    assert (blocks.manifest.documents, blocks.manifest.left_out) == (2, 2)
    asked: dict[str, Any] = {"text_column": "body", "drop_tail": True, "processes": 1}
    assert prepare(entries, tokenizer, 1, tmp_path / "data", **asked, skip_bad_rows=True).manifest.left_out == 2
    with pytest.raises(
        DataError, match=r"data was prepared without 2 bad rows, which data\.skip_bad_rows: false refuse"
    ):
        prepare(entries, tokenizer, 1, tmp_path / "data", **asked)
    with pytest.raises(
        DataError, match=r"^2 rows cannot be used: .*a\.jsonl, line 2: 'body' is None, .* or set data\.sk"
    ):
        packed(entries, tokenizer, tmp_path / "other", 1)
    (tmp_path / "a.jsonl").write_text('{"body": 1}\n')
    with pytest.raises(DataError, match=r"^no row is left: .*a\.jsonl, line 1: 'body' is 1, not a string: fix or drop"):
        packed(entries, tokenizer, tmp_path / "other", 1, skip_bad_rows=True)
    assert not (tmp_path / "other").exists()


def test_a_tokenizer_is_not_trained_on_data_that_is_refused(tmp_path: Path) -> None:
    """A tokenizer that was written would be taken as it is, once the data is mended."""
    lines = [json.dumps({"text": f"the river {i} runs"}) for i in range(200)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, '{"text": null}']))
    asked = {"train": str(tmp_path / "a.jsonl"), "tokenizer": str(tmp_path / "t"), "train_tokenizer": 290}
    with pytest.raises(
        DataError, match=r"a\.jsonl, line 201: 'text' is None, not a string: fix or drop the row, or se"
    ):
        ensure_tokenizer(DataConfig.model_validate(asked), TASKS["causal-lm"])
    assert not (tmp_path / "t").exists()
    assert (
        ensure_tokenizer(DataConfig.model_validate(asked | {"skip_bad_rows": True}), TASKS["causal-lm"]).vocab_size
        == 290
    )
