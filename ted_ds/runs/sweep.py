"""A grid of settings of recipes: the run of each index of a job array, its folder, and its progress."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import yaml
from pydantic import BeforeValidator, Field, ValidationError

from ted_ds.config.load import COMMAND_LINE, load_config, read_yaml, split_overrides
from ted_ds.config.schema import RunConfig
from ted_ds.config.sections import Section
from ted_ds.config.written import is_misread, misread, scalar_text
from ted_ds.errors import ConfigError
from ted_ds.runs.progress import finished, saved_step

CONFIG, OUTPUT = "config", "output_dir"

LONGEST_NAME = 255
"""Bytes of a folder's name on the usual file systems."""

Values = Annotated[list[Any], Field(min_length=1)]
Mappings = Annotated[
    list[Annotated[dict[str, Values], Field(min_length=1)]],
    Field(min_length=1),
    BeforeValidator(lambda value: [value] if isinstance(value, dict) else value),
]


class GridFile(Section):
    """A grid file: a recipe, settings on top of it, and the folder of the runs' folders."""

    config: str | None = Field(default=None, description="recipe of all mappings that have no `config` of their own")
    output_dir: Path = Field(description="each run has a folder of its own below it")
    grid: Mappings = Field(description="dotted key -> values, or several such mappings one after the other")


@dataclass(frozen=True)
class SweepRun:
    """One index of a sweep.

    settings: what the grid sets, dotted key -> value as text, in alphabetical order; equal numbers have equal texts.
    """

    index: int
    settings: Mapping[str, str]
    run: RunConfig


def read_sweep(path: Path, overrides: Sequence[str] = ()) -> tuple[SweepRun, ...]:
    """The runs of the grid file at `path`, by index, `overrides` (see `load_config`) applied to all of them.

    As in sklearn's `ParameterGrid`, a mapping stands for all combinations of its values, with its keys in alphabetical
    order, of which the last varies fastest; a list of mappings stands for the combinations of one after the other.
    A run's folder is named by its settings, not by its index, so it stays the same if the grid grows.

    Raises ConfigError for a faulty grid file, for the first index whose recipe is faulty, and for two indices with
    one folder: no run starts before all of them can run.
    """
    grid = _read_grid(path)
    extra = [key for key, _ in split_overrides(overrides)]
    _refuse_twice(path, grid, extra)
    runs: dict[Path, SweepRun] = {}
    for index, values in enumerate(_points(grid.grid)):
        settings = {key: _text(key, value) for key, value in values.items()}
        folder = grid.output_dir / _folder_name(path, index, settings)
        if (other := runs.get(folder)) is not None:
            raise ConfigError(
                f"{path}: index {other.index} and index {index} both have the folder {folder}: remove one of them, "
                "or rename one of two recipes with one name"
            )
        run = _recipe(path, index, {CONFIG: grid.config, **values, OUTPUT: str(folder)}, overrides)
        runs[folder] = SweepRun(index, settings, run)
    return tuple(runs.values())


def state(run: RunConfig) -> str:
    """`complete`, `step N of M` or `missing`. For a recipe in epochs, M depends on the data and is not shown."""
    if finished(run) is not None:
        return "complete"
    step, train = saved_step(run), run.train
    if step is None:
        return "missing"
    return f"step {step} of {train.steps}" if train.epochs is None else f"step {step}, {train.epochs:g} epochs in all"


def unfinished(sweep: Sequence[SweepRun]) -> str:
    """The indices that are not complete, as `sbatch --array=` takes them, e.g. `0,3-5`; "" if all are complete."""
    indices = [entry.index for entry in sweep if finished(entry.run) is None]
    # in a range without gaps, an index minus its place in the list is constant
    ranges = itertools.groupby(enumerate(indices), lambda pair: pair[1] - pair[0])
    parts = [[index for _, index in part] for _, part in ranges]
    return ",".join(f"{i[0]}-{i[-1]}" if len(i) > 1 else f"{i[0]}" for i in parts)


