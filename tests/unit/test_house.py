"""The house's own rules: small files, small functions, folders that say what they are for."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "ted_ds"
FILES = sorted(PACKAGE.rglob("*.py"))

LONGEST_FILE, LONGEST_FUNCTION = 350, 60

LONG_FUNCTIONS = {"logit_kernels.py:_dense_rows", "logit_kernels.py:_top_k_rows"}
"""A Triton kernel is one program: its two passes over a row share a dozen values, and its signature takes a quarter."""


def test_no_file_is_long():
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert not {path.name: count for path, count in lines.items() if count > LONGEST_FILE}


def test_no_function_is_long():
    long = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                if node.end_lineno - node.lineno + 1 > LONGEST_FUNCTION:
                    long.append(f"{path.name}:{node.name}")
    assert set(long) == LONG_FUNCTIONS


def test_every_folder_says_in_one_sentence_what_it_is_for():
    for folder in sorted({path.parent for path in FILES}):
        if folder != PACKAGE:
            text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
            assert text and "\n\n" not in text and text.endswith("."), folder
            assert ". " not in text, folder


def test_a_file_stem_occurs_once():
    """A file of cli/ has the name of its command."""
    stems = [path.stem for path in FILES if path.stem != "__init__" and path.parent.name != "cli"]
    assert not {stem for stem in stems if stems.count(stem) > 1}
