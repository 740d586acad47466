"""The fused ops against plain torch, Liger's chunked losses, and what the machine can do at most.

    python -m benchmarks.ops --json OUT [--tokens 1024 ... --width 384 ... --vocab 50257 ...]

* CE + KL from hidden states, forward and backward: plain autograd (`naive`), ted_ds (`fused`), its four GEMMs alone
  (`gemms`), and Liger: one chunked loss for both (`liger ce+kl`), or that for KL and its fused linear CE for CE
  (`liger ce, kl`); ted_ds again with every other row ignored. All with gradients of hidden states and weight.
* the layer loss of one pair, [N, D] through a filter against [N, F], F = D: plain autograd, ted_ds.

Time is by medians of interleaved repeats, memory the peak beyond the inputs. The fractions are of what a large
matrix product and a large copy reached in the same run: of the GEMMs' FLOPs, and of the bytes that an op must move if
logits (or filtered states) do not stay in cache. The top-level ratios are CE + KL's at the first size.
About 1 minute on 2 CPU cores.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from benchmarks import liger
from benchmarks.report import bars, parser_of, publish, table
from benchmarks.timing import Step, environment, interleaved_seconds, medians, step_peak_mib
from ted_ds.batch import IGNORED
from ted_ds.ops import Head, linear_cross_entropy_kl, linear_squared_error

TEMPERATURE = 2.0


@dataclass(frozen=True)
class Sizes:
    tokens: int
    width: int
    vocab: int
    dtype: str
    device: str


@dataclass(frozen=True)
class Inputs:
    """Student: leaves; teacher: constants."""

    hidden_s: torch.Tensor
    weight_s: torch.Tensor
    hidden_t: torch.Tensor
    weight_t: torch.Tensor
    targets: torch.Tensor

    def clear_gradients(self) -> None:
        self.hidden_s.grad = self.weight_s.grad = None


def make_inputs(sizes: Sizes) -> Inputs:
    torch.manual_seed(0)
    options: dict[str, Any] = {"device": sizes.device, "dtype": getattr(torch, sizes.dtype)}

    def pair() -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.randn(sizes.tokens, sizes.width, **options)
        return hidden, torch.randn(sizes.vocab, sizes.width, **options) * sizes.width**-0.5

    (hidden_s, weight_s), (hidden_t, weight_t) = pair(), pair()
    targets = torch.randint(0, sizes.vocab, (sizes.tokens,), device=sizes.device)
    return Inputs(hidden_s.requires_grad_(), weight_s.requires_grad_(), hidden_t, weight_t, targets)


def naive_step(sizes: Sizes) -> Step:
    """What a training script would write: whole logits, torch's own losses, autograd."""
    x = make_inputs(sizes)

    def step() -> None:
        x.clear_gradients()
        z_s = x.hidden_s @ x.weight_s.T
        with torch.no_grad():
            z_t = x.hidden_t @ x.weight_t.T
        cross_entropy = F.cross_entropy(z_s.float(), x.targets)
        log_q = F.log_softmax(z_s.float() / TEMPERATURE, dim=-1)
        p = F.softmax(z_t.float() / TEMPERATURE, dim=-1)
        divergence = F.kl_div(log_q, p, reduction="batchmean") * TEMPERATURE**2
        (cross_entropy + divergence).backward()

    return step


def fused_step(sizes: Sizes, chunk_tokens: int | None = None, *, ignored: slice = slice(0)) -> Step:
    x = make_inputs(sizes)
    x.targets[ignored] = IGNORED

    def step() -> None:
        x.clear_gradients()
        total, _, _ = linear_cross_entropy_kl(
            x.hidden_s,
            Head(x.weight_s, None),
            x.targets,
            x.hidden_t,
            Head(x.weight_t, None),
            pred_scale=1 / sizes.tokens,
            kl_scale=1 / sizes.tokens,
            temperature=TEMPERATURE,
            chunk_tokens=chunk_tokens,
        )
        total.backward()

    return step


def gemms_step(sizes: Sizes) -> Step:
    """The four GEMMs whole, into buffers that exist: what no implementation without recomputation undercuts."""
    x = make_inputs(sizes)
    weight_s, hidden_s = x.weight_s.detach(), x.hidden_s.detach()
    z_s, z_t = (hidden_s.new_empty(sizes.tokens, sizes.vocab) for _ in range(2))
    d_hidden, d_weight = torch.empty_like(hidden_s), torch.empty_like(weight_s)

    def step() -> None:
        torch.mm(hidden_s, weight_s.T, out=z_s)
        torch.mm(x.hidden_t, x.weight_t.T, out=z_t)
        torch.mm(z_s, weight_s, out=d_hidden)
        torch.mm(z_s.T, hidden_s, out=d_weight)
        z_s.fill_(0.0)  # products of products of products would overflow, and odd numbers may be slow

    return step


