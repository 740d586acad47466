from __future__ import annotations

import logging
import pickle

import pytest

from ted_ds.data.bad_rows import BadRow, BadRows
from ted_ds.errors import DataError


def collect(skip: bool | None, *rows: BadRow) -> BadRows:
    with BadRows(skip=skip) as bad:
        for row in rows:
            bad.add(row)
    return bad


def rows(count: int) -> list[BadRow]:
    return [BadRow(f"f, line {i}: no text") for i in range(1, count + 1)]


OFFER = ", or set data.skip_bad_rows: true, which leaves them out"


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (rows(1), "f, line 1: no text: fix or drop the row"),
        (rows(2), "2 rows cannot be used: f, line 1: no text; f, line 2: no text: fix or drop such rows"),
        (
            [rows(1)[0], BadRow("f, line 9: no label", "label it"), *rows(3)],
            "5 rows cannot be used: f, line 1: no text; f, line 9: no label; f, line 1: no text; and 2 more: "
            "fix or drop such rows, or label it",
        ),
    ],
)
def test_all_are_counted_and_a_few_shown(found: list[BadRow], message: str) -> None:
    for skip, offer in ((False, OFFER), (None, "")):
        with pytest.raises(DataError) as error:
            collect(skip, *found)
        assert str(error.value) == message + offer


def test_they_are_left_out_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "ted_ds"):
        assert collect(True, *rows(1000)).count == 1000
        collect(True, *rows(1))
        collect(True)
    assert [record.getMessage() for record in caplog.records] == [
        "1000 bad rows are left out: f, line 1: no text; f, line 2: no text; f, line 3: no text; and 997 more",
        "1 bad row is left out: f, line 1: no text",
    ]


def test_an_error_of_the_file_goes_before_those_of_its_rows() -> None:
    with pytest.raises(DataError, match=r"^torn$"), BadRows(skip=False) as bad:
        bad.add(rows(1)[0])
        raise DataError("torn")


def test_readers_know_when_nothing_will_come_of_it() -> None:
    assert not collect(False).refused and not collect(True, *rows(1)).refused
    bad = BadRows(skip=False)
    bad.add(rows(1)[0])
    assert bad.refused
    assert str(bad.nothing_left()) == "no row is left: f, line 1: no text: fix or drop the row"


def test_a_row_that_nobody_collects_is_an_error_by_itself() -> None:
    with pytest.raises(DataError, match=r"^f, line 1: no text: fix or drop the row$"):
        raise pickle.loads(pickle.dumps(rows(1)[0]))  # rank 0's reach the others so
