"""Hostile guests: random instruction streams over random page tables, the engine under sanitizers (engine.c has more).

No guest action reads or writes host memory outside guest RAM, ends the process, or outlasts a kick; and interpreter and
compiled code leave the same state. A failure prints its seed: ``python -m tests.fuzz.build SEED`` repeats it.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.fuzz.build import build, compiler

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.skipif(compiler() is None, reason="needs a compiler with AddressSanitizer"),
]

SEEDS = [line.split()[0] for line in Path(__file__).with_name("seeds.txt").read_text().splitlines() if line[:1] != "#"]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("fuzz"))


def run(engine: Path, *arguments: str, timeout: float = 900) -> subprocess.CompletedProcess[str]:
    return subprocess.run([engine, *arguments], capture_output=True, text=True, timeout=timeout)


def test_seeds_that_found_something(engine: Path) -> None:
    done = run(engine, *SEEDS)
    assert done.returncode == 0, done.stderr


def test_random_guests(engine: Path, pytestconfig: pytest.Config) -> None:
    """The same seed, the same guests; --soak gives them ten minutes."""
    start = str(int(pytestconfig.getoption("--oracle-seed")) << 32)
    much = ("--seconds", "600") if pytestconfig.getoption("--soak") else ("--count", "400")
    done = run(engine, "--from", start, *much)
    assert done.returncode == 0, done.stderr
    counts = re.fullmatch(r"(\d+) compared, (\d+) kicked, (\d+) free, (\d+) crowds, (\d+) exits\n", done.stdout)
    assert counts is not None, done.stdout
    compared, _, free, crowds, exits = map(int, counts.groups())
    assert min(compared, free, crowds) > 20
    assert exits > 10 * compared  # guests get somewhere


@pytest.mark.parametrize("distance", ["0", "4096", "1073741824"])
def test_what_leaves_guest_memory_is_caught(engine: Path, distance: str) -> None:
    """The guards guard: a write just beyond guest RAM, or far beyond it, ends the program."""
    done = run(engine, "--escape", distance)
    assert done.returncode != 0
    assert "SEGV" in done.stderr
