"""What a user wrote, if YAML read something else: `no` is false to it, and 010 is 8."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from typing import Any

import yaml

STRING_TAG = "tag:yaml.org,2002:str"


def scalar_text(text: str, key: Sequence[str]) -> str | None:
    """The text of the scalar at `key` (names, and numbers of a list's places); None if there is none, or a string."""
    node = yaml.compose(text, yaml.SafeLoader)
    for part in key:
        if isinstance(node, yaml.MappingNode):
            node = next((value for name, value in node.value if name.value == part), None)
        elif isinstance(node, yaml.SequenceNode) and part.isdecimal() and int(part) < len(node.value):
            node = node.value[int(part)]
        else:
            return None
    return node.value if isinstance(node, yaml.ScalarNode) and node.tag != STRING_TAG else None


def misread(value: Any, text: str | None) -> str:
    """What to say of a value that was to be a word. text: as it is written, None if that is not known."""
    if value is None and not text:
        return "is empty: give it a value"
    if isinstance(value, bool) and (text is None or text.lower() in ("true", "false")):
        written = str(value).lower() if text is None else text
        return (
            f'YAML reads {written} as a boolean, and no, yes, on and off too: quote the word that is meant, as in "no"'
        )
    what = {bool: str(value).lower(), int: "a number", float: "a number", type(None): "nothing"}
    written = str(value) if text is None else text
    return f"YAML reads {written} as {what.get(type(value), 'a date')}: quote it: {json.dumps(written)}"


def is_misread(value: Any, fault_types: Sequence[str]) -> bool:
    """Whether pydantic wanted a word, and YAML made something else of one.

    A path that is a boolean is more likely meant as one (`cache: no`).
    """
    if "string_type" in fault_types:
        return value is None or isinstance(value, bool | int | float | datetime.date)
    return "path_type" in fault_types and isinstance(value, int | float | datetime.date) and not isinstance(value, bool)
