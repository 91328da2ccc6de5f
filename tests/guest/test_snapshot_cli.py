"""`avmm snapshot`, `avmm restore` and `avmm resume`, as a user types them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from avmm.debian import Fetched

pytestmark = pytest.mark.guest

AVMM = [sys.executable, "-m", "avmm.cli"]
TIMEOUT = 240.0


@contextmanager
def running(*argv: object) -> Iterator[subprocess.Popen[bytes]]:
    command = [*AVMM, *map(str, argv)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def say(process: subprocess.Popen[bytes], text: bytes) -> None:
    assert process.stdin is not None
    process.stdin.write(text)
    process.stdin.flush()


def read_until(process: subprocess.Popen[bytes], wanted: bytes) -> None:
    assert process.stdout is not None
    seen = b""
    while wanted not in seen:
        piece = os.read(process.stdout.fileno(), 65536)
        assert piece, seen[-2000:] + (process.stderr.read() if process.stderr else b"")
        seen += piece


def avmm(*argv: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*AVMM, *map(str, argv)], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=TIMEOUT
    )


def test_a_running_vm_is_written_and_goes_on_twice(
    debian: Fetched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))  # nobody else's VMs
    path = tmp_path / "bundle" / "snapshot"
    path.parent.mkdir()
    nobody = avmm("snapshot", path)
    assert nobody.returncode == 2
    assert "no VM of yours is running" in nobody.stderr
    with running("boot", debian.kernel, debian.initrd) as process:
        read_until(process, b"~ # ")
        say(process, b"state=before; echo $((600+66))\n")
        read_until(process, b"\n666")
        done = avmm("snapshot", path)
        assert (done.returncode, done.stderr) == (0, "")
        refused = avmm("snapshot", str(process.pid), tmp_path / "none" / "x")
        assert refused.returncode == 3
        assert "No such file" in refused.stderr
        assert avmm("snapshot", "nothing", path).returncode == 2
        say(process, b"state=after; poweroff -f\n")
        assert process.wait(TIMEOUT) == 0
    for argv in (("restore", path), ("resume", path.parent)):
        with running(*argv) as process:
            say(process, b"echo $state $((600+66)); poweroff -f\n")
            read_until(process, b"before 666")
            assert process.wait(TIMEOUT) == 0


def test_what_cannot_be_restored_says_so_in_a_line(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"something else")
    for argv, word in (
        (("restore", other), "not a snapshot"),
        (("restore", tmp_path / "none"), "No such file"),
        (("resume", tmp_path / "none"), "No such file"),
        (("resume", tmp_path), "no snapshot in it"),
    ):
        done = avmm(*argv)
        assert done.returncode == 2
        assert word in done.stderr
        assert len(done.stderr.splitlines()) == 1
