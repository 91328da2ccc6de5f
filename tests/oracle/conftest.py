"""One comparison serves all tests: it is the two machines that cost, not the cases."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("unicorn", reason="the oracle is Unicorn: pip install 'avmm[test]'")

from tests.oracle.compare import Comparison


@pytest.fixture(scope="package", params=[False, True], ids=["interpreted", "compiled"])
def comparison(request: pytest.FixtureRequest) -> Iterator[Comparison]:
    """softhv beside Unicorn."""
    comparison = Comparison(request.param)
    yield comparison
    comparison.close()
