"""Packed blocks of token ids in a memory-mapped Arrow file: written by `Packer`, read by `PackedBlocks`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from ted_ds.batch import IGNORED, Batch
from ted_ds.data.manifests import open_prepared
from ted_ds.data.sources import Piece
from ted_ds.data.tokenizers import Tokenizer
from ted_ds.data.tokenizing import TextCounts

BLOCKS = "blocks.arrow"

INSERTED, ENDS = "inserted", "ends"
"""Columns of marks: tokens that the tokenizer put before documents, and, of held-out data, that close them."""

BATCH_TOKENS = 1 << 20
"""Tokens of a record batch of the Arrow file (4 MiB)."""


@dataclass(frozen=True)
class Manifest:
    """What packed blocks were made of.

    entries, text_column, sources: the recipe's data, and name -> bytes of the files it meant.
    tokens: of all documents, their prefixes and ends included, and a dropped tail too. last_row_length: tokens
    of the last row that are not padding. digest: SHA-256 of the rows' ids, as int32.
    prefix: what the tokenizer put before each document. largest_id: of the rows. words, bytes: of held-out documents,
    see `TextCounts`; None for training data. All four are None in folders of versions that did not write them.
    left_out: bad rows of the data, of which there is nothing here.
    """

    tokenizer: str
    tokenizer_fingerprint: str
    sequence_length: int
    rows: int
    last_row_length: int
    tokens: int
    documents: int
    text_column: str
    entries: tuple[str, ...]
    sources: dict[str, int]
    digest: str
    prefix: tuple[int, ...] | None = None
    largest_id: int | None = None
    words: int | None = None
    bytes: int | None = None
    left_out: int = 0


class PackedBlocks:
    """The packed rows of one split, memory-mapped: rows that are not read cost no memory.

    The file may have columns of marks, S bits a row, packed into bytes: `inserted` if the tokenizer begins documents
    with tokens of its own, `ends` in held-out data. Files of older versions have none.

    Raises DataError if the folder is not whole.
    """

    def __init__(self, folder: Path) -> None:
        self.manifest, batches = open_prepared(folder, BLOCKS, Manifest)
        length = self.manifest.sequence_length
        # zero-copy views of the map; every batch but the last has as many rows
        self._batches = [batch.column(0).flatten().to_numpy().reshape(-1, length) for batch in batches]
        names = [name for name in (INSERTED, ENDS) if name in batches[0].schema.names]
        self._marks = {name: [_bytes_of(batch.column(name)) for batch in batches] for name in names}

    def __len__(self) -> int:
        return self.manifest.rows

    def described(self) -> str:
        """Its size in words."""
        return f"{len(self)} blocks of {self.manifest.sequence_length} tokens"

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """[len(indices), S] int64 token ids."""
        size = len(self._batches[0])
        return np.stack([self._batches[i // size][i % size] for i in indices.tolist()]).astype(np.int64)

    def inserted(self, indices: np.ndarray) -> np.ndarray | None:
        """[len(indices), S] bool: true on tokens that the tokenizer put before documents; None if it puts none."""
        return self._marked(INSERTED, indices)

    def ends(self, indices: np.ndarray) -> np.ndarray | None:
        """[len(indices), S] bool: true on tokens that close a document; None if that was not written."""
        return self._marked(ENDS, indices)

    def _marked(self, name: str, indices: np.ndarray) -> np.ndarray | None:
        if name not in self._marks:
            return None
        size = len(self._batches[0])
        marks = np.stack([self._marks[name][i // size][i % size] for i in indices.tolist()])
        return np.unpackbits(marks, axis=1, count=self.manifest.sequence_length).view(bool)

    def largest_id(self) -> int:
        """The largest id of all rows, which are read through if the manifest does not say."""
        known = self.manifest.largest_id
        return max(int(batch.max()) for batch in self._batches) if known is None else known

    def row_length(self, index: int) -> int:
        """Tokens of a row that are not padding: S, or less in the last row."""
        last = index == len(self) - 1
        return self.manifest.last_row_length if last else self.manifest.sequence_length

    @property
    def lengths(self) -> np.ndarray:
        """[rows] tokens that a teacher reads of each: all S."""
        return np.full(len(self), self.manifest.sequence_length)

    def batch(self, rows: np.ndarray) -> Batch:
        """The rows' ids [B, S], without targets."""
        ids = torch.from_numpy(self.rows(rows))
        return Batch(ids, torch.full_like(ids, IGNORED))

    def fingerprint(self) -> str:
        """A hash of ids and S, which is all that a teacher's output depends on; names and paths are not part of it."""
        return hashlib.sha256(f"blocks {self.manifest.sequence_length} {self.manifest.digest}".encode()).hexdigest()


