from __future__ import annotations

import runpy
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_page_of_all_keys_is_what_the_schema_says() -> None:
    page = runpy.run_path(str(DOCS / "configuration.py"))["reference"]()
    assert (DOCS / "configuration.md").read_text(encoding="utf-8").rstrip() == page.rstrip(), (
        "make it anew: python docs/configuration.py > docs/configuration.md"
    )
