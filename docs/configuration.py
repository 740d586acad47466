"""`python docs/configuration.py` prints docs/configuration.md: every key of a recipe, as the schema has it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from ted_ds.config.data_section import HubDataset
from ted_ds.config.schema import RunConfig
from ted_ds.config.student_section import InitConfig

INTRODUCTION = """# Every key of a recipe

This page is made from the schema: `python docs/configuration.py > docs/configuration.md`.

A recipe is YAML. Each key can be set on the command line: `--section.key=value`. Relative paths start at the working
directory. A recipe may also have `methods:`, a mapping of a method to parts of a recipe that hold for that method only.
Unknown keys, wrong types and contradictions are refused before any model is loaded.
"""


def reference() -> str:
    """The page, Markdown."""
    parts = [INTRODUCTION, *_table("The recipe", RunConfig)]
    for name, field in RunConfig.model_fields.items():
        section = _section(field)
        if section is not None:
            parts += _table(f"`{name}`", section)
            if name == "student":
                parts += _table("`student.init`", InitConfig)
    return "\n".join([*parts, *_table("A data set of the hub, in `data`", HubDataset)])


def _section(field: FieldInfo) -> type[BaseModel] | None:
    kinds = (field.annotation, *get_args(field.annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _table(title: str, section: type[BaseModel]) -> Iterator[str]:
    yield f"## {title}\n"
    yield " ".join((section.__doc__ or "").split()) + "\n"
    yield "| key | type | default | |"
    yield "|---|---|---|---|"
    properties = section.model_json_schema(mode="validation")["properties"]
    for name, field in section.model_fields.items():
        kind = "section" if _section(field) is not None and section is RunConfig else _type(properties[name])
        text = (field.description or "").replace("|", "\\|")
        yield f"| `{name}` | {kind} | {_default(field)} | {text} |"
    yield ""


def _type(schema: dict[str, Any]) -> str:
    """A JSON schema in words."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(map(_type, schema["anyOf"])))
    if "enum" in schema:
        return ", ".join(f"`{word}`" for word in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if "$ref" in schema:
        return {"InitConfig": "section", "HubDataset": "hub data set"}.get(
            schema["$ref"].split("/")[-1], "one, or {teacher, student}"
        )
    if "allOf" in schema:
        return _type(schema["allOf"][0])
    kind = {"string": "text", "boolean": "true, false", "array": "list", "object": "mapping"}.get(
        schema["type"], schema["type"]
    )
    limits = {"exclusiveMinimum": "> {:g}", "minimum": ">= {:g}", "exclusiveMaximum": "< {:g}", "maximum": "<= {:g}"}
    return " ".join([kind, *(text.format(schema[key]) for key, text in limits.items() if key in schema)])


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=False)
    if value is PydanticUndefined:
        return "required" if "null: " not in (field.description or "") else ""
    if isinstance(value, BaseModel):
        return "" if not hasattr(value, "teacher") else f"`{value.teacher}`"
    text = str(value) if isinstance(value, str | Path) else json.dumps(value)
    return f"`{text}`" if re.fullmatch(r".+", text) else ""


if __name__ == "__main__":
    print(reference())
