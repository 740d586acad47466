"""The layering: who may import what, and who may read the environment. Reads the AST, imports nothing."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "ted_ds"
FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path, *, top_level: bool = False) -> Iterator[str]:
    """The modules that a file imports, `from a import b` as both a and a.b."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(path: Path, *places: str) -> bool:
    return path.relative_to(PACKAGE).as_posix().startswith(places)


def importers(root_module: str) -> set[Path]:
    return {f for f in FILES if any(m.split(".")[0] == root_module for m in imported(f))}


def test_config_imports_errors_alone():
    for path in (PACKAGE / "config").glob("*.py"):
        modules = set(imported(path))
        own = {m for m in modules if m.startswith("ted_ds.")}
        assert all(m.startswith(("ted_ds.config", "ted_ds.errors")) for m in own), (path, own)
        assert not {m.split(".")[0] for m in modules} & {"torch", "transformers", "deepspeed", "datasets"}, path


def test_deepspeed_is_imported_where_it_is_hosted():
    strangers = [
        f
        for f in importers("deepspeed")
        if not within(f, "job/world.py", "models/", "teacher/hosting.py", "distill/", "doctor/estimate.py")
    ]
    assert not strangers


def test_the_environment_is_read_at_the_edges():
    readers = []
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        attributes = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        if attributes & {"environ", "getenv"} or {"os.environ", "os.getenv"} & set(imported(path)):
            readers.append(path)
    assert not [f for f in readers if not within(f, "job/world.py", "cli/")]


def test_folders_do_not_import_each_other_in_a_circle():
    """A folder of ted_ds, and a file beside them, is one node: imports inside functions count too."""
    graph: dict[str, set[str]] = {}
    for path in FILES:
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if own != "__init__":
            others = {name.split(".")[1] for name in imported(path) if name.startswith("ted_ds.")}
            graph.setdefault(own, set()).update(others - {own})
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("module", ["ted_ds", "ted_ds.config.load", "ted_ds.config.deepspeed"])
def test_reading_a_recipe_imports_nothing_heavy(module):
    code = (
        f"import sys, {module}, ted_ds; ted_ds.load_config; "
        "print([m for m in ('torch', 'transformers', 'deepspeed', 'datasets', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_has_its_home_and_a_rank_imports_no_more_than_most_runs_need():
    code = (
        "import sys, ted_ds; [getattr(ted_ds, name) for name in ted_ds.__all__]; print(ted_ds.__version__); "
        "print([m for m in ('datasets', 'pandas', 'sklearn', 'scipy.stats', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["0.1.0", "[]"]  # DeepSpeed may speak before
