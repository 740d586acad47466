from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml

from ted_ds.config.load import load_config, read_yaml
from tests.tiny_models import tiny_model

README = Path(__file__).parents[2] / "README.md"


def test_the_readmes_loop_runs_as_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = README.parent / "docs/python.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    assert "deepspeed" not in code and len(code.splitlines()) <= 35
    for name, blocks, width in (("teacher", 4, 24), ("student", 2, 16)):
        tiny_model("llama", blocks=blocks, width=width).save_pretrained(tmp_path / name)
    ids = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(0))
    names = {"TEACHER": str(tmp_path / "teacher"), "STUDENT": str(tmp_path / "student"), "batches": [ids] * 6}
    capsys.readouterr()
    exec(code, names)
    losses = [float(line) for line in capsys.readouterr().out.split()]
    assert len(losses) == 6 and losses[-1] < losses[0]


DOCUMENTS = [README, *sorted((README.parent / "docs").rglob("*.md")), README.parent / "benchmarks/README.md"]
BLOCKS = [
    pytest.param(block, id=f"{path.relative_to(README.parent)}-{number}")
    for path in DOCUMENTS
    for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", path.read_text(encoding="utf-8"), re.S))
]
REST = {
    "output_dir": "runs/x",
    "teacher": {"model": "TEACHER"},
    "student": {"model": "STUDENT"},
    "data": {"train": ["a.csv"], "tokenizer": "TOKENIZER"},
}
"""What a recipe has to have, under the keys that a block has of its own."""


@pytest.mark.parametrize("block", BLOCKS)
def test_every_yaml_block_is_a_recipe_that_loads(block: str, tmp_path: Path) -> None:
    path = tmp_path / "block.yaml"
    path.write_text(block, encoding="utf-8")
    shown = read_yaml(path)
    for key, value in REST.items():
        if key not in shown:
            shown[key] = value
        elif key == "data":
            shown[key] = REST["data"] | shown[key]
    path.write_text(yaml.safe_dump(shown), encoding="utf-8")
    load_config(path)


def test_the_readmes_blocks_are_found() -> None:
    assert len(BLOCKS) >= 3
