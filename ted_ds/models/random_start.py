"""Stage 0 without a teacher: a student of a config, with random weights."""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedModel

from ted_ds.config.tasks import KINDS, Kind
from ted_ds.errors import ModelError, in_a_line
from ted_ds.models.structure import find_blocks, find_structure
from ted_ds.models.task_head import AUTO_CLASSES
from ted_ds.models.tiny import tiny_model


def write_random(
    given: Mapping[str, Any], defaults: Mapping[str, Any], kind: Kind, folder: Path, seed: int, trust_remote_code: bool
) -> None:
    """Saves a model of a config, drawn under `seed`, in `folder`.

    given: what the recipe says; defaults: what it may leave out. Raises ModelError if transformers does not take it, a
    field is misspelt, or such a model does not run.
    """
    try:
        model_config = AutoConfig.for_model(**{**defaults, **given})
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AUTO_CLASSES[kind].from_config(model_config, trust_remote_code=trust_remote_code)
    except (ValueError, StrictDataclassError) as error:
        what = "a causal LM" if KINDS[kind].lm_head else f"a model for {kind}"
        raise ModelError(f"student.init.config is not {what} of transformers: {in_a_line(error)}") from error
    _refuse_misspelt(given, model)
    (find_structure if KINDS[kind].lm_head else find_blocks)(model)
    try:
        tiny_model(model)
    except ModelError as error:
        raise ModelError(f"student.init.config: {error}") from error
    model.save_pretrained(folder)


def _refuse_misspelt(given: Mapping[str, Any], model: PreTrainedModel) -> None:
    """Raises ModelError for a field that nothing reads, and that is spelt nearly as one that the family has.

    transformers takes any field. Some that a config does not list are read all the same: by the model's code, or to
    make other fields of (`rope_theta`).
    """
    family = model.config.model_type
    blank = AutoConfig.for_model(family)
    known = {name for name in {*vars(blank), *blank.to_dict(), *blank.attribute_map} if not name.startswith("_")}
    source = inspect.getsource(sys.modules[type(model).__module__])
    for name in given.keys() - known - {"model_type"}:
        if hasattr(blank, name) or name in source:
            continue
        if AutoConfig.for_model(family, **{name: given[name]}).to_dict() | {name: 0} != blank.to_dict() | {name: 0}:
            continue
        if close := difflib.get_close_matches(name, known, n=1, cutoff=0.7):
            raise ModelError(f"student.init.config.{name}: a {family} has no such field; did you mean {close[0]}?")
