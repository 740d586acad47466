"""The GEMMs of the logit losses: an LM head, how many tokens go through it at a time, its products into buffers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ted_ds.ops import dispatch
from ted_ds.ops.logit_rows import Form

_CPU_CHUNK_BYTES = 112 << 20
"""Bytes that a chunk's buffers may take together, as long as `_MIN_CHUNK_TOKENS` fit."""

_CUDA_CHUNK_SHARE = 1 / 64
"""The same on CUDA as a share of the device's memory: 1.2 GiB of 80. Of all of it, not of what is free: a resumed run
must cut the chunks that it cut before, or its sums round differently."""

_GEMM_TILE = 128
"""CUDA chunks are a multiple of it: tokens that a GEMM's block of threads works on."""

_ROW_ALIGNMENT = 64
"""Elements; 128 bytes of bfloat16, what GEMMs and 16-byte loads want of a row's start."""

_EVEN_COLUMNS = 8
"""What cuBLAS wants every size of a half-precision GEMM to be a multiple of. On an H200 the four GEMMs of 8192 tokens,
D 2048, took 28 ms at V 151936 and at 151665, of rows that begin at multiples of 64, more than four times that."""

_MIN_CHUNK_TOKENS = 256
"""Every chunk passes over d_weight once: C / 4 FLOPs a byte, whatever V and D. On 2 cores with V 50257 and
D 384 the four GEMMs in chunks of 128, 256, 512 tokens took 1.26, 1.13, 1.03 of the whole ones; fresh pages
for larger buffers cost what larger GEMMs save, so the whole loss took 0.84, 0.78, 0.84 s."""


@dataclass(frozen=True)
class Head:
    """An LM head: logits = softcap * tanh(scale * (h W^T + b) / softcap), or scale * (h W^T + b) uncapped.

    weight: [V, D]; bias: [V] or None; softcap: Gemma 2's `final_logit_softcapping`.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    softcap: float | None = None
    scale: float = 1.0


def default_chunk_tokens(tokens: int, vocab: int, like: torch.Tensor, *, sides: int, widened: bool = False) -> int:
    """Equal chunks, at least two, as few as the bytes of a chunk allow.

    sides: GEMM outputs of a chunk. widened: whether torch, not the kernel, works on a side; off the CPU, where a chunk
    is no row block, it takes two of them again in float32. On CUDA a chunk has at least two rows for each
    multiprocessor, which the kernel works on at a time, and is a multiple of `_GEMM_TILE`.
    """
    row_bytes = vocab * (like.element_size() * sides + 8 * (widened and dispatch.on_gpu(like)))
    limit, least, tile = _CPU_CHUNK_BYTES, _MIN_CHUNK_TOKENS, 1
    if dispatch.on_gpu(like):
        device = torch.cuda.get_device_properties(like.device)
        limit = int(device.total_memory * _CUDA_CHUNK_SHARE)
        least, tile = max(least, 2 * device.multi_processor_count), _GEMM_TILE
    chunks = max(2, -(-tokens // max(least, limit // row_bytes)))
    return max(1, -(-tokens // chunks // tile) * tile)


def logits_buffer(like: torch.Tensor, chunk: int, vocab: int) -> torch.Tensor:
    """[C, V]; for a kernel rows begin every `_ROW_ALIGNMENT` elements, and it may write up to there."""
    apart = -(-vocab // _ROW_ALIGNMENT) * _ROW_ALIGNMENT if dispatch.has_kernel(like) else vocab
    return like.new_empty(chunk, apart)[:, :vocab]


def gemm_logits(hidden: torch.Tensor, head: Head, form: Form, out: torch.Tensor) -> torch.Tensor:
    """gemm_scale * (hidden W^T + b) into the first rows of `out` [C, V]; V may be below the head's."""
    out, scale = out[: len(hidden)], form.gemm_scale
    for columns in even_parts(out):
        part, weight = out[:, columns], head.weight[columns]
        if head.bias is None:
            part.addmm_(hidden, weight.t(), beta=0.0, alpha=scale)
        else:
            torch.addmm(head.bias[columns], hidden, weight.t(), beta=scale, alpha=scale, out=part)
    return out


def even_parts(logits: torch.Tensor) -> list[slice]:
    """The columns of [C, V] that a GEMM works on at a time: on CUDA the last V % `_EVEN_COLUMNS` go by themselves."""
    vocab = logits.shape[1]
    even = vocab - vocab % _EVEN_COLUMNS if dispatch.has_kernel(logits) else vocab
    return [part for part in (slice(0, even), slice(even, vocab)) if part.stop > part.start]


def chunks_of(tokens: int, chunk_tokens: int) -> Iterator[slice]:
    for start in range(0, max(1, tokens), max(1, chunk_tokens)):
        yield slice(start, min(tokens, start + chunk_tokens))


def common_vocab(head_s: Head, head_t: Head | None, vocab_size: int | None) -> int:
    smallest = min(len(head.weight) for head in (head_s, head_t) if head is not None)
    if vocab_size is not None and vocab_size > smallest:
        raise ValueError(f"vocab_size {vocab_size} exceeds the smaller LM head's {smallest} rows")
    return smallest if vocab_size is None else vocab_size


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, first: bool) -> None:
    """total (+)= a @ b; if total is wider than a and b, the sum is not rounded to their dtype.

    CUDA's GEMM adds half-precision products to a float32 total itself (pytorch#167931); elsewhere the product is
    made, and rounded, once a chunk.
    """
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=0.0 if first else 1.0)
    elif dispatch.on_gpu(total):
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=0.0 if first else 1.0, out=total)
    elif first:
        total.copy_(a @ b)
    else:
        total.add_(a @ b)
