"""Which code runs: the git commit of this copy of ted_ds, and the versions of the libraries below it."""

from __future__ import annotations

import subprocess
from importlib.metadata import version
from pathlib import Path


def versions() -> dict[str, str]:
    """The packages whose version may change a run's numbers."""
    return {name: version(name) for name in ("torch", "deepspeed", "transformers")}


def commit() -> str | None:
    """The git commit of the code that runs; None outside of its own checkout.

    An installed copy may lie within the checkout of another project, whose commit says nothing.
    """
    package = Path(__file__).resolve().parents[1]
    call = ["git", "-C", str(package), "rev-parse", "HEAD", "--show-prefix"]
    try:
        head, prefix = subprocess.run(call, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None
    return head if prefix == f"{package.name}/" else None
