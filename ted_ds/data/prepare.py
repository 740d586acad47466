"""Documents -> packed blocks of token ids in a memory-mapped Arrow file, with a manifest that later runs check."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from itertools import chain, islice
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from ted_ds.config.schema import HubDataset
from ted_ds.data.bad_rows import BadRows
from ted_ds.data.files import matching_files
from ted_ds.data.sources import Piece, iter_pieces
from ted_ds.data.tokenizers import Tokenizer, load_tokenizer
from ted_ds.errors import DataError

Entries = Sequence[str | HubDataset]

BLOCKS, MANIFEST = "blocks.arrow", "manifest.json"
INSERTED, ENDS = "inserted", "ends"
"""Columns of marks: tokens that the tokenizer put before documents, and, of held-out data, that close them."""

TASK_CHARACTERS = 1 << 20
"""Text handed to a process at a time: tens of milliseconds of work, so that handing it over costs little."""

BATCH_TOKENS = 1 << 20
"""Tokens of a record batch of the Arrow file (4 MiB)."""

ALONE_BYTES = 32 << 20
"""Corpora smaller than this are tokenized in this process: starting others takes longer."""


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

    Raises DataError where the folder is not whole.
    """

    def __init__(self, folder: Path) -> None:
        try:
            values = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            prefix = None if values.get("prefix") is None else tuple(values["prefix"])
            entries = reread_names(values["entries"])
            self.manifest = Manifest(**{**values, "entries": entries, "prefix": prefix})
            self._file = pa.ipc.open_file(pa.memory_map(str(folder / BLOCKS)))
            batches = [self._file.get_batch(i) for i in range(self._file.num_record_batches)]
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            raise DataError(f"{folder} holds no whole prepared data ({error}): delete it to prepare it anew") from error
        length = self.manifest.sequence_length
        # zero-copy views of the map; every batch but the last has as many rows
        self._batches = [batch.column(0).flatten().to_numpy().reshape(-1, length) for batch in batches]
        names = [name for name in (INSERTED, ENDS) if name in self._file.schema.names]
        self._marks = {name: [_bytes_of(batch.column(name)) for batch in batches] for name in names}
        if sum(map(len, self._batches)) != self.manifest.rows:
            raise DataError(f"{folder}: {BLOCKS} and {MANIFEST} differ in rows: delete the folder to prepare it anew")

    def __len__(self) -> int:
        return self.manifest.rows

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """[len(indices), S] int64 token ids."""
        size = len(self._batches[0])
        return np.stack([self._batches[i // size][i % size] for i in indices.tolist()]).astype(np.int64)

    def inserted(self, indices: np.ndarray) -> np.ndarray | None:
        """[len(indices), S] bool: true on tokens that the tokenizer put before documents; None where it puts none."""
        return self._marked(INSERTED, indices)

    def ends(self, indices: np.ndarray) -> np.ndarray | None:
        """[len(indices), S] bool: true on tokens that close a document; None where that was not written."""
        return self._marked(ENDS, indices)

    def _marked(self, name: str, indices: np.ndarray) -> np.ndarray | None:
        if name not in self._marks:
            return None
        size = len(self._batches[0])
        marks = np.stack([self._marks[name][i // size][i % size] for i in indices.tolist()])
        return np.unpackbits(marks, axis=1, count=self.manifest.sequence_length).view(bool)

    def largest_id(self) -> int:
        """The largest id of all rows, read through where the folder does not say."""
        known = self.manifest.largest_id
        return max(int(batch.max()) for batch in self._batches) if known is None else known

    def row_length(self, index: int) -> int:
        """Tokens of a row that are not padding: S, or less in the last row."""
        last = index == len(self) - 1
        return self.manifest.last_row_length if last else self.manifest.sequence_length


def _bytes_of(column: pa.FixedSizeBinaryArray) -> np.ndarray:
    """[rows, bytes] uint8, a view."""
    width = column.type.byte_width
    return np.frombuffer(column.buffers()[1], np.uint8, len(column) * width).reshape(-1, width)


def ensure_prepared(
    entries: Entries,
    tokenizer: Tokenizer,
    sequence_length: int,
    folder: Path,
    *,
    text_column: str,
    drop_tail: bool,
    processes: int | None,
    skip_bad_rows: bool = False,
) -> PackedBlocks:
    """The packed blocks in `folder`, prepared now if it does not exist; DataError as `prepare` and `check` raise it."""
    if not folder.exists():
        return prepare(
            entries,
            tokenizer,
            sequence_length,
            folder,
            text_column=text_column,
            drop_tail=drop_tail,
            processes=processes,
            skip_bad_rows=skip_bad_rows,
        )
    blocks = PackedBlocks(folder)
    refuse_left_out(folder, blocks.manifest.left_out, skip_bad_rows)
    check(blocks, folder, entries, tokenizer, sequence_length, text_column=text_column)
    return blocks


def check(
    blocks: PackedBlocks,
    folder: Path,
    entries: Entries,
    tokenizer: Tokenizer,
    sequence_length: int,
    *,
    text_column: str,
) -> None:
    """Raises DataError where `blocks` were made of other data, by another tokenizer, or at another length."""
    made = blocks.manifest
    sizes = file_sizes(entries) if made.entries == entry_names(entries) else {}
    prefix = None if made.prefix is None else tuple(tokenizer.prefix)
    wanted: list[tuple[str, object, object]] = [
        ("tokenizer", made.tokenizer_fingerprint, tokenizer.fingerprint),
        ("ids before each document", made.prefix, prefix),
        ("data.sequence_length", made.sequence_length, sequence_length),
        ("data.text_column", made.text_column, text_column),
        ("data entries", list(made.entries), list(entry_names(entries))),
        ("sizes of data files", made.sources, sizes),
    ]
    refuse_differences(folder, wanted)


def refuse_differences(folder: Path, wanted: Sequence[tuple[str, object, object]]) -> None:
    """Raises DataError for the first (what, as the folder was made, as it is asked for now) that differs."""
    for what, before, now in wanted:
        if before != now:
            raise DataError(
                f"{folder} was prepared with other {what}: {before!s:.200}, now {now!s:.200}: delete that folder to "
                "prepare it anew, or set data.prepared to another"
            )


def refuse_left_out(folder: Path, left_out: int, skip_bad_rows: bool | None) -> None:
    """Raises DataError where the folder lacks bad rows of its data that are not to be left out."""
    if left_out and not skip_bad_rows:
        raise DataError(
            f"{folder} was prepared without {left_out} bad rows, which data.skip_bad_rows: false refuses: set it to "
            "true, or delete that folder to prepare it anew"
        )


def prepare(
    entries: Entries,
    tokenizer: Tokenizer,
    sequence_length: int,
    folder: Path,
    *,
    text_column: str = "text",
    drop_tail: bool = True,
    processes: int | None = None,
    skip_bad_rows: bool = False,
) -> PackedBlocks:
    """Tokenizes and packs all documents into `folder`, renamed into place when it is whole.

    Documents follow each other, each after the tokenizer's own prefix and closed by its end-of-document
    token, and are cut every `sequence_length` tokens: a row may hold the end of one and the beginning of
    the next. Where prefix and end are one token (OPT), it stands once between two documents, as in the data of such
    models. Nothing is lost but, with `drop_tail`, a last row that is not full; else it is padded.
    processes: that tokenize; None: one a core. The result does not depend on it. skip_bad_rows: see `BadRows`.
    Raises DataError for data that is missing, unreadable, or makes no full row.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    sizes = file_sizes(entries)
    counts = None if drop_tail else TextCounts()
    packer = _Packer(temporary / BLOCKS, tokenizer, sequence_length, held_out=not drop_tail)
    what = f"prepare {folder.name}"
    with BadRows(skip=skip_bad_rows) as bad:
        for piece, ids in tokenized(entries, tokenizer, bad, text_column=text_column, processes=processes, what=what):
            packer.add(piece, ids)
            if counts is not None:
                counts.add(piece)
    if bad.count and not packer.tokens:
        raise bad.nothing_left()
    last_row_length = packer.close(drop_tail=drop_tail)
    if not packer.rows:
        raise DataError(
            f"data {', '.join(entry_names(entries))} has {packer.tokens} tokens, less than one row of "
            f"data.sequence_length ({sequence_length}): give more data, or shorter rows"
        )
    manifest = Manifest(
        tokenizer=tokenizer.name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        sequence_length=sequence_length,
        rows=packer.rows,
        last_row_length=last_row_length,
        tokens=packer.tokens,
        documents=packer.documents,
        text_column=text_column,
        entries=entry_names(entries),
        sources=sizes,
        prefix=tuple(tokenizer.prefix),
        largest_id=packer.largest_id,
        words=None if counts is None else counts.words,
        bytes=None if counts is None else counts.bytes,
        left_out=bad.count,
        digest=packer.digest.hexdigest(),
    )
    (temporary / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")
    temporary.rename(folder)
    return PackedBlocks(folder)


def tokenized(
    entries: Entries, tokenizer: Tokenizer, bad: BadRows, *, text_column: str, processes: int | None, what: str
) -> Iterator[tuple[Piece, list[int]]]:
    """The pieces of all documents in order, each with its ids, which begin with the tokenizer's prefix.

    bad: gets the rows that cannot be used. processes, errors: see `prepare`. what: the progress bar's name.
    """
    sizes = file_sizes(entries)
    workers = processes or os.cpu_count() or 1
    if sizes and sum(sizes.values()) < ALONE_BYTES:
        workers = 1
    pieces = iter_pieces(entries, text_column=text_column, bad=bad)
    tokens = 0
    with tqdm(total=sum(sizes.values()) or None, unit="B", unit_scale=True, desc=what) as bar:
        for group, encoded in _encoded(pieces, tokenizer, workers):
            for piece, ids in zip(group, encoded, strict=True):
                yield piece, ids
                tokens += len(ids)
                bar.update(piece.read)
            bar.set_postfix(tokens=f"{tokens:,}", refresh=False)


class TextCounts:
    """What documents count, piece by piece.

    words: parts between white space, as `re.split(r"\\s+", text)` tells them, an empty one at either end included
    (lm-evaluation-harness counts so). bytes: of UTF-8.
    """

    def __init__(self) -> None:
        self.words = self.bytes = 0
        self._in_space = False

    def add(self, piece: Piece) -> None:
        """Counts the next piece."""
        goes_on = not piece.starts and self._in_space and piece.text[:1].isspace()
        self.words += len(re.findall(r"\s+", piece.text)) - goes_on + piece.starts
        self.bytes += len(piece.text.encode())
        self._in_space = piece.text[-1:].isspace()


class _Packer:
    """Cuts the stream of tokens into rows and writes them."""

    def __init__(self, path: Path, tokenizer: Tokenizer, length: int, *, held_out: bool) -> None:
        self.rows = self.tokens = self.documents = self.largest_id = 0
        self.digest = hashlib.sha256()
        self._prefix, self._eos, self._length = tokenizer.prefix, tokenizer.eos_id, length
        self._one_mark = self._prefix == [self._eos]
        self._rows_a_batch = max(1, BATCH_TOKENS // length)
        self._held: list[np.ndarray] = []
        names = [INSERTED] * bool(self._prefix and not self._one_mark) + [ENDS] * held_out
        self._marks: dict[str, list[np.ndarray]] = {name: [] for name in names}
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
        self._held.append(ids)
        self._held_tokens += len(ids)
        places = np.arange(len(ids))
        for name, held in self._marks.items():
            held.append(places < inserted if name == INSERTED else places >= len(ids) - ends)

    def _write(self, rows: int) -> None:
        full, self._held = _parted(self._held, rows * self._length)
        self._held_tokens -= len(full)
        columns: dict[str, pa.Array] = {"input_ids": pa.FixedSizeListArray.from_arrays(pa.array(full), self._length)}
        for name, held in self._marks.items():
            marks, self._marks[name] = _parted(held, rows * self._length)
            packed = np.packbits(marks.reshape(rows, self._length), axis=1)
            kind = pa.binary(packed.shape[1])
            columns[name] = pa.FixedSizeBinaryArray.from_buffers(kind, rows, [None, pa.py_buffer(packed)])
        if rows:
            self._writer.write_batch(pa.record_batch(columns))
            self.digest.update(full.tobytes())
            self.largest_id = max(self.largest_id, int(full.max()))
            self.rows += rows


def _parted(held: list[np.ndarray], length: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """(the first `length` elements of the arrays, what is left)."""
    whole = np.concatenate(held) if held else np.empty(0, dtype=np.int32)
    return whole[:length], [whole[length:]]


def _encoded(
    pieces: Iterator[Piece], tokenizer: Tokenizer, workers: int
) -> Iterator[tuple[list[Piece], list[list[int]]]]:
    """Groups of pieces with their ids, in order; reading goes on while `workers` processes tokenize."""
    groups = _grouped(pieces)
    first = list(islice(groups, 2))
    groups = chain(first, groups)
    if workers == 1 or len(first) == 1:  # a hub's data set may be small, too
        for group in groups:
            yield group, tokenizer.encode_batch([piece.text for piece in group])
        return
    waiting: deque[tuple[list[Piece], Future[list[list[int]]]]] = deque()
    # spawned, not forked: the parent may hold threads and a process group
    with ProcessPoolExecutor(
        workers, get_context("spawn"), _start_worker, (tokenizer.name, tokenizer.trust_remote_code)
    ) as pool:
        try:
            for group in groups:
                waiting.append((group, pool.submit(_encode_group, [piece.text for piece in group])))
                if len(waiting) > 2 * workers:
                    done, ids = waiting.popleft()
                    yield done, ids.result()
            while waiting:
                done, ids = waiting.popleft()
                yield done, ids.result()
        except BrokenProcessPool as error:
            raise DataError(
                "a tokenizing process died, most likely for lack of memory: set data.processes to less"
            ) from error


def _grouped(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        group.append(piece)
        size += len(piece.text)
        if size >= TASK_CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group


_worker_tokenizer: Tokenizer


def _start_worker(name: str, trust_remote_code: bool) -> None:
    global _worker_tokenizer
    os.putenv("TOKENIZERS_PARALLELISM", "false")  # a process a core is enough
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker_tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)


def _end_with_parent() -> None:
    """A killed parent's workers would wait for work for ever: they hold both ends of its queue."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_group(texts: list[str]) -> list[list[int]]:
    return _worker_tokenizer.encode_batch(texts)


def entry_names(entries: Entries) -> tuple[str, ...]:
    """What a manifest calls the entries of a recipe."""
    return tuple(entry if isinstance(entry, str) else entry.model_dump_json() for entry in entries)


def reread_names(names: Sequence[str]) -> tuple[str, ...]:
    """A manifest's entries as `entry_names` has them today: a hub data set's key that came later has its default.

    Raises ValueError for a hub data set with a key that is none today.
    """
    return tuple(HubDataset.model_validate_json(n).model_dump_json() if n.startswith('{"hub":') else n for n in names)


def file_sizes(entries: Entries) -> dict[str, int]:
    """Bytes of every local file; what a hub serves is not counted."""
    files = [path for entry in entries if isinstance(entry, str) for path in matching_files(entry)]
    return {str(path): path.stat().st_size for path in files}
