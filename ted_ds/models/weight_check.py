"""Whether a model's files hold every weight that it has, known from their headers, before anything is loaded.

transformers draws a weight at random that it does not find, and says so in a log that nobody reads.
"""

from __future__ import annotations

from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from ted_ds.config.tasks import KINDS, Kind
from ted_ds.errors import ModelError, load_failure
from ted_ds.models.loading import load_config, meta_model
from ted_ds.models.task_head import AUTO_CLASSES
from ted_ds.models.weight_files import damaged_file, stored_tensors

OTHER_HEADS = ("SequenceClassification", "TokenClassification", "QuestionAnswering", "RewardModel")
"""Ends of the names of classes whose models were trained for something else than to predict text."""


def check_weights(role: str, path: str, kind: Kind, *, trust_remote_code: bool = False, new_head: bool = False) -> None:
    """Raises ModelError if files of the model lack a weight, are damaged, or hold one of another shape; on one rank.

    Names are matched by transformers itself on the meta device, with all that it renames and converts; of the weights
    only two tensors are ever read, if they should be one (tied) and the files have both.
    new_head: whether all outside the backbone, and a pooler in it, will be made anew and may be missing or of another
    shape.
    """
    # first, for its message about a family without such a head
    meta_model(path, kind, trust_remote_code=trust_remote_code)
    config = load_config(path, trust_remote_code)
    try:
        model, found = AUTO_CLASSES[kind].from_pretrained(
            path,
            config=config,
            device_map="meta",
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, ImportError, EOFError, SafetensorError, UnpicklingError) as error:
        reason = damaged_file(path) or load_failure(error)
        raise ModelError(f"the {role} {path} could not be loaded: {reason}") from error

    def needed(name: str) -> bool:
        return not new_head or (name.startswith(f"{model.base_model_prefix}.") and ".pooler." not in name)

    missing = sorted(filter(needed, found["missing_keys"]))
    if missing:
        raise ModelError(_missing(role, path, kind, model, missing, sorted(found["unexpected_keys"])))
    for name, there, wanted in sorted(found["mismatched_keys"]):
        if needed(name):
            raise ModelError(
                f"the {role} {path}: {name} is {tuple(there)} in its files, its config.json makes it {tuple(wanted)}: "
                "give the config that the weights were saved with"
            )
    classes = getattr(config, "architectures", None) or ["unknown"]
    if KINDS[kind].lm_head and classes[0].endswith(OTHER_HEADS):
        raise ModelError(
            f"the {role} {path} is a {classes[0]}, trained for something else than to predict text: give the causal LM"
        )
    _check_tied(role, path, model)


def _missing(role: str, path: str, kind: Kind, model: PreTrainedModel, names: list[str], others: list[str]) -> str:
    total = len(model.state_dict())
    there = f"; they have {others[0]} ({len(others)} that the model has no place for)" if others else ""
    lacking = f"the files of the {role} {path} lack {names[0]} ({len(names)} of {total} weights){there}"
    if not KINDS[kind].lm_head and not any(name.startswith(f"{model.base_model_prefix}.") for name in names):
        return (
            f"{lacking}: it was not fine-tuned on such a task; give one that was, or start a student from it by "
            "student.pretrained and student.init_from_pretrained: true"
        )
    return f"{lacking}: give the whole {model.config.model_type} as its save_pretrained wrote it"


def _check_tied(role: str, path: str, model: PreTrainedModel) -> None:
    """ZeRO-3 ties what the config says is tied, and plain loading does not if the files have two different tensors."""
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    both = [pair for pair in ties.items() if model.get_parameter(pair[0]) is not model.get_parameter(pair[1])]
    if not both:
        return
    tensors = stored_tensors(path, {name for pair in both for name in pair})
    for target, source in both:
        if target in tensors and source in tensors and not torch.equal(tensors[target], tensors[source]):
            raise ModelError(
                f"the {role} {path} has two different tensors for {source} and {target}, which its config.json says "
                "are one: set tie_word_embeddings to false there if both are meant, or delete one of them"
            )
