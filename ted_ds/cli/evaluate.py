"""`ted-ds evaluate MODEL --data FILES [--task T | --lambada FILE]`: scores of a Hugging Face folder."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ted_ds.cli.common import printed
from ted_ds.config.tasks import KINDS, TASKS
from ted_ds.errors import NotFiniteError


def main(argv: Sequence[str]) -> int:
    """Scores a model in one process, prints JSON; returns the exit code."""
    parser = argparse.ArgumentParser("ted-ds evaluate", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("model", help="a Hugging Face folder or hub id")
    tasks = [name for name, spec in TASKS.items() if not spec.missing_keys]
    parser.add_argument("--task", choices=tasks, default="causal-lm")
    parser.add_argument("--data", nargs="+", default=[], metavar="FILES", help="held-out text, or the task's files")
    parser.add_argument("--lambada", metavar="FILE", help="LAMBADA: lines of plain text, or rows with `text`")
    parser.add_argument("--tokenizer", help="if the model's folder has none")
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
        arguments.sequence_length = KINDS[TASKS[arguments.task].kind].sequence_length
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
    from ted_ds.models.fit import check_fit
    from ted_ds.models.loading import load_model
    from ted_ds.tasks.registry import make_task

    world, kind, trusted = init_world(), TASKS[arguments.task].kind, arguments.trust_remote_code
    with _plain_model(arguments.model) as path:
        model: Any = load_model(path, kind, dtype=arguments.dtype, trust_remote_code=trusted)
    model.to(world.device).eval()
    tokenizer = load_tokenizer(arguments.tokenizer or arguments.model, trust_remote_code=trusted)
    length = arguments.sequence_length if arguments.data else 1
    check_fit("model", arguments.model, model, kind, tokenizer, length, trust_remote_code=trusted)
    results: dict[str, Any] = {"model": arguments.model}
    if arguments.data:
        task = make_task(TASKS[arguments.task], world, tokenizer)
        results |= task.score_files(
            model,
            tokenizer,
            arguments.data,
            world,
            length=length,
            stride=arguments.doc_stride,
            batch_size=arguments.batch_size,
        )
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