def liger_step(sizes: Sizes, name: str) -> Step:
    x = make_inputs(sizes)
    loss = liger.LOSSES[name]
    if sizes.device == "cpu":  # its first call imports much, which is not the op's memory
        loss(make_inputs(replace(sizes, tokens=8, vocab=64)), TEMPERATURE).backward()

    def step() -> None:
        x.clear_gradients()
        loss(x, TEMPERATURE).backward()

    return step


@dataclass(frozen=True)
class Pair:
    """One pair of the layer loss: a filter's leaves, its hidden states' leaf, a constant target."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    target: torch.Tensor

    def clear_gradients(self) -> None:
        self.hidden.grad = self.weight.grad = self.bias.grad = None


def make_pair(sizes: Sizes) -> Pair:
    torch.manual_seed(0)
    options: dict[str, Any] = {"device": sizes.device, "dtype": getattr(torch, sizes.dtype)}
    hidden, target = (torch.randn(sizes.tokens, sizes.width, **options) for _ in range(2))
    weight = torch.randn(sizes.width, sizes.width, **options) * sizes.width**-0.5
    bias = torch.zeros(sizes.width, **options)
    return Pair(hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), target)


def naive_layer_step(sizes: Sizes) -> Step:
    """A linear module and torch's mean squared error in float32."""
    x = make_pair(sizes)

    def step() -> None:
        x.clear_gradients()
        F.mse_loss(F.linear(x.hidden, x.weight, x.bias).float(), x.target.float(), reduction="sum").backward()

    return step


def fused_layer_step(sizes: Sizes) -> Step:
    x = make_pair(sizes)

    def step() -> None:
        x.clear_gradients()
        linear_squared_error(x.hidden, x.weight, x.bias, x.target).backward()

    return step


@dataclass(frozen=True)
class Limits:
    """What one large matrix product and one large copy reached."""

    flops_per_s: float
    bytes_per_s: float


def measure_limits(device: torch.device, dtype: str, repeats: int) -> Limits:
    size, count = (8192, 1 << 29) if device.type == "cuda" else (2048, 1 << 26)
    a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    source = torch.ones(count, device=device, dtype=torch.uint8)
    out, copy = torch.empty_like(a), torch.empty_like(source)
    steps: dict[str, Step] = {"gemm": lambda: torch.mm(a, b, out=out), "copy": lambda: copy.copy_(source)}
    seconds = {name: min(values) for name, values in interleaved_seconds(steps, max(3, repeats), device).items()}
    return Limits(2 * size**3 / seconds["gemm"], 2 * count / seconds["copy"])


def cost(op: str, sizes: Sizes) -> tuple[int, int]:
    """(FLOPs of the GEMMs, bytes that must move): logits are written by two GEMMs, read, the student's gradient is
    written, and read by two GEMMs: 7 N V; an op's weights are read or written 5 times, 3 times a filter's.
    """
    n, d, v = sizes.tokens, sizes.width, sizes.vocab
    size = getattr(torch, sizes.dtype).itemsize
    if op == CE_KL:
        return 4 * 2 * n * d * v, size * (7 * n * v + 5 * v * d)
    return 3 * 2 * n * d * d, size * (4 * n * d + 3 * n * d + 3 * d * d)


CE_KL, LAYER = "ce+kl", "layer loss"
HALF = "fused, half of the rows ignored"
Implementations = dict[str, Callable[[Sizes], Step]]


def implementations(op: str, chunk_tokens: int | None) -> Implementations:
    if op == LAYER:
        return {"naive": naive_layer_step, "fused": fused_layer_step}
    ligers = {name: partial(liger_step, name=name) for name in liger.LOSSES}
    fused = partial(fused_step, chunk_tokens=chunk_tokens)
    half = partial(fused, ignored=slice(None, None, 2))
    return {"naive": naive_step, "fused": fused, HALF: half, "gemms": gemms_step, **ligers}


def measure(op: str, sizes: Sizes, repeats: int, limits: Limits, chosen: Implementations) -> list[dict[str, Any]]:
    """A row an implementation; one that cannot run here says why."""
    device = torch.device(sizes.device)
    common = {"op": op, "tokens": sizes.tokens, "width": sizes.width, "vocab": sizes.vocab if op == CE_KL else None}
    skipped = {name: liger.why_not(name, device) for name in chosen if name in liger.LOSSES}
    memory: dict[str, float] = {}
    for name, make in chosen.items():
        if skipped.get(name) or name == "gemms":
            continue
        try:
            memory[name] = step_peak_mib(make, sizes, device=device)
        except torch.OutOfMemoryError:
            skipped[name] = "out of memory"
    if device.type == "cuda":
        torch.compiler.reset()  # Liger's is compiled for each size, and after eight of them torch would not compile it
    able = {name: make for name, make in chosen.items() if not skipped.get(name)}
    seconds = medians(interleaved_seconds({name: make(sizes) for name, make in able.items()}, repeats, device))
    flops, moved = cost(op, sizes)
    rows = []
    for name in chosen:
        row = common | {"implementation": name}
        if name in able:
            row |= {
                "ms": 1e3 * seconds[name],
                "extra_mib": memory.get(name),
                "gemm_fraction": flops / seconds[name] / limits.flops_per_s,
                "bandwidth_fraction": moved / seconds[name] / limits.bytes_per_s,
            }
        rows.append(row | {"skipped": skipped.get(name)})
    return rows


