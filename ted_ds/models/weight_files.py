"""A Hugging Face folder's tensors, read and written one at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import cached_file

from ted_ds.errors import ModelError

SHARD_BYTES = 5_000_000_000
"""Largest size of a written file, as `save_pretrained` had it for years, and so of the host memory for writing."""

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
LFS_POINTER = b"version https://git-lfs"
COMPANIONS = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "spm.model", "chat_template.jinja"),
)


def find_file(model: str, name: str) -> Path | None:
    """The local path of a file of a model folder or hub model, downloaded if need be; None if there is no such file."""
    found = cached_file(
        model,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def copy_companions(model: str, folder: Path) -> None:
    """Copies the tokenizer's files, generation_config.json and a folder's own code into `folder`, if there are any."""
    code = [path.name for path in Path(model).glob("*.py")]
    for name in (*COMPANIONS, *code):
        if (path := find_file(model, name)) is not None:
            shutil.copyfile(path, folder / name)


def _shards(model: str, single: str, index: str) -> list[str] | None:
    """The names of the files that hold a model's weights: of an index, or the single one; None if there is neither."""
    if (path := find_file(model, index)) is not None:
        return sorted({*json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()})
    return None if find_file(model, single) is None else [single]


def pickled_files(model: str) -> list[Path]:
    """A model's pickled weights; [] if it has safetensors, which are always taken."""
    names = [] if _shards(model, SINGLE, INDEX) else _shards(model, *PICKLED)
    return [path for name in names or () if (path := find_file(model, name)) is not None]


def stored_tensors(model: str, names: Collection[str]) -> dict[str, torch.Tensor]:
    """Parameters as the files have them, on the CPU; of safetensors or pickles, which are read safely.

    Files often leave out the first parts of a name, or have others there: its last two parts tell.
    """

    def wanted(own: str) -> str | None:
        return next((name for name in names if f".{own}".endswith("." + ".".join(name.split(".")[-2:]))), None)

    if not (pickled := pickled_files(model)):
        reader = WeightReader(model)
        return {name: reader.read(own) for own in reader if (name := wanted(own)) is not None}
    found: dict[str, torch.Tensor] = {}
    for path in pickled:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
        found |= {name: tensor for own, tensor in content.items() if (name := wanted(own)) is not None}
    return found


def damaged_file(model: str) -> str | None:
    """The first of a model's weight files that cannot be read, and why; None if all can."""
    names = _shards(model, SINGLE, INDEX) or _shards(model, *PICKLED) or []
    for name in names:
        if (path := find_file(model, name)) is None:
            continue
        with path.open("rb") as file:
            head = file.read(len(LFS_POINTER))
        if head == LFS_POINTER:
            return f"{name} is a pointer of git-lfs, not the file itself: run git lfs pull"
        try:
            if name.endswith(".safetensors"):
                with safe_open(path, framework="pt"):
                    pass
            elif not head or (head.startswith(b"PK") and not is_zipfile(path)):
                raise OSError("it is no whole archive")
        except (SafetensorError, OSError) as error:
            return f"{name} is damaged, maybe cut off ({error}): copy or download it again"
    return None


class WeightReader:
    """The safetensors of a local folder or a hub model, sharded or not, memory-mapped.

    Raises ModelError if there are none: pickled weights are not read here.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self._files: dict[str, Any] = {}
        if (index := find_file(model, INDEX)) is not None:
            self._file_of: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        elif find_file(model, SINGLE) is not None:
            self._file_of = dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        elif pickled_files(model):
            raise ModelError(
                f"model {model} has pickled weights only ({PICKLED[0]}): convert them with transformers, by "
                f"from_pretrained({model!r}) and save_pretrained(FOLDER), and give FOLDER"
            )
        else:
            raise ModelError(f"model {model} has no weights: expected {SINGLE} or {INDEX}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def read(self, name: str) -> torch.Tensor:
        """The tensor, on the CPU, in the file's dtype."""
        tensor: torch.Tensor = self._open(self._file_of[name]).get_tensor(name)
        return tensor

    def read_all(self) -> dict[str, torch.Tensor]:
        """Every tensor by name."""
        return {name: self.read(name) for name in self._file_of}

    def _open(self, file: str) -> Any:
        if file not in self._files:
            path = find_file(self._model, file)
            if path is None:
                raise ModelError(f"model {self._model} lacks {file}, which its {INDEX} names: download it again")
            self._files[file] = safe_open(path, framework="pt")
        return self._files[file]


def write_weights(folder: Path, sizes: Mapping[str, int], make: Callable[[str], torch.Tensor]) -> None:
    """Writes model.safetensors, or files of `SHARD_BYTES` with an index, into `folder`; one of them is in memory.

    sizes: name -> bytes of every tensor, in the order in which `make(name)` is asked for them.
    """
    split = split_state_dict_into_shards_factory(
        dict(sizes),
        get_storage_size=lambda size: size,
        filename_pattern=SINGLE.replace(".", "{suffix}."),
        max_shard_size=SHARD_BYTES,
    )
    for file, names in split.filename_to_tensors.items():
        save_file({name: make(name).contiguous() for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def add_weights(folder: Path, file: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes tensors to a new file of `folder`, which is made if need be, and adds them to its index."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / file, metadata={"format": "pt"})
    index = folder / INDEX
    known = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index.exists() else {}
    content = {"metadata": {}, "weight_map": known | dict.fromkeys(tensors, file)}
    index.write_text(json.dumps(content, indent=2), encoding="utf-8")
