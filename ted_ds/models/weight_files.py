"""A Hugging Face folder's tensors, read and written one at a time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.utils import cached_file

from ted_ds.errors import ModelError

SHARD_BYTES = 5_000_000_000
"""Largest size of a written file, as `save_pretrained` had it for years; also the host memory that writing needs."""

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
COMPANIONS = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "spm.model", "chat_template.jinja"),
)


def find_file(model: str, name: str) -> Path | None:
    """The local path of a file of a model folder or hub model (downloaded if need be); None if it has none."""
    found = cached_file(
        model,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def copy_companions(model: str, folder: Path) -> None:
    """Copies the tokenizer's files and generation_config.json into `folder`, those that there are."""
    for name in COMPANIONS:
        if (path := find_file(model, name)) is not None:
            shutil.copyfile(path, folder / name)


class WeightReader:
    """The safetensors of a local folder or a hub model, sharded or not, memory-mapped.

    Raises ModelError where there are none: pickled weights are not read here.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self._files: dict[str, Any] = {}
        if (index := find_file(model, INDEX)) is not None:
            self._file_of: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        elif find_file(model, SINGLE) is not None:
            self._file_of = dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        else:
            raise ModelError(self._nothing())

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
                raise ModelError(f"teacher {self._model} lacks {file}, which its {INDEX} names: download it again")
            self._files[file] = safe_open(path, framework="pt")
        return self._files[file]

    def _nothing(self) -> str:
        if any(find_file(self._model, name) for name in PICKLED):
            return (
                f"teacher {self._model} has pickled weights only ({PICKLED[0]}): convert them with "
                f"AutoModelForCausalLM.from_pretrained({self._model!r}).save_pretrained(FOLDER) and give FOLDER"
            )
        return f"teacher {self._model} has no weights: expected {SINGLE} or {INDEX}"


class WeightWriter:
    """Writes tensors into `folder` as model.safetensors, or in shards with an index; holds one shard."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shard: dict[str, torch.Tensor] = {}
        self._bytes = self._total = 0
        self._written: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Takes one tensor."""
        if self._shard and self._bytes + tensor.nbytes > SHARD_BYTES:
            self._flush()
        self._shard[name] = tensor.contiguous()
        self._bytes += tensor.nbytes
        self._total += tensor.nbytes

    def close(self) -> None:
        """Writes what is left, and names the files; how many there are is known only now."""
        self._flush()
        count = len(self._written)
        if count == 1:
            self._part(0).rename(self._folder / SINGLE)
            return
        file_of: dict[str, str] = {}
        for i, names in enumerate(self._written):
            file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            self._part(i).rename(self._folder / file)
            file_of |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self._total}, "weight_map": file_of}
        (self._folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")

    def _flush(self) -> None:
        save_file(self._shard, self._part(len(self._written)), metadata={"format": "pt"})
        self._written.append(list(self._shard))
        self._shard, self._bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number}.safetensors"
