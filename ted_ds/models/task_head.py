"""Stage 0 of a task: a pre-trained model with a fresh head, or the labels of one that is made at random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig

from ted_ds.config.tasks import KINDS, Kind, TaskSpec
from ted_ds.data.tokenizers import Tokenizer
from ted_ds.errors import ModelError, load_failure
from ted_ds.job.files import new_folder

AUTO_CLASSES: dict[Kind, Any] = {kind: getattr(transformers, traits.auto_class) for kind, traits in KINDS.items()}
"""Kind of task -> the class of transformers that puts its head on a model."""


def label_fields(spec: TaskSpec) -> dict[str, Any]:
    """What a config says of a task's outputs; nothing of an LM head's."""
    if (outputs := KINDS[spec.kind].outputs) is not None:
        return {"num_labels": outputs}
    names = dict(enumerate(spec.labels))
    return {"num_labels": len(names), "id2label": names, "label2id": {n: i for i, n in names.items()}} if names else {}


def start_from_pretrained(
    pretrained: str,
    spec: TaskSpec,
    output_dir: Path,
    *,
    tokenizer: Tokenizer,
    seed: int,
    trust_remote_code: bool,
) -> None:
    """Writes a pre-trained model with a head of its task, drawn under `seed`, as a Hugging Face folder; on one rank.

    All outside the backbone is new, also if a model brings a masked LM's head or another task's. Written once and
    not drawn as the model is loaded, so that every method and number of ranks starts alike.
    Raises ModelError if the model cannot be loaded with such a head.
    """
    try:
        config = AutoConfig.from_pretrained(pretrained, trust_remote_code=trust_remote_code, **label_fields(spec))
        config.pad_token_id = tokenizer.pad_id
        options = {"dtype": torch.float32, "trust_remote_code": trust_remote_code}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            fresh = AUTO_CLASSES[spec.kind].from_config(config, **options)
            # sizes differ if the model has a head of another task
            model = AUTO_CLASSES[spec.kind].from_pretrained(
                pretrained, config=config, ignore_mismatched_sizes=True, **options
            )
    except (OSError, ValueError) as error:
        raise ModelError(f"student.pretrained {pretrained!r} cannot be loaded: {load_failure(error)}") from error
    own = model.state_dict()
    with torch.no_grad():
        for name, tensor in fresh.state_dict().items():
            if not name.startswith(f"{model.base_model_prefix}."):
                own[name].copy_(tensor)
    with new_folder(output_dir) as folder:
        model.save_pretrained(folder)
        tokenizer.save(folder)
