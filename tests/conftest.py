"""What every test gets."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

# How long a busy machine takes to make up data says nothing about the code.
settings.register_profile("avmm", suppress_health_check=[HealthCheck.too_slow], deadline=None)
settings.load_profile("avmm")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of our own tests."""
    group = parser.getgroup("avmm's own tests")
    group.addoption("--oracle-cases", type=int, default=100, help="cases per instruction row (default 100)")
    group.addoption("--oracle-seed", default="1", help="the same seed gives the same cases (default 1)")
    group.addoption("--soak", action="store_true", help="run the tests that take minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the long ones unless asked for."""
    if config.getoption("--soak"):
        return
    skip = pytest.mark.skip(reason="takes minutes: run with --soak")
    for item in items:
        if item.get_closest_marker("soak"):
            item.add_marker(skip)
