"""ThreadSanitizer over the engine's C: vCPUs side by side and a host that does everything to them (see races.c)."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.fuzz.build import build, compiler

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.skipif(compiler("thread") is None, reason="needs a compiler with ThreadSanitizer"),
]


@pytest.fixture(scope="module")
def races(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("races"), "thread", "races")


def run(races: Path, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    # Where the kernel scatters addresses widely there is no room for the sanitizer's own.
    still = ["setarch", "-R"]
    if subprocess.run([*still, "true"], capture_output=True).returncode:
        still = []
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1 history_size=4"}
    return subprocess.run([*still, races, *arguments], capture_output=True, text=True, timeout=timeout, env=environment)


def test_no_races(races: Path, pytestconfig: pytest.Config) -> None:
    """Interpreter and compiled code, side by side and in turns, with faults; --soak gives it ten minutes."""
    done = run(races, "--seconds", "600" if pytestconfig.getoption("--soak") else "15", timeout=900)
    assert done.returncode == 0, done.stderr
    counts = re.fullmatch(r"(\d+) rounds, (\d+) loops, (\d+) exits, (\d+) of them aborts, (\d+) lives\n", done.stdout)
    assert counts is not None, done.stdout
    rounds, loops, exits, aborts, lives = map(int, counts.groups())
    assert loops > 10 * rounds
    assert lives > 4 * rounds  # vCPUs came and went
    assert min(exits, aborts) > 0


def test_a_race_is_found(races: Path) -> None:
    """A thread that reads another vCPU's exit while that runs ends the program, and is named."""
    done = run(races, "--seconds", "1", "--plant")
    assert done.returncode != 0
    assert "data race" in done.stderr
    assert "exit_to_host" in done.stderr
