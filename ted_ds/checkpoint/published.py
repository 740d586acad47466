"""Checkpoints in the layout of the paper's authors (arXiv 2210.01351, github cliang1453/task-aware-distillation).

One file of theirs holds a DeBERTa-v2, its filters (`deberta.encoder.layer.I.filter.*`) and, after Stage I, the
filters' heads (`filter_head.K.*`, `filter_pooler.K.dense.*`). transformers knows neither their model type nor their
classes, so that such a folder is taken apart before it is used, and put together to be written.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import save_file

from ted_ds.errors import CheckpointError
from ted_ds.models.filters import FilterPlan
from ted_ds.models.weight_files import INDEX, PICKLED, SINGLE, WeightReader, copy_companions, find_file

MODEL_TYPE, PLAIN_TYPE = "ted-deberta-v2", "deberta-v2"
OPTIONS = ("filter_interval", "filter_output_dim", "filter_nonlinear", "filter_disabled", "train_filters")
_FILTER = re.compile(r"deberta\.encoder\.layer\.(\d+)\.filter\.(?:(0|2)\.)?(weight|bias)")
_HEAD = ("filter_head.", "filter_pooler.")


@dataclass(frozen=True)
class PublishedModel:
    """Such a checkpoint, taken apart.

    config: of the plain transformers model. options: what their config says of filters, see `OPTIONS`.
    weights: the plain model's tensors. plan: the filters' shape, None where there are none. filters: their tensors
    under the names of `FilterPlan.build()`. heads: Stage I's, under their names; empty after Stage II.
    """

    config: dict[str, Any]
    options: dict[str, Any]
    weights: dict[str, torch.Tensor]
    plan: FilterPlan | None
    filters: dict[str, torch.Tensor]
    heads: dict[str, torch.Tensor]


def is_published(name_or_path: str) -> bool:
    """Whether a folder or hub model has the authors' layout."""
    path = find_file(name_or_path, "config.json")
    if path is None:
        return False
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("model_type") == MODEL_TYPE
    except (ValueError, AttributeError):
        return False  # whoever loads it as a plain model says what is wrong with it


def read_published(name_or_path: str) -> PublishedModel:
    """A checkpoint from a folder or hub id, safetensors or pickled (`weights_only=True`), in host memory.

    Raises CheckpointError where there are no weights, or the filters are not those that its config describes.
    """
    path = find_file(name_or_path, "config.json")
    if path is None:
        raise CheckpointError(f"{name_or_path} has no config.json: give a folder that save_pretrained wrote")
    theirs = json.loads(path.read_text(encoding="utf-8"))
    if theirs.get("model_type") != MODEL_TYPE:
        raise CheckpointError(
            f"{name_or_path} has model_type {theirs.get('model_type')!r}, not {MODEL_TYPE!r}: load it as a plain model"
        )
    tensors = _read_tensors(name_or_path)
    config = {key: value for key, value in theirs.items() if key not in OPTIONS}
    config["model_type"] = PLAIN_TYPE
    if "architectures" in theirs:
        config["architectures"] = [name.removeprefix("TED") for name in theirs["architectures"] or ()]
    options = {key: theirs[key] for key in OPTIONS if key in theirs}
    heads = {name: t for name, t in tensors.items() if name.startswith(_HEAD)}
    own = {name: t for name, t in tensors.items() if _FILTER.fullmatch(name)}
    weights = {name: t for name, t in tensors.items() if name not in own and name not in heads}
    plan = _plan(name_or_path, config, options, own) if own else None
    filters = {_our_name(name, plan): t for name, t in own.items()} if plan else {}
    return PublishedModel(config, options, weights, plan, filters, heads)


def write_published(model: PublishedModel, folder: Path) -> None:
    """Writes the authors' layout: their config.json and model.safetensors; renamed into place."""
    theirs = {**model.config, **model.options, "model_type": MODEL_TYPE}
    if "architectures" in model.config:
        theirs["architectures"] = [f"TED{name}" for name in model.config["architectures"]]
    tensors = {**model.weights, **model.heads}
    for name, tensor in model.filters.items():
        assert model.plan is not None
        tensors[_their_name(name, model.plan)] = tensor
    temporary = _temporary(folder)
    (temporary / "config.json").write_text(json.dumps(theirs, indent=2) + "\n", encoding="utf-8")
    save_file({name: t.contiguous() for name, t in tensors.items()}, temporary / SINGLE, metadata={"format": "pt"})
    temporary.rename(folder)


