"""Logging: silent until the program asks for it."""

import subprocess
import sys

import structlog

from avmm.log import log


def test_events_reach_a_configured_structlog() -> None:
    bound = log.bind(kernel="Image")
    with structlog.testing.capture_logs() as seen:
        bound.info("vm.started", cpus=2)
    assert seen == [{"event": "vm.started", "log_level": "info", "kernel": "Image", "cpus": 2}]


def test_nothing_is_printed_or_imported_otherwise() -> None:
    code = "from avmm.log import log; log.warning('x', y=1); import sys; assert 'structlog' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout == done.stderr == b""
    code = "from avmm.log import log; import structlog; log.warning('x', y=1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout == done.stderr == b""
