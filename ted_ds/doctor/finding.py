"""A finding of the doctor and the line that it prints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "FAIL", ""]

GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """The result of one check. status "": a figure that belongs to the next finding. advice: what to change."""

    status: Status
    check: str
    what: str
    advice: str = ""

    def __str__(self) -> str:
        what = f"{self.what.rstrip('.')}: {self.advice}" if self.advice else self.what
        return f"{self.status:4}  {self.check:15}  {' '.join(what.split())}" if self.status else f"{'':23}{what}"


def gib(size: float) -> str:
    """Bytes in GiB, or in MiB if they are less than 0.1 GiB."""
    if size < GIB / 10:
        return f"{size / 2**20:.1f} MiB"
    return f"{size / GIB:.1f} GiB" if size >= 10 * GIB else f"{size / GIB:.2f} GiB"
