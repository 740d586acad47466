"""Families of causal LMs give what docs/families.md says of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.families import PARTS, RIGHT, check_family
from tests.marks import slow
from tests.workers import Workers

PAGE = (Path(__file__).parents[2] / "docs/families.md").read_text(encoding="utf-8")
CELLS = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if line.startswith("| ")]
TABLE = {cells[0]: cells[1:-1] for cells in CELLS[1:]}

IN_MAKE_TEST = (*("llama", "gpt2", "gpt_neox", "qwen3", "gemma3_text", "cohere", "deepseek_v3", "diffllama"),)


def test_at_least_45_families_are_right() -> None:
    assert len([cells for cells in TABLE.values() if cells.count(RIGHT) >= 4]) >= 45
    assert not [family for family, cells in TABLE.items() if "WRONG" in cells]


@pytest.mark.parametrize("family", [f if f in IN_MAKE_TEST else slow(f) for f in TABLE])
def test_a_family_gives_what_the_table_says(tmp_path: Path, workers: Callable[[int], Workers], family: str) -> None:
    (found,) = workers(1).run(check_family, tmp_path / "project", family)
    assert [found[part].partition(":")[0] for part in PARTS] == TABLE[family], found