def unpack_published(name_or_path: str, folder: Path) -> None:
    """Writes folder/model, a plain Hugging Face folder, and folder/filters as Stage I leaves them; renamed into place.

    Without filters in the checkpoint there is no folder/filters.
    """
    model = read_published(name_or_path)
    temporary = _temporary(folder)
    for part in ("model", "filters")[: 2 if model.plan else 1]:
        (temporary / part).mkdir()
    plain = {name: t for name, t in model.weights.items() if not name.endswith("position_ids")}
    save_file(plain, temporary / "model" / SINGLE, metadata={"format": "pt"})
    (temporary / "model/config.json").write_text(json.dumps(model.config, indent=2) + "\n", encoding="utf-8")
    copy_companions(name_or_path, temporary / "model")
    if model.plan is not None:
        save_file(model.filters, temporary / "filters/filters.safetensors")
        card = {"plan": asdict(model.plan), "source": name_or_path}
        (temporary / "filters/filters.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    temporary.rename(folder)


def _read_tensors(name_or_path: str) -> dict[str, torch.Tensor]:
    if any(find_file(name_or_path, name) for name in (SINGLE, INDEX)):
        return WeightReader(name_or_path).read_all()
    path = find_file(name_or_path, PICKLED[0])
    if path is None:
        raise CheckpointError(f"{name_or_path} has no weights: expected {SINGLE}, {INDEX} or {PICKLED[0]}")
    try:
        tensors: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, OSError, EOFError) as error:
        raise CheckpointError(
            f"{path} cannot be read as weights alone ({str(error).splitlines()[0]}): save it anew as {SINGLE}"
        ) from error
    return tensors


def _plan(
    name_or_path: str, config: dict[str, Any], options: dict[str, Any], own: dict[str, torch.Tensor]
) -> FilterPlan:
    """The filters' shape from their tensors, checked against the config."""

    def fail(what: str) -> CheckpointError:
        return CheckpointError(f"{name_or_path}: {what}: its config.json and its weights do not belong together")

    matches = {name: _FILTER.fullmatch(name) for name in own}
    blocks = tuple(sorted({int(m[1]) for m in matches.values() if m}))
    nonlinear = any(m[2] is not None for m in matches.values() if m)
    width = int(config["hidden_size"])
    output_dim = int(options.get("filter_output_dim") or width)
    plan = FilterPlan(blocks, width, output_dim, nonlinear, config.get("hidden_act", "gelu"))
    interval = int(options.get("filter_interval") or 1)
    due = tuple(i for i in range(int(config["num_hidden_layers"])) if (i + 1) % interval == 0)
    if blocks != due:
        raise fail(f"filters are on layers {list(blocks)}, filter_interval {interval} means {list(due)}")
    if "filter_nonlinear" in options and bool(options["filter_nonlinear"]) != nonlinear:
        raise fail(f"filter_nonlinear is {options['filter_nonlinear']}, its filters are {'not ' * (not nonlinear)}so")
    wanted = {_their_name(name, plan): tuple(t.shape) for name, t in plan.build().state_dict().items()}
    found = {name: tuple(t.shape) for name, t in own.items()}
    if wanted != found:
        name = min(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))
        raise fail(f"{name} has shape {found.get(name)}, expected {wanted.get(name)}")
    return plan


def _our_name(theirs: str, plan: FilterPlan) -> str:
    match = _FILTER.fullmatch(theirs)
    assert match is not None
    inner = "inner_" if match[2] == "0" else ""
    return f"{plan.blocks.index(int(match[1]))}.{inner}{match[3]}"


def _their_name(ours: str, plan: FilterPlan) -> str:
    k, _, part = ours.partition(".")
    stem, _, leaf = part.rpartition("_")
    place = {"inner": "0.", "": "2." if plan.nonlinear else ""}[stem]
    return f"deberta.encoder.layer.{plan.blocks[int(k)]}.filter.{place}{leaf}"


def _temporary(folder: Path) -> Path:
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary
