"""Documents -> packed blocks of token ids in a memory-mapped Arrow file, with a manifest that later runs check."""

from __future__ import annotations

import hashlib
import json
import os
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
from ted_ds.data.files import matching_files
from ted_ds.data.sources import Piece, iter_pieces
from ted_ds.data.tokenizers import Tokenizer, load_tokenizer
from ted_ds.errors import DataError

Entries = Sequence[str | HubDataset]

BLOCKS, MANIFEST = "blocks.arrow", "manifest.json"

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


class PackedBlocks:
    """The packed rows of one split, memory-mapped: rows that are not read cost no memory.

    Raises DataError where the folder is not whole.
    """

    def __init__(self, folder: Path) -> None:
        try:
            values = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            self.manifest = Manifest(**{**values, "entries": reread_names(values["entries"])})
            self._file = pa.ipc.open_file(pa.memory_map(str(folder / BLOCKS)))
            batches = [self._file.get_batch(i).column(0) for i in range(self._file.num_record_batches)]
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            raise DataError(f"{folder} holds no whole prepared data ({error}): delete it to prepare it anew") from error
        length = self.manifest.sequence_length
        # zero-copy views of the map; every batch but the last has as many rows
        self._batches = [batch.flatten().to_numpy().reshape(-1, length) for batch in batches]
        if sum(map(len, self._batches)) != self.manifest.rows:
            raise DataError(f"{folder}: {BLOCKS} and {MANIFEST} differ in rows: delete the folder to prepare it anew")

    def __len__(self) -> int:
        return self.manifest.rows

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """[len(indices), S] int64 token ids."""
        size = len(self._batches[0])
        return np.stack([self._batches[i // size][i % size] for i in indices.tolist()]).astype(np.int64)

    def row_length(self, index: int) -> int:
        """Tokens of a row that are not padding: S, or less in the last row."""
        last = index == len(self) - 1
        return self.manifest.last_row_length if last else self.manifest.sequence_length


def ensure_prepared(
    entries: Entries,
    tokenizer: Tokenizer,
    sequence_length: int,
    folder: Path,
    *,
    text_column: str,
    drop_tail: bool,
    processes: int | None,
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
        )
    blocks = PackedBlocks(folder)
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
    wanted: list[tuple[str, object, object]] = [
        ("tokenizer", made.tokenizer_fingerprint, tokenizer.fingerprint),
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


def prepare(
    entries: Entries,
    tokenizer: Tokenizer,
    sequence_length: int,
    folder: Path,
    *,
    text_column: str = "text",
    drop_tail: bool = True,
    processes: int | None = None,
) -> PackedBlocks:
    """Tokenizes and packs all documents into `folder`, renamed into place when it is whole.

    Documents follow each other, each after the tokenizer's own prefix and closed by its end-of-document
    token, and are cut every `sequence_length` tokens: a row may hold the end of one and the beginning of
    the next. Nothing is lost but, with `drop_tail`, a last row that is not full; else it is padded.
    processes: that tokenize; None: one a core. The result does not depend on it.
    Raises DataError for data that is missing, unreadable, or makes no full row.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    sizes = file_sizes(entries)
    workers = processes or os.cpu_count() or 1
    if sizes and sum(sizes.values()) < ALONE_BYTES:
        workers = 1
    packer = _Packer(temporary / BLOCKS, tokenizer, sequence_length)
    pieces = iter_pieces(entries, text_column=text_column)
    with tqdm(total=sum(sizes.values()) or None, unit="B", unit_scale=True, desc=f"prepare {folder.name}") as bar:
        for group, encoded in _encoded(pieces, tokenizer, workers):
            for piece, ids in zip(group, encoded, strict=True):
                packer.add(piece, ids)
                bar.update(piece.read)
            bar.set_postfix(tokens=f"{packer.tokens:,}", refresh=False)
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
        digest=packer.digest.hexdigest(),
    )
    (temporary / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")
    temporary.rename(folder)
    return PackedBlocks(folder)


class _Packer:
    """Cuts the stream of tokens into rows and writes them."""

    def __init__(self, path: Path, tokenizer: Tokenizer, length: int) -> None:
        self.rows = self.tokens = self.documents = 0
        self.digest = hashlib.sha256()
        self._prefix, self._eos, self._length = len(tokenizer.prefix), tokenizer.eos_id, length
        self._rows_a_batch = max(1, BATCH_TOKENS // length)
        self._held: list[np.ndarray] = []
        self._held_tokens = 0
        schema = pa.schema([("input_ids", pa.list_(pa.int32(), length))])
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._sink, schema)

    def add(self, piece: Piece, ids: list[int]) -> None:
        """One piece's ids, which begin with the tokenizer's prefix whether or not a document does."""
        ids = ids if piece.starts else ids[self._prefix :]
        self._push(np.array([*ids, self._eos] if piece.ends else ids, dtype=np.int32))
        self.tokens += len(ids) + piece.ends
        self.documents += piece.ends

    def close(self, *, drop_tail: bool) -> int:
        """Writes what is left; returns how many tokens of the last row are not padding."""
        rest = self._held_tokens % self._length
        if rest and not drop_tail:
            self._hold(np.full(self._length - rest, self._eos, dtype=np.int32))
        self._write(self._held_tokens // self._length)
        self._writer.close()
        self._sink.close()
        return rest if rest and not drop_tail else self._length

    def _push(self, ids: np.ndarray) -> None:
        self._hold(ids)
        while self._held_tokens >= self._rows_a_batch * self._length:
            self._write(self._rows_a_batch)

    def _hold(self, ids: np.ndarray) -> None:
        self._held.append(ids)
        self._held_tokens += len(ids)

    def _write(self, rows: int) -> None:
        held = np.concatenate(self._held) if self._held else np.empty(0, dtype=np.int32)
        full, rest = held[: rows * self._length], held[rows * self._length :]
        self._held, self._held_tokens = [rest], len(rest)
        if rows:
            column = pa.FixedSizeListArray.from_arrays(pa.array(full), self._length)
            self._writer.write_batch(pa.record_batch([column], names=["input_ids"]))
            self.digest.update(full.tobytes())
            self.rows += rows


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
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (tokenizer.name,)) as pool:
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


def _start_worker(name: str) -> None:
    global _worker_tokenizer
    os.putenv("TOKENIZERS_PARALLELISM", "false")  # a process a core is enough
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker_tokenizer = load_tokenizer(name)


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
