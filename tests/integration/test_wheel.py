"""`pip install .` gives a working `ted-ds`: from another folder, with no clone in reach."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.project import make_project, write_recipe

ROOT = Path(__file__).parents[2]
SOURCES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "constraints.txt")
FOLDERS = ("ted_ds", "ds_configs", "launchers")


def run(*command: object, cwd: Path, code: int = 0) -> str:
    """What it prints, on stderr if it fails; without a variable that could bring the clone or another rank in."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RANK", "WORLD_SIZE", "LOCAL_RANK")}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr if code else done.stdout


def pip(*words: object, cwd: Path) -> None:
    """pip that takes nothing from an index."""
    run(sys.executable, "-m", "pip", *words, "--quiet", "--no-index", "--no-deps", cwd=cwd)


def build_wheel(source: Path, folder: Path) -> Path:
    pip("wheel", source, "--no-build-isolation", "--wheel-dir", folder, cwd=folder.parent)
    (wheel,) = folder.glob("*.whl")
    return wheel


def contents(wheel: Path) -> dict[str, str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources alone: a build leaves folders beside them."""
    folder = tmp_path_factory.mktemp("clone")
    for name in SOURCES:
        shutil.copy(ROOT / name, folder)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def wheel(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(clone, tmp_path_factory.mktemp("built"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with the wheel alone; dependencies are those of the running one, by a path.

    A path in a .pth file brings packages, but not the running environment's own .pth files, of which an editable
    install of the clone is one.
    """
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    paths = {name: sysconfig.get_path(name) for name in ("purelib", "platlib")}
    site = Path(
        run(folder / "bin/python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    )
    (site / "dependencies.pth").write_text("\n".join(dict.fromkeys(paths.values())) + "\n")
    pip("--python", folder / "bin/python", "install", wheel, cwd=folder)
    return folder / "bin"


def test_the_wheel_has_what_lies_beside_the_package(clone: Path, wheel: Path) -> None:
    files = {path for name in ("ds_configs", "launchers") for path in (clone / name).rglob("*") if path.is_file()}
    shipped = {f"ted_ds/shipped/{path.relative_to(clone)}" for path in files}
    assert shipped | {"ted_ds/py.typed"} <= contents(wheel).keys()


def test_an_sdist_builds_the_same_wheel(clone: Path, wheel: Path, tmp_path: Path) -> None:
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, tmp_path, cwd=clone)
    (sdist,) = tmp_path.glob("*.tar.gz")
    assert contents(build_wheel(sdist, tmp_path)) == contents(wheel)


def test_a_recipe_runs_from_another_folder(installed: Path, tmp_path: Path) -> None:
    """Its DeepSpeed file, `ds_configs/zero3.json`, is the wheel's, as are the launchers."""
    where = run(installed / "python", "-c", "import ted_ds; print(ted_ds.__path__[0])", cwd=tmp_path).strip()
    assert Path(where).is_relative_to(installed.parent)
    project = make_project(tmp_path / "project")
    recipe = write_recipe(project, "run", method="ce", train__steps=2, train__save_every=0, data__validation=[])
    summary = json.loads(run(installed / "ted-ds", "distill", "--config", recipe, cwd=tmp_path))
    assert summary["steps"] == 2
    assert (project / "run/student/model.safetensors").exists()
    launcher = Path(where, "shipped/launchers/pretrain.sh")
    assert os.access(launcher, os.X_OK)
    said = run(installed / "python", launcher, "--config", "nowhere.yaml", cwd=tmp_path, code=2)
    assert said == "ted_ds: nowhere.yaml: the recipe cannot be read: No such file or directory\n"
