"""Text -> token ids, by as many processes as there are cores."""

from __future__ import annotations

import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from multiprocessing import get_context, parent_process
from typing import TypeVar

from tqdm import tqdm

from ted_ds.data.bad_rows import BadRows
from ted_ds.data.manifests import Entries, file_sizes
from ted_ds.data.sources import Piece, iter_pieces
from ted_ds.data.tokenizers import Tokenizer, load_tokenizer
from ted_ds.errors import DataError

Item = TypeVar("Item")

TASK_CHARACTERS = 1 << 20
"""Text handed to a process at a time: tens of milliseconds of work, so that handing it over costs little."""

ALONE_BYTES = 32 << 20
"""Corpora smaller than this are tokenized in this process: starting others takes longer."""


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


def _encoded(
    pieces: Iterator[Piece], tokenizer: Tokenizer, workers: int
) -> Iterator[tuple[list[Piece], list[list[int]]]]:
    """Groups of pieces with their ids, in order; reading goes on while `workers` processes tokenize."""
    groups = grouped(pieces, lambda piece: len(piece.text), TASK_CHARACTERS)
    first = list(islice(groups, 2))
    groups = chain(first, groups)
    if workers == 1 or len(first) == 1:  # a hub's data set may be small, too
        for group in groups:
            yield group, tokenizer.encode_batch([piece.text for piece in group])
        return
    # spawned, not forked: the parent may hold threads and a process group
    with ProcessPoolExecutor(
        workers, get_context("spawn"), _start_worker, (tokenizer.name, tokenizer.trust_remote_code)
    ) as pool:
        try:
            submitted = ((group, pool.submit(_encode_group, [piece.text for piece in group])) for group in groups)
            waiting = deque(islice(submitted, 2 * workers))
            while waiting:
                group, ids = waiting.popleft()
                waiting.extend(islice(submitted, 1))
                yield group, ids.result()
        except BrokenProcessPool as error:
            raise DataError(
                "a tokenizing process died, most likely for lack of memory: set data.processes to less"
            ) from error


def grouped(items: Iterable[Item], size: Callable[[Item], int], enough: int) -> Iterator[list[Item]]:
    """Consecutive items, together of size `enough` or a little more; the last ones possibly of less."""
    group: list[Item] = []
    total = 0
    for item in items:
        group.append(item)
        total += size(item)
        if total >= enough:
            yield group
            group, total = [], 0
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
