"""Documents -> packed blocks of token ids, with a manifest that later runs check."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ted_ds.data.bad_rows import BadRows
from ted_ds.data.manifests import Entries, check_prepared, entry_names, file_sizes, write_manifest
from ted_ds.data.packed import BLOCKS, Manifest, PackedBlocks, Packer
from ted_ds.data.tokenizers import Tokenizer
from ted_ds.data.tokenizing import tokenized
from ted_ds.errors import DataError
from ted_ds.job.files import missing, new_folder


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
    """The packed blocks in `folder`: all documents, tokenized and packed now if it does not exist.

    Documents follow each other, each after the tokenizer's own prefix and closed by its end-of-document
    token, and are cut every `sequence_length` tokens: a row may hold the end of one and the beginning of
    the next. If prefix and end are one token (OPT), it stands once between two documents, as in the data of such
    models. Nothing is lost but, with `drop_tail`, a last row that is not full; else it is padded.
    processes: that tokenize; None: one a core. The result does not depend on it. skip_bad_rows: see `BadRows`.
    Raises DataError for data that is missing, unreadable, or makes no full row, and for a folder that was made of
    other data, by another tokenizer, or at another length.
    """
    asked = {
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "prefix": tuple(tokenizer.prefix),
        "sequence_length": sequence_length,
        "text_column": text_column,
        "entries": entry_names(entries),
    }
    with missing(folder) as absent:
        if absent:
            with new_folder(folder) as temporary:
                _write(temporary, entries, tokenizer, asked, drop_tail, processes, skip_bad_rows)
    blocks = PackedBlocks(folder)
    if blocks.manifest.prefix is None:  # of a version that did not write it
        del asked["prefix"]
    check_prepared(folder, blocks.manifest, asked, entries, skip_bad_rows=skip_bad_rows)
    return blocks


def _write(
    folder: Path,
    entries: Entries,
    tokenizer: Tokenizer,
    asked: dict[str, Any],
    drop_tail: bool,
    processes: int | None,
    skip_bad_rows: bool,
) -> None:
    sizes, column, length = file_sizes(entries), asked["text_column"], asked["sequence_length"]
    packer = Packer(folder / BLOCKS, tokenizer, length, held_out=not drop_tail)
    what = f"prepare {folder.stem}"
    with BadRows(skip=skip_bad_rows) as bad:
        for piece, ids in tokenized(entries, tokenizer, bad, text_column=column, processes=processes, what=what):
            packer.add(piece, ids)
    if bad.count and not packer.tokens:
        raise bad.nothing_left()
    last_row_length = packer.close(drop_tail=drop_tail)
    if not packer.rows:
        raise DataError(
            f"data {', '.join(asked['entries'])} has {packer.tokens} tokens, less than one row of "
            f"data.sequence_length ({length}): give more data, or shorter rows"
        )
    manifest = Manifest(
        **asked,
        tokenizer=tokenizer.name,
        rows=packer.rows,
        last_row_length=last_row_length,
        tokens=packer.tokens,
        documents=packer.documents,
        sources=sizes,
        digest=packer.digest.hexdigest(),
        largest_id=packer.largest_id,
        words=None if packer.text is None else packer.text.words,
        bytes=None if packer.text is None else packer.text.bytes,
        left_out=bad.count,
    )
    write_manifest(folder, manifest)
