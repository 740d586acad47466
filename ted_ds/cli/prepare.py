"""`ted-ds prepare`: text into packed blocks, or labelled rows into token ids, ahead of a run and without a model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from ted_ds.config.data_section import DataConfig
from ted_ds.config.load import load_config, load_section
from ted_ds.config.tasks import TASKS
from ted_ds.errors import ConfigError


def main(argv: Sequence[str]) -> int:
    """Packs what a recipe, or FILES and `--data.*` options, name; returns the exit code."""
    parser = argparse.ArgumentParser("ted-ds prepare", description=main.__doc__, allow_abbrev=False)
    parser.add_argument(
        "files", nargs="*", metavar="FILES", help="text, JSONL, CSV, TSV or Parquet files, in place of data.train"
    )
    parser.add_argument("--config", type=Path, help="the recipe whose data section to prepare")
    parser.add_argument(
        "--train-tokenizer", type=int, metavar="V", help="train a SentencePiece model of V pieces first"
    )
    own, overrides = _parted(argv)
    arguments = parser.parse_args(own)
    if arguments.files:
        overrides.append(f"--data.train={json.dumps(arguments.files, ensure_ascii=False)}")
    if arguments.train_tokenizer is not None:
        overrides.append(f"--data.train_tokenizer={arguments.train_tokenizer}")
    if arguments.config:
        run = load_config(arguments.config, overrides)
        data, spec, folder = run.data, run.spec, run.prepared_folder
    else:
        data, spec = load_section(DataConfig, overrides), TASKS["causal-lm"]
        if data.prepared is None:
            raise ConfigError("ted-ds prepare without --config needs --data.prepared=FOLDER to write to")
        folder = data.prepared

    from ted_ds.tasks.registry import TASK_CLASSES, ensure_tokenizer

    for split, rows in TASK_CLASSES[spec.kind].prepare(data, spec, ensure_tokenizer(data, spec), folder).items():
        print(f"{folder / split}: {rows.described()}")
    return 0


def _parted(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(what argparse is to see, overrides), for it would take `--data.labels=[a, b]` for a file."""
    own: list[str] = []
    overrides: list[str] = []
    words = iter(argv)
    for word in words:
        key, equals, _ = word.partition("=")
        if not word.startswith("--") or key in ("--config", "--train-tokenizer", "--help"):
            own.append(word)
        else:
            overrides += [word] if equals else [word, *islice(words, 1)]
    return own, overrides
