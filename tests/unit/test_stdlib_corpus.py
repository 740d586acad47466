from __future__ import annotations

import json
from pathlib import Path

import pytest

from ted_ds.data import stdlib_corpus
from ted_ds.data.stdlib_corpus import write_stdlib_corpus

SPLITS = ("train", "validation")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    folder = tmp_path_factory.mktemp("corpus") / "deep" / "stdlib"
    return folder, write_stdlib_corpus(folder)


def documents(folder: Path, split: str) -> list[str]:
    lines = (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert all(record.keys() == {"text"} for record in records)
    return [record["text"] for record in records]


def test_it_is_the_same_every_time(corpus: tuple[Path, dict[str, int]], tmp_path: Path) -> None:
    folder, counts = corpus
    (tmp_path / "again.tmp").mkdir()
    (tmp_path / "again.tmp" / "left").write_text("by an interrupted run")
    assert write_stdlib_corpus(tmp_path / "again") == counts
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == ["train.jsonl", "validation.jsonl"]
    for split in SPLITS:
        assert (folder / f"{split}.jsonl").read_bytes() == (tmp_path / "again" / f"{split}.jsonl").read_bytes()


def test_counts_and_size_are_right(corpus: tuple[Path, dict[str, int]]) -> None:
    folder, counts = corpus
    expected: dict[str, int] = {}
    for split in SPLITS:
        texts = documents(folder, split)
        expected |= {f"{split}_documents": len(texts), f"{split}_characters": sum(map(len, texts))}
        assert all(text.strip() and len(text) <= stdlib_corpus.LARGEST_CHARACTERS for text in texts)
    assert counts == expected
    assert 2e6 < sum((folder / f"{split}.jsonl").stat().st_size for split in SPLITS) < 12e6
    share = counts["validation_documents"] / (counts["validation_documents"] + counts["train_documents"])
    assert share == pytest.approx(stdlib_corpus.HELD_OUT_SHARE, rel=0.6)


def test_no_document_is_in_both_splits(corpus: tuple[Path, dict[str, int]]) -> None:
    train, validation = (documents(corpus[0], split) for split in SPLITS)
    assert not set(train) & set(validation)


def test_only_text_of_the_library_itself_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corpus: tuple[Path, dict[str, int]]
) -> None:
    library = tmp_path / "python"
    for name in ("a.py", "b/c.py", "b/empty.py", "test/d.py", "site-packages/e.py", "b/tests/f.py", "g.txt"):
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text("" if "empty" in name else f"# {name} \u00e9", encoding="utf-8")
    monkeypatch.setattr(stdlib_corpus.sysconfig, "get_path", lambda name: str(library))
    write_stdlib_corpus(tmp_path / "out")
    found = [text for split in SPLITS for text in documents(tmp_path / "out", split)]
    assert sorted(found) == ["# a.py \u00e9", "# b/c.py \u00e9"]
