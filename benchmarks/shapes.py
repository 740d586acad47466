"""Named sizes of teacher and student, and random Llama models of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from ted_ds.batch import IGNORED, Batch


@dataclass(frozen=True)
class Side:
    """One model: blocks, width D, FFN units, query heads, key-value heads."""

    blocks: int
    width: int
    units: int
    heads: int
    kv_heads: int


@dataclass(frozen=True)
class Shape:
    """Teacher and student, and the micro-batch that they see: rows of `sequence` tokens.

    tied: the LM head is the embedding.
    """

    teacher: Side
    student: Side
    vocab: int
    rows: int
    sequence: int
    dtype: str = "bfloat16"
    tied: bool = True

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.rows * self.sequence


SHAPES = {
    # the blocks of 1.5b, so narrow that the host's work is all there is
    "host": Shape(Side(28, 64, 128, 2, 2), Side(10, 64, 128, 2, 2), 256, 1, 16, "float32"),
    "tiny": Shape(Side(4, 64, 256, 4, 4), Side(2, 32, 128, 2, 2), 512, 2, 64, "float32", tied=False),
    "cpu": Shape(Side(12, 384, 1536, 6, 6), Side(6, 384, 1536, 6, 6), 50257, 2, 512, "float32", tied=False),
    # Qwen 2.5 0.5B, and half of its blocks
    "0.5b": Shape(Side(24, 896, 4864, 14, 2), Side(12, 896, 4864, 14, 2), 151936, 2, 1024),
    # Qwen 2.5 1.5B (1.54e9 parameters), and 10 of its 28 blocks (0.70e9)
    "1.5b": Shape(Side(28, 1536, 8960, 12, 2), Side(10, 1536, 8960, 12, 2), 151936, 2, 1024),
    # Llama 3.2 3B and 1B
    "3b": Shape(Side(28, 3072, 8192, 24, 8), Side(16, 2048, 8192, 32, 8), 128256, 2, 1024),
}


def llama_config(side: Side, shape: Shape) -> LlamaConfig:
    """The config of one side."""
    return LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=side.width,
        intermediate_size=side.units,
        num_hidden_layers=side.blocks,
        num_attention_heads=side.heads,
        num_key_value_heads=side.kv_heads,
        max_position_embeddings=shape.sequence,
        tie_word_embeddings=shape.tied,
    )


def random_model(side: Side, shape: Shape, device: torch.device) -> PreTrainedModel:
    """Random weights of the shape's dtype, the same for the same side, made where they will live."""
    torch.manual_seed(0)
    with device:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            llama_config(side, shape), dtype=getattr(torch, shape.dtype)
        )
    return model


def random_batch(shape: Shape, device: torch.device, seed: int = 0) -> Batch:
    """Rows of random ids; a row's last position predicts nothing."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(shape.vocab, (shape.rows, shape.sequence), generator=draw).to(device)
    targets = torch.full_like(ids, IGNORED)
    targets[:, :-1] = ids[:, 1:]
    return Batch(ids, targets)


def parameters_of(side: Side, shape: Shape) -> dict[str, int]:
    """What a report says of one side."""
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(llama_config(side, shape)).parameters())
    return {"blocks": side.blocks, "width": side.width, "units": side.units, "parameters": count}
