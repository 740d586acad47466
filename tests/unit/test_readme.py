from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.tiny_models import tiny_model

README = Path(__file__).parents[2] / "README.md"


def test_the_readmes_loop_runs_as_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    assert "deepspeed" not in code and len(code.splitlines()) <= 35
    for name, blocks, width in (("teacher", 4, 24), ("student", 2, 16)):
        tiny_model("llama", blocks=blocks, width=width).save_pretrained(tmp_path / name)
    ids = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(0))
    names = {"TEACHER": str(tmp_path / "teacher"), "STUDENT": str(tmp_path / "student"), "batches": [ids] * 6}
    capsys.readouterr()
    exec(code, names)
    losses = [float(line) for line in capsys.readouterr().out.split()]
    assert len(losses) == 6 and losses[-1] < losses[0]
