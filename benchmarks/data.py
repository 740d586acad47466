"""Tokens per second of preparing text and of loading it, and what share of a training step loading takes.

`python -m benchmarks.data --json OUT [--files FILES --tokenizer T]`: text to packed blocks by one process and by one a
core (text of less than 32 MiB is always prepared by one), then the micro-batches of steps from the memory-mapped
blocks, beside the time of a TED step of a named size on the same device. Without files the text is the source of
Python's standard library, repeated; without a tokenizer a SentencePiece BPE is trained on a part of it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.report import bars, parser_of, publish, table
from benchmarks.shapes import SHAPES, Shape
from benchmarks.step import own_step, prepared
from benchmarks.timing import Step, environment, interleaved_seconds, medians
from ted_ds.data.loader import TrainingRows
from ted_ds.data.packed import PackedBlocks
from ted_ds.data.prepare import prepare
from ted_ds.data.stdlib_corpus import write_stdlib_corpus
from ted_ds.data.tokenizer_training import train_sentencepiece
from ted_ds.data.tokenizers import Tokenizer, load_tokenizer
from ted_ds.data.tokenizing import ALONE_BYTES

TOKENIZER_CHARACTERS = 2_000_000
"""What a tokenizer is trained on."""

LOADED_STEPS = 50
"""Steps whose micro-batches one repeat reads."""


def standard_library(folder: Path, mebibytes: float) -> Path:
    """A JSONL file of about so many MiB: the library's modules in turn, as often as it takes."""
    write_stdlib_corpus(folder / "library")
    lines = (folder / "library" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    path, left = folder / "text.jsonl", int(mebibytes * 2**20)
    with path.open("w", encoding="utf-8") as file:
        while left > 0:
            for line in lines:
                file.write(line)
                left -= len(line.encode())
                if left <= 0:
                    break
    return path


def own_tokenizer(text: Path, folder: Path, vocab: int) -> Tokenizer:
    """A BPE of `vocab` pieces of the beginning of a JSONL file."""
    texts, left = [], TOKENIZER_CHARACTERS
    for line in text.read_text(encoding="utf-8").splitlines():
        texts.append(json.loads(line)["text"])
        left -= len(texts[-1])
        if left <= 0:
            break
    train_sentencepiece(texts, vocab, folder)
    return load_tokenizer(str(folder))


def prepare_rows(
    files: Sequence[str], tokenizer: Tokenizer, shape: Shape, folder: Path, processes: Sequence[int]
) -> list[dict[str, Any]]:
    """A row a number of processes; the blocks stay in `folder`/NUMBER."""
    size = sum(Path(file).stat().st_size for file in files)
    rows = []
    for number in processes:
        start = time.perf_counter()
        blocks = prepare(list(files), tokenizer, shape.sequence, folder / str(number), processes=number)
        seconds = time.perf_counter() - start
        rows.append(
            {
                "what": "prepare",
                "processes": number,
                "tokens": blocks.manifest.tokens,
                "seconds": seconds,
                "tokens_per_s": blocks.manifest.tokens / seconds,
                "mib_per_s": size / 2**20 / seconds,
            }
        )
    return rows


def load_step(blocks: PackedBlocks, shape: Shape, device: torch.device) -> Step:
    """Reads the micro-batches of `LOADED_STEPS` steps, in training's order, onto the device."""
    rows = TrainingRows(blocks, seed=0, global_batch_size=shape.rows, micro_batch_size=shape.rows, rank=0, world_size=1)

    def load() -> None:
        for step in range(LOADED_STEPS):
            for batch in rows.micro_batches(step):
                batch.to(device)

    return load


def draw(figure: Figure, prepared_rows: Sequence[dict[str, Any]], load: float, step: float) -> None:
    """Speed of preparing and loading beside a step's."""
    left, right = figure.subplots(1, 2)
    named = {f"prepare, {row['processes']} processes": row["tokens_per_s"] for row in prepared_rows}
    bars(left, named, title="preparing", unit="tokens/s")
    bars(right, {"load": 1e3 * load, "TED step": 1e3 * step}, title="one step", unit="ms")
    right.set_xscale("log")


def options_of(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--files", nargs="+", metavar="FILES", help="text, JSONL or Parquet")
    parser.add_argument("--tokenizer", help="folder or hub id; default: one is trained")
    parser.add_argument("--mib", type=float, default=48, help="of text, where no files are given")
    parser.add_argument("--vocab", type=int, default=4096, help="of the tokenizer, where none is given")
    parser.add_argument("--size", choices=SHAPES, default="cpu", help="of the step that loading is compared with")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(argv)
    if options.files and not options.tokenizer:
        parser.error("--files needs --tokenizer")
    return options


def measure(options: argparse.Namespace, folder: Path) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """(rows of preparing, seconds of loading and of computing one step)."""
    device, shape = torch.device(options.device), SHAPES[options.size]
    files = options.files or [str(standard_library(folder, options.mib))]
    if options.tokenizer:
        tokenizer = load_tokenizer(options.tokenizer)
    else:
        tokenizer = own_tokenizer(Path(files[0]), folder / "tokenizer", options.vocab)
    many = sum(Path(file).stat().st_size for file in files) >= ALONE_BYTES
    processes = sorted({1, os.cpu_count() or 1} if many else {1})
    rows = prepare_rows(files, tokenizer, shape, folder, processes)
    blocks = PackedBlocks(folder / str(processes[-1]))
    steps: dict[str, Step] = {"load": load_step(blocks, shape, device)}
    if shape.rows > len(blocks):
        raise SystemExit(f"the text makes {len(blocks)} rows, a step of --size {options.size} needs {shape.rows}")
    steps["step"] = own_step(prepared(shape, device, checkpointing=False), "ted")
    seconds = medians(interleaved_seconds(steps, options.repeats, device))
    return rows, {"load": seconds["load"] / LOADED_STEPS, "step": seconds["step"]}


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints, writes."""
    options = options_of(argv)
    with tempfile.TemporaryDirectory() as folder:
        rows, seconds = measure(options, Path(folder))
    shape = SHAPES[options.size]
    share = seconds["load"] / (seconds["load"] + seconds["step"])
    report = {
        "benchmark": "data: preparing text, loading micro-batches, and loading's share of a step",
        "size": options.size,
        "prepare": rows,
        "load_tokens_per_s": shape.tokens / seconds["load"],
        "load_seconds": seconds["load"],
        "step_seconds": seconds["step"],
        "load_share_of_step": share,
        "environment": environment(torch.device(options.device), "data", sys.argv[1:] if argv is None else argv),
    }
    speeds = [
        *rows,
        {
            "what": "load",
            "tokens": shape.tokens,
            "seconds": seconds["load"],
            "tokens_per_s": report["load_tokens_per_s"],
        },
        {
            "what": "TED step",
            "tokens": shape.tokens,
            "seconds": seconds["step"],
            "tokens_per_s": shape.tokens / seconds["step"],
        },
    ]
    columns = ("what", "processes", "tokens", "seconds", "tokens_per_s", "mib_per_s")
    text = f"loading takes {100 * share:.2g}% of a step"
    publish(
        report, [table(speeds, columns), text], lambda f: draw(f, rows, seconds["load"], seconds["step"]), options.json
    )


if __name__ == "__main__":
    main()
