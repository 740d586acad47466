"""Tiny random models with task heads, of every supported family, loud enough that a forgotten part shows."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from ted_ds.config.tasks import Kind
from ted_ds.models.task_head import AUTO_CLASSES

ENCODERS = ("deberta-v2", "bert", "roberta", "xlm-roberta", "electra", "modernbert")
CLASSIFIERS = (*ENCODERS, "llama", "qwen2")


def encoder_config(family: str, *, blocks: int = 2, width: int = 16, heads: int = 2, vocab: int = 61) -> dict[str, Any]:
    """A config of `family` as a dict, dropout 0."""
    sizes: dict[str, Any] = {"model_type": family, "vocab_size": vocab, "num_hidden_layers": blocks}
    sizes |= {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": 3 * width}
    sizes |= {"max_position_embeddings": 66, "pad_token_id": 0}
    if family in ("llama", "qwen2"):
        return sizes | {"num_key_value_heads": heads, "bos_token_id": 1, "eos_token_id": 2}
    if family == "modernbert":
        ends = {"cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
        return sizes | ends | {"local_attention": 8, "global_attn_every_n_layers": 2, "classifier_pooling": "mean"}
    sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if family == "deberta-v2":
        relative = {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]}
        shared = {"share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False}
        return sizes | relative | shared | {"type_vocab_size": 0}
    if family == "electra":
        return sizes | {"embedding_size": width // 2, "type_vocab_size": 2}
    return sizes | {"type_vocab_size": 2 if family == "bert" else 1}


def tiny_encoder(
    family: str, kind: Kind = "classification", *, seed: int = 0, num_labels: int = 3, **sizes: Any
) -> PreTrainedModel:
    """A float32 model in eval mode, the same for the same seed."""
    torch.manual_seed(seed)
    outputs = {} if kind == "question-answering" else {"num_labels": num_labels}
    config = AutoConfig.for_model(**encoder_config(family, **sizes), **outputs)
    model = AUTO_CLASSES[kind].from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 1.0 / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()
