"""Rows that cannot be used: all of them counted, a few shown, and left out if the recipe says so."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from ted_ds.errors import DataError

logger = logging.getLogger("ted_ds")

SHOWN = 3
"""Bad rows that are kept to be shown, however many there are."""


class BadRow(DataError):
    """One row, line or question that cannot be used, in a file whose next row can be read.

    problem: where the row is, and what is wrong with it. remedy: what else can be done than to fix or drop it.
    """

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem, remedy)  # its arguments: pickle makes it anew from these
        self.problem, self.remedy = problem, remedy

    def __str__(self) -> str:
        return f"{self.problem}: {_remedies('the row', [self])}"


class BadRows:
    """The bad rows of one split, or of one pass over its files.

    skip: they are left out, and one warning says how many; False: the split is refused once all of them are known;
    None: likewise, by a command that has no recipe in which `data.skip_bad_rows` could be set.

    Whoever reads the whole split opens it, and hands it to the readers, which `add` to it:

        with BadRows(skip=...) as bad:
            for row in rows_of(entries, bad):
                ...

    Leaving the `with` without another error raises DataError if rows are refused, or warns of those left out.
    """

    def __init__(self, *, skip: bool | None) -> None:
        self._skip = skip
        self._shown: list[BadRow] = []
        self.count = 0

    def add(self, row: BadRow) -> None:
        """Counts one row; the reader goes on with the next."""
        self.count += 1
        if len(self._shown) < SHOWN:
            self._shown.append(row)

    @property
    def refused(self) -> bool:
        """Whether the split is going to be refused: what is left to do is to count the other bad rows."""
        return self.count > 0 and not self._skip

    def nothing_left(self) -> DataError:
        """The error of a split that has bad rows alone."""
        return DataError(f"no row is left: {self._described()}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None or not self.count:
            return
        if self._skip:
            left_out = "1 bad row is" if self.count == 1 else f"{self.count} bad rows are"
            logger.warning("%s left out: %s", left_out, self._problems())
            return
        offer = "" if self._skip is None else ", or set data.skip_bad_rows: true, which leaves them out"
        raise DataError(self._described() + offer)

    def _described(self) -> str:
        if self.count == 1:
            return str(self._shown[0])
        return f"{self.count} rows cannot be used: {self._problems()}: {_remedies('such rows', self._shown)}"

    def _problems(self) -> str:
        more = self.count - len(self._shown)
        return "; ".join(row.problem for row in self._shown) + (f"; and {more} more" if more else "")


def _remedies(what: str, rows: Sequence[BadRow]) -> str:
    return ", or ".join(dict.fromkeys([f"fix or drop {what}", *(row.remedy for row in rows if row.remedy)]))
