"""CE + KL from hidden states, forward and backward, against plain autograd and against its GEMMs alone.

    python -m benchmarks.ops --json benchmarks/results/ops.json [--tokens 1024 --width 384 --vocab 50257]

About 30 s on 2 CPU cores.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.timing import Step, environment, extra_peak_mib, interleaved_seconds, medians, write_report
from ted_ds.ops import Head, linear_cross_entropy_kl

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


def fused_step(sizes: Sizes, chunk_tokens: int | None = None) -> Step:
    x = make_inputs(sizes)

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


def measure(sizes: Sizes, repeats: int, chunk_tokens: int | None) -> dict[str, Any]:
    device = torch.device(sizes.device)
    steps = {"naive": naive_step(sizes), "fused": fused_step(sizes, chunk_tokens), "gemms": gemms_step(sizes)}
    seconds = medians(interleaved_seconds(steps, repeats, device))
    steps.clear()
    memory = {
        "naive": extra_peak_mib(naive_step, sizes, device=device),
        "fused": extra_peak_mib(fused_step, sizes, chunk_tokens, device=device),
    }
    return {
        "benchmark": "ops: CE + KL from hidden states, forward and backward",
        "sizes": asdict(sizes) | {"chunk_tokens": chunk_tokens, "temperature": TEMPERATURE},
        "time_ratio_fused_to_naive": round(seconds["fused"] / seconds["naive"], 3),
        "time_ratio_fused_to_gemms": round(seconds["fused"] / seconds["gemms"], 3),
        "time_ratio_gemms_to_naive": round(seconds["gemms"] / seconds["naive"], 3),
        "extra_memory_ratio_fused_to_naive": round(memory["fused"] / memory["naive"], 3),
        "median_ms": {name: round(1e3 * value, 1) for name, value in seconds.items()},
        "extra_peak_mib": {name: round(value, 1) for name, value in memory.items()},
        "repeats": repeats,
        "environment": environment(device),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the report here")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--chunk-tokens", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float64"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    sizes = Sizes(options.tokens, options.width, options.vocab, options.dtype, options.device)
    write_report(measure(sizes, options.repeats, options.chunk_tokens), options.json)


if __name__ == "__main__":
    main()
