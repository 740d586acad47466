"""The four GEMMs of the logit losses where V is no multiple of 8: what makes them slow, and what helps.

`python -m benchmarks.gemms --json OUT [--vocab 50257 151665]`: seconds of each, over what is done about V:

* `odd rows`: contiguous [N, V] logits, every row begins at another alignment,
* `rows of 8`, `rows of 64`: rows begin at multiples of 8 or 64 elements, V as it is,
* `split`: rows of 64, V rounded down to a multiple of 8, and the rest by itself (what ted_ds does),
* `padded`: weights copied into [V rounded up to 8, D] first (the copy is timed too).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.report import bars, parser_of, publish, table
from benchmarks.timing import environment, interleaved_seconds, medians

Gemms = dict[str, Callable[[], Any]]


def up(vocab: int, multiple: int) -> int:
    """V rounded up."""
    return -(-vocab // multiple) * multiple


def gemms(hidden: torch.Tensor, weight: torch.Tensor, apart: int, parts: Sequence[int]) -> Gemms:
    """The student's three; the teacher's is the first again.

    apart: elements from a row of logits to the next; parts: where the columns end that go by themselves.
    """
    (tokens, width), vocab = hidden.shape, len(weight)
    logits = torch.zeros(tokens, apart, device=hidden.device, dtype=hidden.dtype)[:, :vocab]
    d_hidden = torch.empty_like(hidden)
    d_weight = torch.empty(vocab, width, device=hidden.device, dtype=torch.float32 if hidden.is_cuda else hidden.dtype)
    columns = [slice(start, end) for start, end in zip([0, *parts[:-1]], parts, strict=True)]

    def forward() -> None:
        for part in columns:
            logits[:, part].addmm_(hidden, weight[part].t(), beta=0.0)

    def backward_hidden() -> None:
        for part in columns:
            d_hidden.addmm_(logits[:, part], weight[part], beta=float(part.start > 0))

    def backward_weight() -> None:
        for part in columns:
            total, a = d_weight[part], logits[:, part].t()
            if hidden.is_cuda:
                torch.addmm(total, a, hidden, out_dtype=total.dtype, beta=0.0, out=total)
            else:
                torch.mm(a, hidden, out=total)

    return {"logits": forward, "d_hidden": backward_hidden, "d_weight": backward_weight}


def padded_copy(weight: torch.Tensor, into: torch.Tensor) -> None:
    """The weights, with rows of zeros behind them."""
    into[: len(weight)].copy_(weight)


def measure(options: argparse.Namespace, vocab: int) -> list[dict[str, Any]]:
    """A row a variant."""
    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype)
    hidden = torch.randn(options.tokens, options.width, device=device, dtype=dtype)
    weight = torch.randn(vocab, options.width, device=device, dtype=dtype) * options.width**-0.5
    even = vocab - vocab % 8
    wider = torch.zeros(up(vocab, 8), options.width, device=device, dtype=dtype)
    variants: dict[str, tuple[torch.Tensor, int, list[int]]] = {
        "odd rows": (weight, vocab, [vocab]),
        "rows of 8": (weight, up(vocab, 8), [vocab]),
        "rows of 64": (weight, up(vocab, 64), [vocab]),
        "split": (weight, up(vocab, 64), [even, vocab] if even < vocab else [vocab]),
        "padded": (wider, up(vocab, 64), [len(wider)]),
    }
    rows = []
    for name, (own, apart, parts) in variants.items():
        steps = gemms(hidden, own, apart, parts)
        if name == "padded":
            steps["copy"] = partial(padded_copy, weight, wider)
        ms = {step: 1e3 * s for step, s in medians(interleaved_seconds(steps, options.repeats, device)).items()}
        all_four = 2 * ms["logits"] + ms["d_hidden"] + ms["d_weight"] + 2 * ms.get("copy", 0.0)
        rows.append({"vocab": vocab, "variant": name, **ms, "four_ms": all_four})
        print(rows[-1], flush=True)
        del steps
    return rows


def draw(figure: Figure, rows: Sequence[dict[str, Any]]) -> None:
    """All four GEMMs of each variant."""
    shown = {f"{row['vocab']} {row['variant']}": row["four_ms"] for row in rows}
    bars(figure.subplots(), shown, title="the four GEMMs", unit="ms")


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints, writes after each V."""
    parser = parser_of(__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--vocab", type=int, nargs="+", default=[50257, 151665])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default float32, on CUDA bfloat16")
    options = parser.parse_args(argv)
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    rows: list[dict[str, Any]] = []
    for vocab in options.vocab:
        rows += measure(options, vocab)
        report = {
            "benchmark": "gemms: the logit losses' four GEMMs at a V that is no multiple of 8",
            "sizes": {"tokens": options.tokens, "width": options.width, "dtype": options.dtype},
            "gemms": rows,
            "environment": environment(torch.device(options.device), "gemms", sys.argv[1:] if argv is None else argv),
        }
        columns = ("vocab", "variant", "logits", "d_hidden", "d_weight", "copy", "four_ms")
        publish(report, [table(rows, columns)], partial(draw, rows=rows), options.json)


if __name__ == "__main__":
    main()
