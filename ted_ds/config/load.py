"""YAML and dotted overrides -> a checked `RunConfig`; and back, with what the run used."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ted_ds.config.choices import Method
from ted_ds.config.schema import RunConfig
from ted_ds.config.shipped import find_file
from ted_ds.config.written import is_misread, misread, scalar_text
from ted_ds.errors import ConfigError

SectionT = TypeVar("SectionT", bound=BaseModel)

ENVIRONMENT = "environment"
"""The key of a dumped recipe that is about the run, not of it; ignored when read."""

METHODS = "methods"
"""The key of a recipe under which each method may have its own values, such as alphas."""

COMMAND_LINE = "the command line"

REMOVED = {("loss", "residual_dtype"): "same"}
"""Keys of earlier versions, and the value under which they computed what is computed without the key: not looked at."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The recipe at `path` with `--section.key=value` (or `--section.key value`) on top.

    A path that is not there is looked for in this copy of ted_ds: `launchers/recipes/mnli.yaml` is found from anywhere.
    Values of overrides are YAML. Relative paths in a recipe are relative to the working directory.
    Raises ConfigError that lists every fault of the recipe: file, key, value, what is allowed.
    """
    path = find_file(Path(path)) or Path(path)
    recipe = read_yaml(path)
    recipe.pop(ENVIRONMENT, None)
    recipe = _without_removed(recipe)
    _choose_method(recipe, path, overrides)
    overridden = _apply_overrides(recipe, overrides)
    return _validate(RunConfig, recipe, str(path), overridden)


def _choose_method(recipe: dict[str, Any], path: Path, overrides: Sequence[str]) -> None:
    """Merges what `methods` has for the chosen method into the recipe, under the overrides, and drops `methods`."""
    sections = recipe.pop(METHODS, {})
    known = get_args(Method)
    if not isinstance(sections, dict) or not all(isinstance(s, dict) for s in sections.values()):
        raise ConfigError(f"{path}: {METHODS}: is {sections!r:.60}, not a mapping of methods to parts of a recipe")
    if strange := [name for name in sections if name not in known]:
        raise ConfigError(f"{path}: {METHODS}.{strange[0]}: unknown method; known are {', '.join(known)}")
    default = RunConfig.model_fields["method"].default
    chosen = dict(split_overrides(overrides)).get("method") or recipe.get("method", default)
    _merge(recipe, sections.get(chosen, {}) if isinstance(chosen, str) else {})


def _merge(recipe: dict[str, Any], part: Mapping[str, Any]) -> None:
    for key, value in part.items():
        if isinstance(value, dict) and isinstance(recipe.get(key), dict):
            _merge(recipe[key], value)
        else:
            recipe[key] = value


def load_section(model: type[SectionT], overrides: Sequence[str]) -> SectionT:
    """One section alone, from overrides that bear its name (`--data.tokenizer=...` for `DataConfig`).

    Raises ConfigError as `load_config` does, and for an override of another section.
    """
    name = next(n for n, field in RunConfig.model_fields.items() if model in _alternatives(field.annotation))
    recipe: dict[str, Any] = {}
    texts = _apply_overrides(recipe, overrides)
    for key in sorted(texts):
        if key.split(".")[0] != name:
            raise ConfigError(f"{COMMAND_LINE}: {key} has no use here, only {name}.KEY has: remove it")
    return _validate(model, recipe.get(name, {}), COMMAND_LINE, texts, prefix=(name,))


def dump_config(run: RunConfig, path: Path, extra: Mapping[str, Any]) -> None:
    """Writes the resolved recipe, and `extra` (versions, commit) under `environment`, as YAML, atomically.

    `load_config` reads it back as the same run.
    """
    content = run.model_dump(mode="json") | {ENVIRONMENT: dict(extra)}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
    os.replace(temporary, path)


def reread(content: Mapping[str, Any], source: str) -> RunConfig:
    """A recipe as `dump_config` of this or an earlier version wrote it, or without keys that have a default.

    output_dir, which is of no concern here, may be left out. Raises ConfigError for the first key that is not in
    today's schema, or whose value is not allowed.
    """
    content = _without_removed(content)
    try:
        return RunConfig.model_validate({"output_dir": ".", **content})
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        unknown, missing = (fault["type"] == kind for kind in ("extra_forbidden", "missing"))
        key = ".".join(_key(fault["loc"], content, missing=missing))
        reason = "this version of ted_ds has no such key" if unknown else f"this version of ted_ds says: {fault['msg']}"
        raise ConfigError(
            f"{source}: {': '.join(filter(None, (key, reason)))}: go on with the version that wrote it, or give "
            "another output_dir"
        ) from None


def _without_removed(content: Mapping[str, Any]) -> dict[str, Any]:
    content = dict(content)
    for (section, key), harmless in REMOVED.items():
        if isinstance(own := content.get(section), dict) and own.get(key) == harmless:
            content[section] = {name: value for name, value in own.items() if name != key}
    return content


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key that is no word, or stands twice in a mapping (YAML keeps the last silently)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                text = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
                problem = f"the key {key!r} is no word" if text is None else f"a key: {misread(key, text)}"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice: remove one", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: the recipe cannot be read: {reason}") from error
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f":{error.problem_mark.line + 1}"
        raise ConfigError(f"{path}{line}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of keys to values, this is {content!r:.60}")
    return content


def _apply_overrides(recipe: dict[str, Any], overrides: Sequence[str]) -> dict[str, str]:
    """Sets each override in `recipe`, in order, making absent sections; {dotted key that was set: its text}."""
    texts: dict[str, str] = {}
    for key, text in split_overrides(overrides):
        try:
            value = yaml.load(text, _Loader)
        except yaml.constructor.ConstructorError as error:
            raise ConfigError(f"{COMMAND_LINE}: --{key}={text}: {error.problem}") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"{COMMAND_LINE}: --{key}={text}: the value is not valid YAML: quote it") from error
        *parents, leaf = key.split(".")
        target = recipe
        for parent in parents:
            if target.get(parent) is None:
                target[parent] = {}
            target = target[parent]
            if not isinstance(target, dict):
                raise ConfigError(f"{COMMAND_LINE}: --{key}: {parent} is {target!r}, which has no keys")
        target[leaf] = value
        texts.pop(key, None)  # the last one of a key counts
        texts[key] = text
    return texts


def split_overrides(overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    rest = iter(overrides)
    for word in rest:
        key, equals, text = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not key:
            raise ConfigError(f"{COMMAND_LINE}: {word!r} is not of the form --section.key=value")
        if not equals:
            following = next(rest, None)
            if following is None or following.startswith("--"):
                raise ConfigError(f"{COMMAND_LINE}: --{key} has no value: write --{key}=VALUE")
            text = following
        yield key, text


def _validate(
    model: type[SectionT],
    content: Any,
    source: str,
    overridden: dict[str, str],
    *,
    prefix: tuple[str, ...] = (),
) -> SectionT:
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise ConfigError("\n".join(_messages(error, content, source, overridden, prefix))) from None


def _messages(
    error: ValidationError, content: Any, source: str, overridden: dict[str, str], prefix: tuple[str, ...]
) -> list[str]:
    """One line a faulty key. Of a union pydantic reports every alternative: only the deepest faults count."""
    faults: dict[tuple[str, ...], list[ErrorDetails]] = {}
    for fault in error.errors(include_url=False):
        key = prefix + _key(fault["loc"], content, missing=fault["type"] == "missing")
        faults.setdefault(key, []).append(fault)
    deepest = [k for k in faults if not any(other[: len(k)] == k and len(other) > len(k) for other in faults)]
    lines = []
    for key in deepest:
        dotted = ".".join(key)
        unknown = faults[key][0]["type"] == "extra_forbidden"
        is_override = any(f"{dotted}.".startswith(f"{o}.") for o in overridden)
        is_override |= unknown and any(o.startswith(f"{dotted}.") for o in overridden)
        where = COMMAND_LINE if is_override else source
        if is_misread(faults[key][0]["input"], [fault["type"] for fault in faults[key]]):
            description = misread(faults[key][0]["input"], _as_written(key, source, overridden))
        else:
            description = _describe(key, faults[key])
        lines.append(": ".join(filter(None, (where, dotted, description))))
    return lines


def _as_written(key: tuple[str, ...], source: str, overridden: dict[str, str]) -> str | None:
    """The text of a value that YAML read as no string, from the last override that sets it, or the recipe's file."""
    for override in reversed(overridden):
        parts = tuple(override.split("."))
        if key[: len(parts)] == parts:
            return scalar_text(overridden[override], key[len(parts) :])
    if source == COMMAND_LINE:
        return None
    return scalar_text(Path(source).read_text(encoding="utf-8"), key)


