from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.ranks import recorded, run
from tests.project import make_project, write_recipe

LONG = {"train__steps": 16, "filters__steps": 8, "train__save_every": 3, "train__evaluate_every": 4}


@pytest.fixture(scope="session")
def fault_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny project; `undisturbed` in it is a run of two ranks that nobody disturbed."""
    project = make_project(tmp_path_factory.mktemp("faults"))
    run(2, write_recipe(project, "undisturbed", **LONG), logs=project / "logs/undisturbed")
    return project


@pytest.fixture(scope="session")
def undisturbed(fault_project: Path) -> dict[str, list[dict[str, object]]]:
    """What it recorded."""
    return recorded(fault_project / "undisturbed")


@pytest.fixture
def disturbed(fault_project: Path) -> Callable[..., tuple[Path, Path]]:
    """disturbed(name): a recipe for the same run in a folder of its own, and where its ranks' logs go."""

    def write(name: str, **changes: object) -> tuple[Path, Path]:
        return write_recipe(fault_project, name, **{**LONG, **changes}), fault_project / "logs" / name

    return write
