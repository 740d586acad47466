"""Fingerprints of a teacher and of its filters: of their content alone, so that a copied folder has the same."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch

from ted_ds.models.weight_files import WeightReader, find_file, pickled_files

SAMPLES = 16
"""At least so many numbers of every tensor are hashed, evenly spread; at most twice as many."""


PICKLED_BYTES = 1 << 20
"""Of the beginning and of the end of a pickled file."""


def model_fingerprint(model: str) -> str:
    """A hash of a folder's or hub model's config and weights: names, shapes, dtypes, and samples of every tensor.

    Training a tensor changes some of its samples. A change of only a few numbers or rows, or of a hub model's own
    code, can go unnoticed. How weights are split into files does not matter. A few pages of each tensor are read; of
    pickled weights the size and the ends of each file.
    """
    return _digest(model, _config(model))


def weights_fingerprint(model: str) -> str:
    """Likewise, of the weights alone."""
    return _digest(model, "")


def _digest(model: str, config: str) -> str:
    digest = hashlib.sha256(config.encode())
    pickled = pickled_files(model)
    for path in pickled:
        digest.update(f"{path.stat().st_size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(PICKLED_BYTES))
            file.seek(-min(PICKLED_BYTES, path.stat().st_size), os.SEEK_END)
            digest.update(file.read())
    if pickled:
        return digest.hexdigest()
    for name, tensor in sorted(WeightReader(model).read_all().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        samples = tensor.flatten()[:: max(1, tensor.numel() // SAMPLES)]
        digest.update(samples.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def file_fingerprint(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _config(model: str) -> str:
    """config.json without the names of the library's version and of the folder it was loaded from."""
    path = find_file(model, "config.json")
    config = {} if path is None else json.loads(path.read_text(encoding="utf-8"))
    return json.dumps({k: v for k, v in config.items() if k != "transformers_version" and k[0] != "_"}, sort_keys=True)
