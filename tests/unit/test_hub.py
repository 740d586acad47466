"""Data sets as `datasets` loads them, and the folders it saves: what they say when they cannot be read."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset, NamedSplit, Value

from ted_ds.config.data_section import HubDataset
from ted_ds.config.tasks import TASKS
from ted_ds.data.records import hub_records
from ted_ds.data.sources import iter_pieces
from ted_ds.data.squad import iter_questions
from ted_ds.data.tables import iter_examples
from ted_ds.data.text_files import POINTER
from ted_ds.errors import DataError
from tests.unit.test_sources import by_arrow

OWN = TASKS["classification"].with_columns(("text",), "label", ("bad", "good"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def hub(folder: Path, **files: list[dict[str, Any]] | str) -> Path:
    """A folder of JSON lines, each file given by its rows or as it is."""
    folder.mkdir()
    for name, rows in files.items():
        text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


def texts(folder: Path, **changes: Any) -> list[str]:
    return [piece.text for piece in iter_pieces([HubDataset(hub=str(folder), **changes)], text_column="text")]


SHARDS: list[tuple[dict[str, Any], str]] = [
    (
        {"a": [{"text": "x", "meta": None}], "b": [{"text": "y", "meta": {"n": 1}}]},
        r"file .*b\.jsonl, column 'meta': Couldn't cast array of type struct<n: int64> to null",
    ),
    ({"a": [{"text": "x"}], "b": [{"body": "y"}]}, r"file .*b\.jsonl.*: its columns differ, .*'body'"),
    ({"a": [{"text": "x", "n": 1}], "b": [{"text": "y", "n": "z"}]}, r"file .*b\.jsonl, column 'n': .*int64"),
    ({"a": '{"text": "x"}\n{"text": "cut'}, r"file .*a\.jsonl: JSON parse error: .* in row 1"),
    ({"a": '{"text": "x"}\n{"text": "\\ud800"}\n'}, r"file .*a\.jsonl: JSON parse error: .*surrogate.* in row 1"),
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("files", "message"), SHARDS)
def test_the_innermost_cause_is_told_with_file_and_column(
    tmp_path: Path, files: dict[str, Any], message: str, streaming: bool
) -> None:
    folder = hub(tmp_path / "hub", **files)
    with pytest.raises(DataError, match=rf"^data set {folder} \(default, train\) cannot be (loaded|read): {message}"):
        texts(folder, streaming=streaming)


def test_differing_parquet_shards_are_told_for_tables_and_questions_too(tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    pq.write_table(pa.table({"text": ["a"], "label": [1]}), tmp_path / "hub" / "a.parquet")
    pq.write_table(pa.table({"text": ["a"], "label": ["x"]}), tmp_path / "hub" / "b.parquet")
    entry = HubDataset(hub=str(tmp_path / "hub"))
    message = r"cannot be loaded: file .*b\.parquet, column 'label': .*'x' as a scalar of type int64"
    with pytest.raises(DataError, match=message):
        list(iter_examples([entry], OWN))
    with pytest.raises(DataError, match=message):
        list(iter_questions([entry], impossible=True))


def test_a_saved_folder_is_read(tmp_path: Path) -> None:
    Dataset.from_dict({"text": ["one", "", "two"]}).save_to_disk(tmp_path / "saved")
    assert texts(tmp_path / "saved") == texts(tmp_path / "saved", streaming=True) == ["one", "two"]
    with pytest.raises(DataError, match=r"saved \(other, train\) is a saved folder, which has no configurations"):
        texts(tmp_path / "saved", name="other")
    with pytest.raises(DataError, match=r"saved \(default, train\) has no column 'label', only text: set data\."):
        list(iter_examples([HubDataset(hub=str(tmp_path / "saved"))], OWN))


def test_a_saved_folder_s_labels_keep_their_names(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["good", "bad"])})
    Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features).save_to_disk(tmp_path / "saved")
    examples = iter_examples([HubDataset(hub=str(tmp_path / "saved"))], OWN)
    assert [(example.texts, example.label) for example in examples] == [(("a",), 1), (("b",), 0)]


def test_a_saved_folder_of_splits_needs_one_of_them(tmp_path: Path) -> None:
    splits = {name: Dataset.from_dict({"text": [name]}) for name in ("train", "dev")}
    DatasetDict(splits).save_to_disk(tmp_path / "splits")
    assert texts(tmp_path / "splits") == ["train"]
    assert texts(tmp_path / "splits", split="dev") == ["dev"]
    with pytest.raises(DataError, match=r"\(default, test\) is a saved folder of train, dev: set split to one of them"):
        texts(tmp_path / "splits", split="test")
    Dataset.from_dict({"text": ["a"]}, split=NamedSplit("dev")).save_to_disk(tmp_path / "dev")
    assert texts(tmp_path / "dev", split="dev") == ["a"]
    with pytest.raises(DataError, match=r"\(default, train\) is a saved folder of dev: set split"):
        texts(tmp_path / "dev")


def test_a_broken_saved_folder_is_told(tmp_path: Path) -> None:
    Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "saved")
    next((tmp_path / "saved").glob("*.arrow")).write_bytes(b"")
    with pytest.raises(DataError, match=r"saved \(default, train\) cannot be loaded: "):
        texts(tmp_path / "saved")


@pytest.mark.parametrize("name", ["train.txt", "train.csv", "train.jsonl", "train.parquet"])
def test_a_clone_without_its_files_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(f"{POINTER}spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(
        DataError, match=rf"^{tmp_path / name} is a pointer of git LFS, not the file itself: run `git l"
    ):
        texts(tmp_path)


def test_columns_that_are_not_known_before_are_looked_for_in_each_row(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = IterableDataset.from_generator(lambda: iter([{"text": "x", "label": "good"}, {"text": "y", "other": 1}]))
    assert rows.column_names is None
    monkeypatch.setattr("ted_ds.data.records.hub_rows", lambda _: ("data set X", rows))
    entry = HubDataset(hub="X", streaming=True)
    with pytest.raises(
        DataError, match=r"X, row 2 has no column 'label', only text, other: set data\.text_columns and"
    ):
        list(iter_examples([entry], OWN))
    with pytest.raises(DataError, match=r"X, row 2 has no column 'label', only text, other: set data\.text_column$"):
        list(iter_pieces([entry], text_column="label"))


@pytest.mark.parametrize("streaming", [False, True])
def test_files_of_a_folder_that_are_not_whole_are_refused(tmp_path: Path, streaming: bool) -> None:
    folder = tmp_path / "hub"
    folder.mkdir()
    lines = "".join(f"{number} {hash(str(number))}\n" for number in range(20000)).encode()
    packed = by_arrow("zstd")(lines)
    (folder / "train.txt.zst").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match=rf"^{folder}/train\.txt\.zst cannot be read: Compressed file ended before"):
        texts(folder, streaming=streaming)
    (folder / "train.txt.zst").write_bytes(packed)
    (folder / "notes.bin").write_text(POINTER)  # no file of the data set
    assert len(texts(folder, streaming=streaming)) == 20000


def test_a_csv_column_there_twice_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "train.csv").write_text("text,n,n,m.1\na,b,1,2\n")
    assert [texts(folder, streaming=streaming) for streaming in (False, True)] == [["a"], ["a"]]
    (folder / "train.csv").write_text("text,text,n\na,b,1\n")
    with pytest.raises(DataError, match=rf"^data set {folder} .*has 2 columns 'text': rename or drop all but one"):
        texts(folder)


def test_a_csv_column_that_a_stream_has_twice_is_refused() -> None:
    class Stream(list[dict[str, str]]):
        column_names = None
        info = SimpleNamespace(builder_name="csv")

    with pytest.raises(DataError, match=r"^s, row 1 has 2 columns 'text': rename or drop all but one"):
        list(hub_records("s", Stream([{"text": "a", "text.1": "b"}]), ("text",), "data.text_column"))
