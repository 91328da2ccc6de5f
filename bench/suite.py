"""A suite of one-line tests: avmm's `vm` fixture (a fork for each) beside a QEMU for each, and one QEMU for all.

python bench/suite.py [-n TESTS] [--boots BOOTS]

A QEMU boot for each of a hundred tests takes minutes: ``--boots`` of them are timed, and multiplied. The shared VM is
what the NixOS driver's style comes to: no isolation between tests.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from side_by_side import QEMU, guest, headline, require_qemu

SUITE = """
import pytest

@pytest.mark.parametrize("number", range({count}))
async def test_one_line(vm, number):
    assert (await vm.run("uname", "-r")).stdout.startswith(b"6.")
"""


def ours(count: int) -> tuple[float, float]:
    """Seconds that pytest takes for it, and of those the ones from one test's end to the next one's, at the median."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "test_suite.py").write_text(SUITE.format(count=count))
        ini = "[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\n"
        Path(folder, "pytest.ini").write_text(ini)
        argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=0", "-vv"]
        began = time.perf_counter()
        done = subprocess.run(argv, cwd=folder, capture_output=True, text=True)
        took = time.perf_counter() - began
    if f"{count} passed" not in done.stdout:
        sys.exit(done.stdout[-3000:])
    phases: dict[str, float] = {}
    for seconds, test in re.findall(r"(?m)^([\d.]+)s \w+ +\S+\[(\d+)\]$", done.stdout):
        phases[test] = phases.get(test, 0.0) + float(seconds)
    return took, statistics.median(phases.values())


class Shell:
    """A shell on the serial console of a QEMU."""

    def __init__(self) -> None:
        debian = guest()
        argv = QEMU.command(debian.kernel, debian.initrd, 512, 1, "")
        self._process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
        )
        self._seen = b""
        self._number = 0
        self._until(b"ready")
        self._type(b"stty -echo; PS1=; echo be''gin\n")
        self._until(b"begin")

    def run(self, line: str) -> bytes:
        """The output of a command."""
        self._number += 1
        self._type(f"{line}; echo en''d{self._number}.\n".encode())
        return self._until(b"end%d." % self._number)

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()

    def _type(self, line: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line)

    def _until(self, text: bytes) -> bytes:
        assert self._process.stdout is not None
        while text not in self._seen:
            piece = os.read(self._process.stdout.fileno(), 65536)
            if not piece:
                sys.exit(f"QEMU ended: {self._seen[-500:]!r}")
            self._seen += piece
        before, _, self._seen = self._seen.partition(text)
        return before


def one_test(shell: Shell) -> None:
    """The one line."""
    assert b"6." in shell.run("uname -r")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=100, help="tests")
    parser.add_argument("--boots", type=int, default=5, help="QEMU boots that are timed")
    options = parser.parse_args()
    require_qemu()
    headline(f"a suite of {options.n} one-line tests")
    took, each = ours(options.n)
    boots = []
    for _ in range(options.boots):
        began = time.perf_counter()
        shell = Shell()
        one_test(shell)
        shell.close()
        boots.append(time.perf_counter() - began)
    began = time.perf_counter()
    shell = Shell()
    for _ in range(options.n):
        one_test(shell)
    shell.close()
    shared = time.perf_counter() - began
    booted = statistics.median(boots) * options.n
    print(f"avmm, a fork for each test (pytest's own time and one boot included) {took:7.1f} s   "
          f"{each * 1e3:.0f} ms for a test at the median")  # fmt: skip
    print(f"QEMU, a boot for each test ({options.boots} timed)                   {booted:7.1f} s")
    print(f"QEMU, one VM that all tests share                          {shared:7.1f} s")
    print(f"ratio to a boot for each {took / booted:.3f}, to the shared VM {took / shared:.2f}")


if __name__ == "__main__":
    main()
