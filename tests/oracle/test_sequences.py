"""Programs of 10 to 50 instructions, loads, stores, exclusives, atomics and floating point mixed, against Unicorn."""

from __future__ import annotations

import pytest

from tests.oracle import sequences
from tests.oracle.compare import Comparison
from tests.oracle.machine import Outcome

pytestmark = pytest.mark.oracle


@pytest.mark.parametrize("shape", sequences.SHAPES)
def test_sequences(comparison: Comparison, shape: str, pytestconfig: pytest.Config) -> None:
    count = 10 * pytestconfig.getoption("--oracle-cases")
    report = sequences.run(comparison, count, pytestconfig.getoption("--oracle-seed"), shape)
    assert not report.mismatches, "\n".join(map(str, report.mismatches))
    assert report.outcomes == {Outcome.DONE: count}
