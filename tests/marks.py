"""Which cases `make test` leaves to `make test-all`."""

from __future__ import annotations

from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """A case of a parametrized test whose like is in `make test` already."""
    return pytest.param(*values, marks=pytest.mark.slow)
