from __future__ import annotations

import json
from pathlib import Path

import pytest

from ted_ds.checkpoint.store import CARD, Card, _seal, latest_tag


@pytest.mark.parametrize(
    ("there", "saved", "keep", "left"),
    [
        ((100, 200), 300, 2, (200, 300)),
        ((100, 200), 300, 1, (300,)),
        ((200, 400), 300, 1, (300,)),  # 400 was torn, or is of a run that went on from 200
        ((100, 200, 400), 300, 5, (100, 200, 300)),
        ((), 300, 1, (300,)),
    ],
)
def test_what_is_kept_is_the_saved_one_and_those_before_it(
    tmp_path: Path, there: tuple[int, ...], saved: int, keep: int, left: tuple[int, ...]
) -> None:
    for step in (*there, saved):
        (tmp_path / f"step-{step:08d}").mkdir()
        (tmp_path / f"step-{step:08d}/states.pt").write_bytes(bytes(step))
    _seal(tmp_path, f"step-{saved:08d}", Card(saved, 2, "model"), keep)
    assert [int(p.name[5:]) for p in sorted(tmp_path.glob("step-*"))] == list(left)
    assert latest_tag(tmp_path) == f"step-{saved:08d}"
    card = json.loads((tmp_path / f"step-{saved:08d}" / CARD).read_text())
    assert card == {"step": saved, "world_size": 2, "model": "model", "files": {"states.pt": saved}}


def test_no_checkpoint_has_no_tag(tmp_path: Path) -> None:
    assert latest_tag(tmp_path) is None
