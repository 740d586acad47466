"""Whether DeepSpeed knows every key of an engine's configuration, and takes every value."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from pydantic import ValidationError

from ted_ds.errors import ConfigError, in_a_line


class _Noting(dict[str, Any]):
    """A dict that notes which keys it was asked for."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.asked: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return self

    def __copy__(self) -> _Noting:
        return self


def check_engine_config(path: Path, config: dict[str, Any]) -> None:
    """Lets DeepSpeed read the configuration of an engine, made of the file `path`, before anything is loaded.

    Raises ConfigError for a value that it refuses, and for a key that it never asked for: it passes over those.
    """
    # DeepSpeed compares these with the number of ranks; the recipe's sizes were solved before
    noting = _Noting({**config, "train_batch_size": None, "gradient_accumulation_steps": None})
    try:
        DeepSpeedConfig(noting)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        if not fault["loc"]:
            raise ConfigError(f"{path}: {fault['msg']}") from error
        inside = [name for name, part in config.items() if isinstance(part, dict) and fault["loc"][0] in part]
        key = ".".join(map(str, (*inside[:1], *fault["loc"])))
        unknown = fault["type"] == "extra_forbidden"
        said = "DeepSpeed has no such key: see its name there, or remove it" if unknown else fault["msg"].lower()
        raise ConfigError(f"{path}: {key} is {json.dumps(fault['input'])}: {said}") from error
    except (DeepSpeedConfigError, AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: DeepSpeed refuses it: {in_a_line(error)}") from error
    for key in config:
        if key not in noting.asked and not key.startswith(("_", "/")):  # as comments are written in JSON
            close = difflib.get_close_matches(key, noting.asked, n=1)
            hint = f"did you mean {close[0]}?" if close else "remove it"
            raise ConfigError(f"{path}: {key}: DeepSpeed has no such key; {hint}")
