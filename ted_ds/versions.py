"""Which code runs: the commit of this copy of ted_ds, and the versions of what it stands on."""

from __future__ import annotations

import subprocess
from importlib.metadata import version
from pathlib import Path


def versions() -> dict[str, str]:
    """The packages whose version may change a run's numbers."""
    return {name: version(name) for name in ("torch", "deepspeed", "transformers")}


def commit() -> str | None:
    """The git commit of the code that runs; None outside a checkout."""
    call = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