def _key(location: tuple[int | str, ...], content: Any, *, missing: bool) -> tuple[str, ...]:
    """The user's key: pydantic's location without the names of a union's alternatives."""
    key: list[str] = []
    for i, part in enumerate(location):
        if part in content if isinstance(content, dict) else isinstance(content, list) and isinstance(part, int):
            content = content[part]
        elif not (missing and i == len(location) - 1):
            continue
        key.append(str(part))
    return tuple(key)


def _describe(key: tuple[str, ...], faults: Sequence[ErrorDetails]) -> str:
    """What is wrong with one key; several faults are a union's alternatives."""
    kind, message, given = (faults[0][name] for name in ("type", "msg", "input"))
    if kind == "extra_forbidden":
        return f"unknown key{_suggestion(key)}"
    if kind == "missing":
        return "is missing: give it a value"
    if kind == "value_error":  # raised by a rule of the schema, whose message shows the values
        return message.removeprefix("Value error, ")
    allowed = " or ".join(dict.fromkeys(fault["msg"].removeprefix("Input ") for fault in faults))
    return f"{given!r} is not allowed: {allowed[0].lower()}{allowed[1:].replace('tuple', 'list')}"


def _suggestion(key: tuple[str, ...]) -> str:
    """The same key in another section, else the closest one of its own section, else all of these."""
    valid = list(_valid_keys(RunConfig))
    elsewhere = [v for v in valid if v.rpartition(".")[2] == key[-1]]
    siblings = _siblings(".".join(part for part in key if not part.isdigit()), valid)
    leaves = difflib.get_close_matches(key[-1], [v.rpartition(".")[2] for v in siblings], n=1)
    close = elsewhere or [v for v in siblings if v.rpartition(".")[2] in leaves]
    return f"; did you mean {' or '.join(close)}?" if close else f"; known are {', '.join(siblings)}"


def _siblings(dotted: str, valid: Sequence[str]) -> list[str]:
    parent = dotted.rpartition(".")[0]
    return [v for v in valid if v.rpartition(".")[0] == parent]


def _valid_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        for section in _alternatives(field.annotation):
            if isinstance(section, type) and issubclass(section, BaseModel):
                yield from _valid_keys(section, f"{prefix}{name}.")


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """An annotation's leaves: `A | tuple[B | None, ...]` -> (A, B, None)."""
    inner = get_args(annotation)
    return tuple(leaf for part in inner for leaf in _alternatives(part)) if inner else (annotation,)