def _points(grid: Sequence[Mapping[str, Sequence[Any]]]) -> Iterator[dict[str, Any]]:
    """sklearn's `ParameterGrid(grid)`; importing sklearn would take a second."""
    for mapping in grid:
        keys = sorted(mapping)
        for values in itertools.product(*(mapping[key] for key in keys)):
            yield dict(zip(keys, values, strict=True))


def _read_grid(path: Path) -> GridFile:
    content = read_yaml(path)
    try:
        return GridFile.model_validate(content)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        single = isinstance(content.get("grid"), dict)
        key = ".".join(str(part) for part in fault["loc"] if not (single and part == 0))
        reason = f"{fault['input']!r:.60} is not allowed: {fault['msg']}"
        if fault["type"] == "missing":
            reason = "is missing: give it a value"
        elif fault["type"] == "extra_forbidden":
            reason = f"unknown key; known are {', '.join(GridFile.model_fields)}"
        elif is_misread(fault["input"], [fault["type"]]):
            written = scalar_text(path.read_text(encoding="utf-8"), [str(part) for part in fault["loc"]])
            reason = misread(fault["input"], written)
        raise ConfigError(f"{path}: {key}: {reason}") from None


def _refuse_twice(path: Path, grid: GridFile, extra: Sequence[str]) -> None:
    """Raises ConfigError for a key that the grid file and the command line set, or that has no place in a grid."""
    keys = [key for mapping in grid.grid for key in mapping]
    if OUTPUT in keys:
        raise ConfigError(f"{path}: grid.{OUTPUT}: each index has a folder of its own below {OUTPUT}: remove it")
    for ours, theirs in itertools.product([*keys, CONFIG, OUTPUT], extra):
        if _overlap(ours, theirs):
            raise ConfigError(f"{COMMAND_LINE}: --{theirs}: {path} sets {ours} for each index: remove one of them")


def _overlap(a: str, b: str) -> bool:
    """Whether two dotted keys are equal, or one contains the other."""
    return f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.")


def _folder_name(path: Path, index: int, settings: Mapping[str, str]) -> str:
    """`method=ted,seed=1`; characters that are special to a file system or a shell are percent-encoded."""
    name = ",".join(f"{key}={quote(value, safe='+')}" for key, value in settings.items())
    if len(name) > LONGEST_NAME:
        raise ConfigError(
            f"{path}: index {index}: a folder's name has at most {LONGEST_NAME} bytes, {name!r:.60} has {len(name)}: "
            f"put long values into a recipe, and that recipe into grid.{CONFIG}"
        )
    return name


def _text(key: str, value: Any) -> str:
    """The text of a value: a recipe's name; the same text for 10, 10.0 and 1e1; else YAML on one line."""
    if key == CONFIG:
        return Path(str(value)).stem
    if isinstance(value, str | float):
        try:
            return repr(float(value)).removesuffix(".0")
        except ValueError:
            return str(value)
    return _yaml(value)


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("...\n").rstrip("\n")


def _recipe(path: Path, index: int, values: Mapping[str, Any], overrides: Sequence[str]) -> RunConfig:
    """The recipe `values["config"]` with the other values on top. A ConfigError names the index and the key."""
    config, keys = values[CONFIG], [key for key in values if key != CONFIG]
    where = f"{path}: index {index}"
    if not isinstance(config, str):
        raise ConfigError(f"{where}: {CONFIG}: {config!r} is no recipe: name its file here or in grid.{CONFIG}")
    own = [f"--{key}={_yaml(values[key])}" for key in keys]
    try:
        return load_config(config, [*overrides, *own])
    except ConfigError as error:
        line = str(error).splitlines()[0]
        fault = line.removeprefix(f"{COMMAND_LINE}: ")
        key = re.split("[:=]", fault.removeprefix("--"))[0]
        if fault != line and any(_overlap(key, own_key) for own_key in keys):
            line = f"grid: {fault}"
        settings = ", ".join(o.removeprefix("--") for o in own[:-1])  # the last one is the folder
        raise ConfigError(f"{where} ({settings}): {line}") from None
