"""The golden cases in the suite, and that the comparison can fail."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.golden.check import check

CASES = sorted((Path(__file__).parent / "cases").iterdir())
CHECK = Path(__file__).parent / "check.py"


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.name)
def test_the_papers_code_computes_the_same(case: Path) -> None:
    report = check(case)
    assert report["failed"] == []
    names = {f"{what}_{kind}" for what in ("ted", "lwd", "kd") for kind in ("loss", "gradient", "trajectory", "states")}
    names |= {"stage1_loss", "stage1_gradient", "stage1_trajectory", "ted_masked_layer_loss", "lwd_masked_layer_loss"}
    assert report["float32"].keys() == report["float64"].keys() == names
    for kind, float32, float64 in (("loss", 2e-6, 1e-13), ("trajectory", 1e-5, 1e-13), ("gradient", 2e-6, 2e-6)):
        for what in ("ted", "lwd", "kd", "stage1"):
            assert report["float32"][f"{what}_{kind}"] < float32 and report["float64"][f"{what}_{kind}"] < float64


def test_the_command_prints_a_line_a_case_and_fails_on_a_wrong_one(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    shutil.copytree(CASES[0], wrong)
    manifest = json.loads((wrong / "manifest.json").read_text())
    manifest["stage2"]["ted"]["float32"]["kl_loss"] *= 1 + 1e-3
    manifest["stage1"]["student"]["float64"]["trajectory"][10] *= 1 + 1e-6
    (wrong / "manifest.json").write_text(json.dumps(manifest))
    done = subprocess.run([sys.executable, CHECK, CASES[0], wrong], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    # DeepSpeed may say on stdout which accelerator it found
    good, bad = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert (good["case"], good["failed"]) == (CASES[0].name, [])
    assert bad["failed"] == ["float32 ted_loss", "float64 stage1_trajectory"]
