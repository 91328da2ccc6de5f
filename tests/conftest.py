"""What every test gets."""

from __future__ import annotations

import signal
import sys

import pytest
from hypothesis import HealthCheck, settings

#: ``avmm boot`` as tests start it, with as many vCPUs as ``--cpus`` asks for; a later ``-c`` has the last word.
AVMM_BOOT = [sys.executable, "-m", "avmm.cli", "boot"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of our own tests."""
    group = parser.getgroup("avmm's own tests")
    group.addoption("--oracle-cases", type=int, default=100, help="cases per instruction row (default 100)")
    group.addoption("--oracle-seed", default="1", help="the same seed gives the same cases (default 1)")
    group.addoption("--cpus", type=int, default=1, help="vCPUs of guests for which a test names no number (default 1)")
    group.addoption("--soak", action="store_true", help="run the tests that take minutes")


def pytest_configure(config: pytest.Config) -> None:
    """Give guests ``--cpus`` vCPUs; let SIGINT end programs, which those of a shell's background job are deaf to."""
    # How long a busy machine takes to make up data says nothing about the code; and without --soak the data are those
    # of every other run, so that what fails was broken by a change.
    settings.register_profile(
        "avmm",
        suppress_health_check=[HealthCheck.too_slow],
        deadline=None,
        derandomize=not config.getoption("--soak"),
        database=None,
    )
    settings.load_profile("avmm")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if (cpus := config.getoption("--cpus")) != 1:
        from avmm.vm import boot

        assert boot.__kwdefaults__ is not None
        boot.__kwdefaults__["cpus"] = cpus
        AVMM_BOOT.extend(["-c", str(cpus)])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the long ones unless asked for."""
    if config.getoption("--soak"):
        return
    skip = pytest.mark.skip(reason="takes minutes: run with --soak")
    for item in items:
        if item.get_closest_marker("soak"):
            item.add_marker(skip)
