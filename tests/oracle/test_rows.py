"""Every row of softhv's decode table against Unicorn: random encodings in random states, one instruction at a time."""

from __future__ import annotations

import pytest

from tests.oracle.cases import Row, Table
from tests.oracle.compare import Comparison
from tests.oracle.exceptions import SKIPS, skip_of_row
from tests.oracle.machine import Outcome

pytestmark = pytest.mark.oracle

ROWS = Table().rows


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_row(comparison: Comparison, row: Row, pytestconfig: pytest.Config) -> None:
    skip = skip_of_row(row.name)
    if skip is not None:
        pytest.skip(skip.reason)
    report = comparison.row(row, pytestconfig.getoption("--oracle-cases"), pytestconfig.getoption("--oracle-seed"))
    assert not report.mismatches, "\n".join(map(str, report.mismatches))
    assert report.compared, f"no case of {row.name} was compared: {dict(report.skipped)}"
    executed = report.compared - report.outcomes[Outcome.UNDEFINED]
    assert executed, f"{row.name} is nothing but UNDEFINED: the row is dead, or Unicorn lacks it (list it then)"


def test_row_names_are_unique() -> None:
    names = [row.name for row in ROWS]
    assert len(names) == len(set(names))


def test_every_skip_covers_something() -> None:
    unused = [skip.rows for skip in SKIPS if not any(skip.covers(row.name) for row in ROWS) and skip.when is None]
    assert not unused
