"""The quickstart's corpus: documentation and source of Python's standard library, there with every interpreter."""

from __future__ import annotations

import hashlib
import json
import shutil
import sysconfig
from pathlib import Path
from typing import TextIO

HELD_OUT_SHARE = 0.04
LARGEST_CHARACTERS = 24_000
"""Longer modules (tables of codecs, generated lexers) are cut here, so that none of them weighs too much."""

LEFT_OUT = ("test", "tests", "idlelib", "site-packages", "dist-packages", "ensurepip", "pydoc_data", "encodings")
"""Folders that are not the library itself, or hold generated tables, so alike that one held out is one learnt."""


def write_stdlib_corpus(folder: Path) -> dict[str, int]:
    """Writes train.jsonl and validation.jsonl, one module a line under `text`; returns their documents and characters.

    Which module is held out is decided by its name, so no module is in both and every machine splits alike.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    counts = {f"{split}_{unit}": 0 for split in ("train", "validation") for unit in ("documents", "characters")}
    library = Path(sysconfig.get_path("stdlib"))
    with (temporary / "train.jsonl").open("w") as train, (temporary / "validation.jsonl").open("w") as validation:
        for path in sorted(library.rglob("*.py")):
            name = path.relative_to(library)
            if set(name.parts) & set(LEFT_OUT):
                continue
            text = path.read_text(encoding="utf-8", errors="ignore")[:LARGEST_CHARACTERS]
            if not text.strip():
                continue
            held_out = int(hashlib.sha256(str(name).encode()).hexdigest(), 16) % 1000 < 1000 * HELD_OUT_SHARE
            split, file = ("validation", validation) if held_out else ("train", train)
            _write(file, text)
            counts[f"{split}_documents"] += 1
            counts[f"{split}_characters"] += len(text)
    temporary.rename(folder)
    return counts


def _write(file: TextIO, text: str) -> None:
    file.write(json.dumps({"text": text}) + "\n")