def ratios_of(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What `make bench-check` holds, of one op's rows at one size."""
    ms = {row["implementation"]: row.get("ms") for row in rows}
    mib = {row["implementation"]: row.get("extra_mib") for row in rows}
    pairs = {
        "time_ratio_fused_to_naive": (ms["fused"], ms.get("naive")),
        "time_ratio_fused_to_gemms": (ms["fused"], ms.get("gemms")),
        "time_ratio_half_ignored_to_fused": (ms.get(HALF), ms["fused"]),
        "time_ratio_gemms_to_naive": (ms.get("gemms"), ms.get("naive")),
        "extra_memory_ratio_fused_to_naive": (mib["fused"], mib.get("naive")),
    }
    return {name: round(a / b, 3) for name, (a, b) in pairs.items() if a is not None and b}


def draw(figure: Figure, rows: Sequence[dict[str, Any]]) -> None:
    """Time and memory relative to `fused`, over the sizes of CE + KL."""
    left, right = figure.subplots(1, 2)
    shown = [row for row in rows if row["op"] == CE_KL and not row["skipped"]]
    first = {key: shown[0][key] for key in ("tokens", "width", "vocab")}
    here = [row for row in shown if all(row[key] == value for key, value in first.items())]
    title = ", ".join(f"{key} {value}" for key, value in first.items())
    bars(left, {row["implementation"]: row["ms"] for row in here}, title=f"CE + KL, {title}", unit="ms")
    memory = {row["implementation"]: row["extra_mib"] for row in here if row["extra_mib"] is not None}
    bars(right, memory, title="extra peak memory", unit="MiB")


def options_of(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", help="N; default 1024, on CUDA 8192")
    parser.add_argument("--width", type=int, nargs="+", help="D; default 384, on CUDA 4096")
    parser.add_argument("--vocab", type=int, nargs="+", help="V; default 50257, on CUDA 128256")
    parser.add_argument("--chunk-tokens", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", help="default float32, on CUDA bfloat16", choices=["float32", "bfloat16", "float64"])
    parser.add_argument("--gate", action="store_true", help="only what `make bench-check` compares: CE + KL")
    options = parser.parse_args(argv)
    cuda = options.device == "cuda"
    options.tokens = options.tokens or [8192 if cuda else 1024]
    options.width = options.width or [4096 if cuda else 384]
    options.vocab = options.vocab or [128256 if cuda else 50257]
    options.dtype = options.dtype or ("bfloat16" if cuda else "float32")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = options_of(argv)
    device = torch.device(options.device)
    sizes = [
        Sizes(n, d, v, options.dtype, options.device)
        for n, d, v in product(options.tokens, options.width, options.vocab)
    ]
    limits = measure_limits(device, options.dtype, options.repeats)
    chosen = implementations(CE_KL, options.chunk_tokens)
    if options.gate:
        chosen = {name: make for name, make in chosen.items() if name not in {*liger.LOSSES, HALF}}
    rows = [row for size in sizes for row in measure(CE_KL, size, options.repeats, limits, chosen)]
    ratios = ratios_of(rows[: len(chosen)])
    if not options.gate:
        layer = {(size.tokens, size.width): size for size in sizes}.values()
        both = implementations(LAYER, None)
        rows += [row for size in layer for row in measure(LAYER, size, options.repeats, limits, both)]
    report = {
        "benchmark": "ops: fused against plain torch and Liger, forward and backward",
        "sizes": asdict(sizes[0]) | {"chunk_tokens": options.chunk_tokens, "temperature": TEMPERATURE},
        **ratios,
        "limits": asdict(limits),
        "ops": rows,
        "repeats": options.repeats,
        "environment": environment(device, "ops", sys.argv[1:] if argv is None else argv),
    }
    columns = ["op", "tokens", "width", "vocab", "implementation"]
    columns += ["ms", "extra_mib", "gemm_fraction", "bandwidth_fraction", "skipped"]
    text = f"limits: {limits.flops_per_s / 1e12:.3g} TFLOP/s, {limits.bytes_per_s / 1e9:.3g} GB/s"
    lines = "\n".join(f"{name}: {value}" for name, value in ratios.items())
    publish(report, [table(rows, columns), text, lines], lambda figure: draw(figure, rows), options.json)


if __name__ == "__main__":
    main()
