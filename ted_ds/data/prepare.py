"""Documents -> packed blocks of token ids, with a manifest that later runs check."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

from ted_ds.data.bad_rows import BadRows
from ted_ds.data.manifests import (
    MANIFEST,
    Entries,
    entry_names,
    file_sizes,
    refuse_differences,
    refuse_left_out,
)
from ted_ds.data.packed import BLOCKS, Manifest, PackedBlocks, Packer
from ted_ds.data.tokenizers import Tokenizer
from ted_ds.data.tokenizing import tokenized
from ted_ds.errors import DataError


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
    """Raises DataError if `blocks` were made of other data, by another tokenizer, or at another length."""
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
    the next. If prefix and end are one token (OPT), it stands once between two documents, as in the data of such
    models. Nothing is lost but, with `drop_tail`, a last row that is not full; else it is padded.
    processes: that tokenize; None: one a core. The result does not depend on it. skip_bad_rows: see `BadRows`.
    Raises DataError for data that is missing, unreadable, or makes no full row.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    sizes = file_sizes(entries)
    packer = Packer(temporary / BLOCKS, tokenizer, sequence_length, held_out=not drop_tail)
    what = f"prepare {folder.name}"
    with BadRows(skip=skip_bad_rows) as bad:
        for piece, ids in tokenized(entries, tokenizer, bad, text_column=text_column, processes=processes, what=what):
            packer.add(piece, ids)
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
        words=None if packer.text is None else packer.text.words,
        bytes=None if packer.text is None else packer.text.bytes,
        left_out=bad.count,
        digest=packer.digest.hexdigest(),
    )
    (temporary / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")
    temporary.rename(folder)
    return PackedBlocks(folder)
