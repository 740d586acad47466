"""`ted-ds evaluate MODEL --data FILES [--lambada FILE]`: perplexity and LAMBADA of a Hugging Face folder."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ted_ds.cli.common import printed


def main(argv: Sequence[str]) -> int:
    """Scores a causal LM in one process, prints JSON; returns the exit code."""
    parser = argparse.ArgumentParser("ted-ds evaluate", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("model", help="a Hugging Face folder or hub id")
    parser.add_argument("--data", nargs="+", default=[], metavar="FILES", help="held-out text, JSONL or Parquet")
    parser.add_argument("--lambada", metavar="FILE", help="LAMBADA as JSONL with `text`")
    parser.add_argument("--tokenizer", help="where the model's folder has none")
    parser.add_argument("--sequence-length", type=int, default=1024, help="tokens a block (default 1024)")
    parser.add_argument("--batch-size", type=int, default=4, help="blocks a forward (default 4)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args(argv)
    if not arguments.data and not arguments.lambada:
        parser.error("nothing to evaluate: give --data FILES, --lambada FILE, or both")
    printed(lambda: _evaluate(arguments))
    return 0


def _evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    from ted_ds.data.sources import iter_pieces
    from ted_ds.data.tokenizers import load_tokenizer
    from ted_ds.distributed import init_world
    from ted_ds.engine.loading import load_causal_lm
    from ted_ds.evaluation.lambada import lambada
    from ted_ds.stages.models import check_fit

    world = init_world()
    model: Any = load_causal_lm(arguments.model, dtype=arguments.dtype)
    model.to(world.device).eval()
    tokenizer = load_tokenizer(arguments.tokenizer or arguments.model)
    check_fit("model", arguments.model, model, tokenizer, arguments.sequence_length if arguments.data else 1)
    results: dict[str, Any] = {"model": arguments.model}
    if arguments.data:
        results |= _perplexity(arguments, model, tokenizer, world)
    if arguments.lambada:
        texts = [piece.text for piece in iter_pieces([arguments.lambada], text_column="text")]
        scores = lambada(model, tokenizer, texts, batch_size=arguments.batch_size, device=world.device)
        results |= {f"lambada_{name}": value for name, value in scores.items()}
    return results


def _perplexity(arguments: argparse.Namespace, model: Any, tokenizer: Any, world: Any) -> dict[str, float]:
    from torch import nn

    from ted_ds.data.loader import EvaluationRows
    from ted_ds.data.prepare import prepare
    from ted_ds.distill.objective import DistillationModel, LossWeights
    from ted_ds.evaluation.perplexity import held_out_perplexity

    scorer = DistillationModel(model, nn.ModuleList(), LossWeights(0.0, 0.0), vocab_size=tokenizer.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        blocks = prepare(arguments.data, tokenizer, arguments.sequence_length, Path(folder) / "packed", drop_tail=False)
        rows = EvaluationRows(blocks, batch_size=arguments.batch_size, rank=world.rank, world_size=world.size)
        scores = held_out_perplexity(scorer, rows, world)
    return {name.removeprefix("validation_"): value for name, value in scores.items()}
