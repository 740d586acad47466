"""What a user installs: versions that an index can give, pip's own variables, and the files that a wheel carries."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ted_ds.config import shipped
from ted_ds.config.load import load_config
from ted_ds.errors import ConfigError
from ted_ds.job import versions

ROOT = Path(__file__).resolve().parents[2]

MINORS = [*range(11, 15)]
"""3.x: the Pythons that setup.py allows."""


def test_the_makefile_and_the_readme_name_the_pythons_that_setup_allows() -> None:
    first, last = MINORS[0], MINORS[-1]
    assert f'python_requires=">=3.{first},<3.{last + 1}"' in (ROOT / "setup.py").read_text()
    makefile = (ROOT / "Makefile").read_text()
    assert f"(3, {first}) <= v <= (3, {last})" in makefile
    assert makefile.count(f"Python 3.{first} to 3.{last}") == 2
    assert f"Python 3.{first} to 3.{last}" in (ROOT / "README.md").read_text()


def test_the_setup_resolves_against_a_plain_index_for_every_python() -> None:
    """By metadata alone, nothing is installed: a pin that contradicts what torch's own wheels name fails here."""
    uv = pytest.importorskip("uv").find_uv_bin()
    # neither this machine's indexes nor its settings: what a machine with the package index alone gets
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("UV_", "PIP_"))}
    command = [uv, "pip", "compile", "--quiet", "--no-config", "--no-python-downloads", "--python", sys.executable]
    command += ["setup.py", "--extra", "dev", "--constraint", "constraints.txt"]
    running = {
        minor: subprocess.Popen(
            [*command, "--python-version", f"3.{minor}"],
            cwd=ROOT,
            env=plain | {"UV_HTTP_RETRIES": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for minor in MINORS
    }
    done = {minor: process.communicate() for minor, process in running.items()}
    if offline := [errors for _, errors in done.values() if "Failed to fetch" in errors]:
        pytest.skip(f"the package index is not reached: {offline[0].strip().splitlines()[-1].strip()}")
    for minor, (resolved, errors) in done.items():
        assert running[minor].returncode == 0, f"Python 3.{minor}: {errors}"
        assert re.search(r"^torch==", resolved, re.M)


def test_the_makefile_passes_pips_variables_on(tmp_path: Path) -> None:
    """As `PIP_EXTRA_INDEX_URL=... make venv`, which takes torch from an index of CPU wheels."""
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho "$PIP_EXTRA_INDEX_URL: $*"\n')
    python.chmod(0o755)
    command = ["make", "--no-print-directory", "venv", f"VENV={tmp_path}", f"PYTHON={sys.executable}"]
    given = {"PATH": os.environ["PATH"], "PIP_EXTRA_INDEX_URL": "an index"}
    done = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, check=True)
    calls = [line for line in done.stdout.splitlines() if " -m pip install " in line and not line.startswith("/")]
    assert calls and all(line.startswith("an index: -m pip install ") for line in calls), done.stdout


def test_the_makefile_refuses_another_python(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f"""#!/bin/sh
exec {sys.executable} -c "import sys; sys.version_info = (3, 10); exec(sys.argv[1])" "$2"
""")
    python.chmod(0o755)
    done = subprocess.run(
        ["make", "venv", f"VENV={tmp_path / 'venv'}", f"PYTHON={python}"], cwd=ROOT, capture_output=True, text=True
    )
    said = f"ted_ds needs Python 3.11 to 3.14, {python} is 3.10: run make PYTHON=python3.13"
    assert (done.returncode, done.stderr.splitlines()[0]) == (2, said)


def test_a_wheels_own_files_come_before_what_lies_beside_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shipped.shipped_folder() == ROOT
    monkeypatch.setattr(shipped, "PACKAGE", tmp_path / "site-packages/ted_ds")
    assert shipped.shipped_folder() == tmp_path / "site-packages"
    inside = tmp_path / "site-packages/ted_ds/shipped"
    inside.mkdir(parents=True)
    assert shipped.shipped_folder() == inside


def test_shipped_recipes_are_found_from_anywhere_and_own_ones_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "launchers/recipes/quickstart.yaml"
    assert load_config(name).train.steps == 70
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text((ROOT / name).read_text().replace("steps: 70", "steps: 7"))
    assert load_config(name).train.steps == 7
    with pytest.raises(ConfigError, match=r"^launchers/nope.yaml: the recipe cannot be read: No such file"):
        load_config("launchers/nope.yaml")


def test_the_commit_is_that_of_ted_ds_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment often lies in a checkout of the user's own project."""

    def git(*words: str) -> str:
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        call = ["git", "-C", str(tmp_path), *identity, *words]
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()

    git("init")
    git("commit", "--allow-empty", "-m", "x")
    for folder, expected in (("ted_ds", git("rev-parse", "HEAD")), (".venv/site-packages/ted_ds", None)):
        (tmp_path / folder).mkdir(parents=True)
        monkeypatch.setattr(versions, "__file__", str(tmp_path / folder / "job/versions.py"))
        assert versions.commit() == expected
