from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tokenizers import Tokenizer as Core
from tokenizers import models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ted_ds.config.schema import HubDataset
from ted_ds.data import prepare as module
from ted_ds.data import sources
from ted_ds.data.prepare import BLOCKS, MANIFEST, PackedBlocks, check, ensure_prepared, prepare
from ted_ds.data.sources import Piece
from ted_ds.data.tokenizers import Tokenizer, load_tokenizer
from ted_ds.errors import DataError

LONG = "".join(f"w{i % 40} w{i % 7}{' ' * (i % 3)}\n" for i in range(90))
TORN = "holds no whole prepared data"
SHORT = ["w1 w2", "w3", " ", "w4\nw5 w6 " * 9, "unknown", *(f"w{i}" for i in range(40))]


def tokenizer_in(folder: Path, *, bos: bool) -> Tokenizer:
    """A tokenizer of words, so that a text cut at line ends keeps its ids."""
    words = ["<eos>", "<unk>", "<bos>", *(f"w{i}" for i in range(40))]
    core = Core(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
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
    monkeypatch.setattr(module, "TASK_CHARACTERS", 150)
    monkeypatch.setattr(module, "BATCH_TOKENS", 50)


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
    }


@pytest.mark.usefixtures("small")
def test_the_files_do_not_depend_on_the_number_of_processes(
    tmp_path: Path, entries: list[str], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ALONE_BYTES", 0)
    for processes in (1, 2):
        packed(entries, tokenizer, tmp_path / f"data{processes}", processes=processes)
    for name in (BLOCKS, MANIFEST):
        assert (tmp_path / "data1" / name).read_bytes() == (tmp_path / "data2" / name).read_bytes()


def test_what_is_one_task_of_work_starts_no_processes(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ALONE_BYTES", 0)  # the size of a hub's data set is not known, either
    monkeypatch.setattr(module, "ProcessPoolExecutor", None)
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
    blocks = ensure_prepared(**asked, drop_tail=True, processes=1)
    check(blocks, **asked)
    inode = folder.stat().st_ino
    assert ensure_prepared(**asked, drop_tail=True, processes=1) and folder.stat().st_ino == inode
    change(tmp_path, asked)
    said = rf"^{folder} was prepared with other {re.escape(what)}: (.+), now (?!\1:).+: delete that folder .* data"
    with pytest.raises(DataError, match=said):
        ensure_prepared(**asked, drop_tail=True, processes=1)


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
        patch.setattr(module, "iter_pieces", interrupted)
        packed(entries, tokenizer, tmp_path / "data")
    assert not (tmp_path / "data").exists()
    rows = packed(entries, tokenizer, tmp_path / "data").rows(np.arange(5)).ravel()
    assert rows.tolist() == stream_of(tokenizer)[:35]
    assert not (tmp_path / "data.tmp").exists()
