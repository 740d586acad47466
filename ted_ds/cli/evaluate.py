"""`ted-ds evaluate MODEL --data FILES [--task T | --lambada FILE]`: scores of a Hugging Face folder."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ted_ds.cli.common import printed
from ted_ds.config.tasks import TASKS
from ted_ds.errors import NotFiniteError

OWN_COLUMNS = ("classification", "regression")
"""Tasks whose columns a recipe names."""


def main(argv: Sequence[str]) -> int:
    """Scores a model in one process, prints JSON; returns the exit code."""
    parser = argparse.ArgumentParser("ted-ds evaluate", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("model", help="a Hugging Face folder or hub id")
    parser.add_argument("--task", choices=[t for t in TASKS if t not in OWN_COLUMNS], default="causal-lm")
    parser.add_argument("--data", nargs="+", default=[], metavar="FILES", help="held-out text, or the task's files")
    parser.add_argument("--lambada", metavar="FILE", help="LAMBADA: lines of plain text, or rows with `text`")
    parser.add_argument("--tokenizer", help="where the model's folder has none")
    parser.add_argument(
        "--sequence-length", type=_positive, help="tokens a row (default 1024; tasks 256, questions 384)"
    )
    parser.add_argument("--doc-stride", type=_positive, default=128, help="of questions' windows (default 128)")
    parser.add_argument("--batch-size", type=_positive, default=4, help="rows a forward (default 4)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the model or tokenizer"
    )
    arguments = parser.parse_args(argv)
    if not arguments.data and not arguments.lambada:
        parser.error("nothing to evaluate: give --data FILES, --lambada FILE, or both")
    if arguments.lambada and arguments.task != "causal-lm":
        parser.error(f"--lambada is for causal LMs, --task is {arguments.task}")
    if arguments.sequence_length is None:
        arguments.sequence_length = {"causal-lm": 1024, "question-answering": 384}.get(TASKS[arguments.task].kind, 256)
    printed(lambda: _named(arguments))
    return 0


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def _named(arguments: argparse.Namespace) -> dict[str, Any]:
    try:
        return _evaluate(arguments)
    except NotFiniteError as error:
        raise NotFiniteError(f"model {arguments.model}: {error}: there is no score, see to its weights") from error


def _evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    from ted_ds.data.bad_rows import BadRows
    from ted_ds.data.sources import iter_pieces
    from ted_ds.data.tokenizers import load_tokenizer
    from ted_ds.evaluation.lambada import lambada
    from ted_ds.job.world import init_world
    from ted_ds.models.loading import load_model
    from ted_ds.pipeline.models import check_fit

    world, kind, trusted = init_world(), TASKS[arguments.task].kind, arguments.trust_remote_code
    with _plain_model(arguments.model) as path:
        model: Any = load_model(path, kind, dtype=arguments.dtype, trust_remote_code=trusted)
    model.to(world.device).eval()
    tokenizer = load_tokenizer(arguments.tokenizer or arguments.model, trust_remote_code=trusted)
    length = arguments.sequence_length if arguments.data else 1
    check_fit("model", arguments.model, model, kind, tokenizer, length, trust_remote_code=trusted)
    results: dict[str, Any] = {"model": arguments.model}
    if arguments.data:
        score = _perplexity if kind == "causal-lm" else _task_scores
        results |= score(arguments, model, tokenizer, world)
    if arguments.lambada:
        with BadRows(skip=None) as bad:
            passages = iter_pieces([arguments.lambada], text_column="text", by_line=True, bad=bad)
            texts = [piece.text for piece in passages]
        scores = lambada(model, tokenizer, texts, batch_size=arguments.batch_size, device=world.device)
        results |= {f"lambada_{name}": value for name, value in scores.items()}
    return results


@contextmanager
def _plain_model(name_or_path: str) -> Iterator[str]:
    """A model as transformers loads it; one in the layout of the paper's authors is taken apart for the while."""
    from ted_ds.models.published import is_published, unpack_published

    if not is_published(name_or_path):
        yield name_or_path
        return
    with tempfile.TemporaryDirectory() as folder:
        unpack_published(name_or_path, Path(folder) / "plain")
        yield str(Path(folder) / "plain/model")


def _perplexity(arguments: argparse.Namespace, model: Any, tokenizer: Any, world: Any) -> dict[str, Any]:
    from ted_ds.data.documents import iter_documents
    from ted_ds.evaluation.perplexity import document_perplexity
    from ted_ds.job.world import logger

    logger.info("each document is scored by itself (a run's validation_perplexity: in rows, after other documents)")
    return document_perplexity(
        model,
        tokenizer,
        iter_documents(arguments.data, tokenizer),
        length=arguments.sequence_length,
        batch_size=arguments.batch_size,
        device=world.device,
    )


def _task_scores(arguments: argparse.Namespace, model: Any, tokenizer: Any, world: Any) -> dict[str, float]:
    from ted_ds.data.buckets import ScoringRows
    from ted_ds.data.encoding import ensure_encoded
    from ted_ds.evaluation.outputs import collect_outputs
    from ted_ds.pipeline.example_data import make_task, score_outputs
    from ted_ds.pipeline.models import check_ids, vocabulary_rows

    spec, length = TASKS[arguments.task], arguments.sequence_length
    model.config.pad_token_id = tokenizer.pad_id
    with tempfile.TemporaryDirectory() as folder:
        split = Path(folder) / "rows"
        options = {"max_length": length, "stride": arguments.doc_stride, "training": False, "skip_bad_rows": None}
        rows = ensure_encoded(arguments.data, spec, tokenizer, split, **options)
        check_ids(tokenizer, vocabulary_rows(model, spec.kind), {"held-out": rows})
        batches = ScoringRows(rows, batch_size=arguments.batch_size, rank=world.rank, world_size=world.size)
        outputs = collect_outputs(_scorer(model, make_task(spec, world)), batches, len(rows), world)
        return score_outputs(spec, rows, outputs)


def _scorer(model: Any, task: Any) -> Any:
    from torch import nn

    from ted_ds.config.sections import LossConfig
    from ted_ds.distill.distillation_model import DistillationModel

    return DistillationModel(model, nn.ModuleList(), LossConfig(kl_alpha=0.0, mse_alpha=0.0), task=task)