def _bytes_of(column: pa.FixedSizeBinaryArray) -> np.ndarray:
    """[rows, bytes] uint8, a view."""
    width = column.type.byte_width
    return np.frombuffer(column.buffers()[1], np.uint8, len(column) * width).reshape(-1, width)


class Packer:
    """Cuts the stream of tokens into rows and writes them; of held-out data also where documents end.

    text: what held-out documents count.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer, length: int, *, held_out: bool) -> None:
        self.rows = self.tokens = self.documents = self.largest_id = 0
        self.digest = hashlib.sha256()
        self.text = TextCounts() if held_out else None
        self._prefix, self._eos, self._length = tokenizer.prefix, tokenizer.eos_id, length
        self._one_mark = self._prefix == [self._eos]
        self._rows_a_batch = max(1, BATCH_TOKENS // length)
        names = [INSERTED] * bool(self._prefix and not self._one_mark) + [ENDS] * held_out
        self._held = {"input_ids": [np.empty(0, dtype=np.int32)]} | {name: [np.empty(0, dtype=bool)] for name in names}
        self._held_tokens = 0
        columns = [("input_ids", pa.list_(pa.int32(), length)), *((name, pa.binary(-(-length // 8))) for name in names)]
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._sink, pa.schema(columns))

    def add(self, piece: Piece, ids: list[int]) -> None:
        """One piece's ids, which begin with the tokenizer's prefix whether or not a document does."""
        begins = piece.starts and not (self._one_mark and self.tokens)
        ids = ids if begins else ids[len(self._prefix) :]
        row = np.array([*ids, self._eos] if piece.ends else ids, dtype=np.int32)
        self._hold(row, inserted=len(self._prefix) if begins else 0, ends=piece.ends)
        while self._held_tokens >= self._rows_a_batch * self._length:
            self._write(self._rows_a_batch)
        self.tokens += len(row)
        self.documents += piece.ends
        if self.text is not None:
            self.text.add(piece)

    def close(self, *, drop_tail: bool) -> int:
        """Writes what is left; returns how many tokens of the last row are not padding."""
        rest = self._held_tokens % self._length
        if rest and not drop_tail:
            self._hold(np.full(self._length - rest, self._eos, dtype=np.int32), inserted=0, ends=False)
        self._write(self._held_tokens // self._length)
        self._writer.close()
        self._sink.close()
        return rest if rest and not drop_tail else self._length

    def _hold(self, ids: np.ndarray, *, inserted: int, ends: bool) -> None:
        """inserted: how many ids at the beginning are the tokenizer's own. ends: whether the last closes a document."""
        places = np.arange(len(ids))
        new = {"input_ids": ids, INSERTED: places < inserted, ENDS: places >= len(ids) - ends}
        for name, held in self._held.items():
            held.append(new[name])
        self._held_tokens += len(ids)

    def _write(self, rows: int) -> None:
        if not rows:
            return
        columns: dict[str, pa.Array] = {}
        for name, held in self._held.items():
            whole, length = np.concatenate(held), rows * self._length
            full, self._held[name] = whole[:length], [whole[length:]]
            if name == "input_ids":
                columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(full), self._length)
                self.digest.update(full.tobytes())
                self.largest_id = max(self.largest_id, int(full.max()))
            else:
                packed = np.packbits(full.reshape(rows, self._length), axis=1)
                kind = pa.binary(packed.shape[1])
                columns[name] = pa.FixedSizeBinaryArray.from_buffers(kind, rows, [None, pa.py_buffer(packed)])
        self._writer.write_batch(pa.record_batch(columns))
        self._held_tokens -= rows * self._length
        self.rows += rows
