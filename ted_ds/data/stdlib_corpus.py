"""The quickstart's corpus: documentation and source of Python's standard library, there with every interpreter."""

from __future__ import annotations

import hashlib
import json
import sysconfig
from pathlib import Path

from ted_ds.job.files import new_folder

HELD_OUT_SHARE = 0.04
LARGEST_CHARACTERS = 24_000
"""Longer modules (tables of codecs, generated lexers) are cut here, so that none of them weighs too much."""

LEFT_OUT = ("test", "tests", "idlelib", "site-packages", "dist-packages", "ensurepip", "pydoc_data", "encodings")
"""Folders that are not the library itself, or hold generated tables, so alike that one held out is one learnt."""


def write_stdlib_corpus(folder: Path) -> dict[str, int]:
    """Writes train.jsonl and validation.jsonl, one module a line under `text`; returns their documents and characters.

    Which module is held out is decided by its name, so no module is in both and every machine splits alike.
    """
    counts = {f"{split}_{unit}": 0 for split in ("train", "validation") for unit in ("documents", "characters")}
    library = Path(sysconfig.get_path("stdlib"))
    with (
        new_folder(folder) as new,
        (new / "train.jsonl").open("w") as train,
        (new / "validation.jsonl").open("w") as validation,
    ):
        for path in sorted(library.rglob("*.py")):
            name = path.relative_to(library)
            if set(name.parts) & set(LEFT_OUT):
                continue
            text = path.read_text(encoding="utf-8", errors="ignore")[:LARGEST_CHARACTERS]
            if not text.strip():
                continue
            held_out = int(hashlib.sha256(str(name).encode()).hexdigest(), 16) % 1000 < 1000 * HELD_OUT_SHARE
            split, file = ("validation", validation) if held_out else ("train", train)
            file.write(json.dumps({"text": text}) + "\n")
            counts[f"{split}_documents"] += 1
            counts[f"{split}_characters"] += len(text)
    return counts
