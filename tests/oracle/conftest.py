"""One comparison serves all tests: it is the two machines that cost, not the cases."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("unicorn", reason="the oracle is Unicorn: pip install 'avmm[test]'")

from tests.oracle.compare import Comparison


@pytest.fixture(scope="package")
def comparison() -> Iterator[Comparison]:
    """softhv beside Unicorn."""
    comparison = Comparison()
    yield comparison
    comparison.close()
