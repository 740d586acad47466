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
from safetensors import SafetensorError
from safetensors.torch import save_file

from ted_ds.errors import CheckpointError
from ted_ds.models.filters import FilterPlan
from ted_ds.models.weight_files import INDEX, PICKLED, SINGLE, WeightReader, copy_companions, find_file

MODEL_TYPE, PLAIN_TYPE = "ted-deberta-v2", "deberta-v2"
OPTIONS = {
    "filter_interval": 1,
    "filter_output_dim": None,
    "filter_nonlinear": False,
    "filter_disabled": False,
    "train_filters": False,
}
"""What their config says of filters, with the defaults of its class (configuration_ted_deberta_v2.py)."""

_FILTER = re.compile(r"deberta\.encoder\.layer\.(\d+)\.filter\.(.+)")
_PARTS = {
    False: {"weight": "weight", "bias": "bias"},
    True: {"inner_weight": "0.weight", "inner_bias": "0.bias", "weight": "2.weight", "bias": "2.bias"},
}
"""Nonlinear or not -> our name of a filter's tensor -> theirs; their nonlinear filter is an nn.Sequential."""

_HEAD = ("filter_head.", "filter_pooler.")


@dataclass(frozen=True)
class PublishedModel:
    """Such a checkpoint, taken apart.

    config: of the plain transformers model. options: what their config says of filters, see `OPTIONS`.
    weights: the plain model's tensors. plan: the filters' shape, None if there are none. filters: their tensors
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
    path = _config_file(name_or_path)
    if path is None:
        return False
    try:
        return bool(json.loads(path.read_text(encoding="utf-8")).get("model_type") == MODEL_TYPE)
    except (ValueError, AttributeError):
        return False  # whoever loads it as a plain model says what is wrong with it


def read_published(name_or_path: str) -> PublishedModel:
    """A checkpoint from a folder or hub id, safetensors or pickled (`weights_only=True`), sharded or not, on the CPU.

    Raises CheckpointError if config or weights are missing or unreadable, or the filters are not those that the
    config describes.
    """
    theirs = _read_config(name_or_path)
    tensors = _read_tensors(name_or_path)
    config = {key: value for key, value in theirs.items() if key not in OPTIONS}
    config["model_type"] = PLAIN_TYPE
    if theirs.get("architectures"):
        config["architectures"] = [name.removeprefix("TED") for name in theirs["architectures"]]
    options = {key: theirs[key] for key in OPTIONS if key in theirs}
    heads = {name: t for name, t in tensors.items() if name.startswith(_HEAD)}
    own = {name: t for name, t in tensors.items() if _FILTER.fullmatch(name)}
    if heads and not own:
        raise CheckpointError(
            f"{name_or_path} has filter heads ({min(heads)}) but no filters: give the folder as Stage I saved it"
        )
    weights = {name: t for name, t in tensors.items() if name not in own and name not in heads}
    plan = _plan(name_or_path, config, options, own) if own else None
    filters = {ours: own[name] for ours, name in _their_names(plan).items()} if plan else {}
    return PublishedModel(config, options, weights, plan, filters, heads)


def unpack_published(name_or_path: str, folder: Path) -> None:
    """Writes folder/model, a plain Hugging Face folder, and folder/filters as Stage I leaves them; renamed into place.

    Without filters in the checkpoint there is no folder/filters; the filters' heads are not kept. Raises
    CheckpointError if `folder` exists, and as `read_published`.
    """
    model = read_published(name_or_path)
    temporary = _temporary(folder)
    (temporary / "model").mkdir()
    # a constant of transformers before 4.31; later models have no such buffer in their files
    plain = {name: t for name, t in model.weights.items() if not name.endswith("position_ids")}
    _write_tensors(plain, temporary / "model" / SINGLE)
    _write_json(model.config, temporary / "model/config.json")
    copy_companions(name_or_path, temporary / "model")
    if model.plan is not None:
        (temporary / "filters").mkdir()
        _write_tensors(model.filters, temporary / "filters/filters.safetensors")
        _write_json({"plan": asdict(model.plan), "source": name_or_path}, temporary / "filters/filters.json")
    temporary.rename(folder)


def _config_file(name_or_path: str) -> Path | None:
    try:
        return find_file(name_or_path, "config.json")
    except OSError:  # neither a folder nor the name of a hub model
        return None


def _read_config(name_or_path: str) -> dict[str, Any]:
    path = _config_file(name_or_path)
    if path is None:
        raise CheckpointError(f"{name_or_path} has no config.json: give a folder that save_pretrained wrote")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): copy or download it again") from error
    found = config.get("model_type") if isinstance(config, dict) else None
    if found != MODEL_TYPE:
        raise CheckpointError(f"{name_or_path} has model_type {found!r}, not {MODEL_TYPE!r}: load it as a plain model")
    return dict(config)


def _read_tensors(name_or_path: str) -> dict[str, torch.Tensor]:
    single, index = PICKLED
    if any(find_file(name_or_path, name) for name in (SINGLE, INDEX)):
        try:
            return WeightReader(name_or_path).read_all()
        except SafetensorError as error:
            raise CheckpointError(
                f"the safetensors of {name_or_path} are torn ({error}): copy or download them again"
            ) from error
    if (path := find_file(name_or_path, single)) is not None:
        return _read_pickled(path)
    if (path := find_file(name_or_path, index)) is None:
        raise CheckpointError(f"{name_or_path} has no weights: expected {SINGLE} or {single}, whole or in shards")
    tensors: dict[str, torch.Tensor] = {}
    for name in sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())):
        if (shard := find_file(name_or_path, name)) is None:
            raise CheckpointError(f"{name_or_path} lacks {name}, which its {index} names: copy or download it again")
        tensors |= _read_pickled(shard)
    return tensors


def _read_pickled(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file of torch.save, memory-mapped; nothing that a pickle could run is run."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (UnpicklingError, RuntimeError, OSError, EOFError) as error:
        raise CheckpointError(
            f"{path} is torn, or holds more than tensors, which is not loaded because it could run code: convert it "
            f"to {SINGLE} if you trust it"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise CheckpointError(f"{path} does not hold tensors by name alone: save the model's state_dict() instead")
    return dict(tensors)


def _plan(
    name_or_path: str, config: dict[str, Any], options: dict[str, Any], own: dict[str, torch.Tensor]
) -> FilterPlan:
    """The filters' shape from their tensors; CheckpointError if these are not what the config describes."""

    def check(key: str, said: Any, means: Any, what: str, found: Any) -> None:
        if found != means:
            raise CheckpointError(
                f"{name_or_path}: by its config ({key} {said}) {what} {means}, by its weights {found}: the two do not "
                "belong together, give both as they were saved"
            )

    for key in ("hidden_size", "num_hidden_layers"):
        if not isinstance(config.get(key), int):
            raise CheckpointError(
                f"{name_or_path}: config.json has {key} {config.get(key)!r}, expected a number: restore it"
            )
    width, depth = config["hidden_size"], config["num_hidden_layers"]
    said = {**OPTIONS, **options}
    parts: dict[int, set[str]] = {}
    for match in filter(None, map(_FILTER.fullmatch, own)):
        parts.setdefault(int(match[1]), set()).add(match[2])
    blocks = sorted(parts)
    interval = said["filter_interval"]
    due = [] if said["filter_disabled"] else [i for i in range(depth) if (i + 1) % interval == 0]
    key = "filter_disabled" if said["filter_disabled"] else "filter_interval"
    check(key, said[key], due, "filters are on layers", blocks)
    nonlinear = bool(said["filter_nonlinear"])
    for block in blocks:
        names = sorted(_PARTS[nonlinear].values())
        what = f"the filter of layer {block} has the tensors"
        check("filter_nonlinear", nonlinear, names, what, sorted(parts[block]))
    output_dim = said["filter_output_dim"] or width
    plan = FilterPlan(tuple(blocks), width, output_dim, nonlinear, config.get("hidden_act", "gelu"))
    shapes = {"weight": (output_dim, width), "bias": (output_dim,)}
    shapes |= {"inner_weight": (width, width), "inner_bias": (width,)}
    for ours, theirs in _their_names(plan).items():
        part = ours.partition(".")[2]
        key = "hidden_size" if part.startswith("inner") else "filter_output_dim"
        dims = f"{said.get(key, width)}, hidden_size {width}" if key == "filter_output_dim" else width
        check(key, dims, shapes[part], f"{theirs} has the shape", tuple(own[theirs].shape))
    return plan


def _their_names(plan: FilterPlan) -> dict[str, str]:
    """Our name of each of the filters' tensors -> theirs."""
    return {
        f"{k}.{ours}": f"deberta.encoder.layer.{block}.filter.{theirs}"
        for k, block in enumerate(plan.blocks)
        for ours, theirs in _PARTS[plan.nonlinear].items()
    }


def _write_json(content: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata={"format": "pt"})


def _temporary(folder: Path) -> Path:
    if folder.exists():
        raise CheckpointError(f"{folder} exists already: delete it, or choose another folder")
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary
