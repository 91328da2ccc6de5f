"""``avmm boot KERNEL INITRD -- COMMAND`` as a shell's pipeline sees it."""

from __future__ import annotations

import os
import pty
import random
import select
import signal
import subprocess
import sys
import time

import pytest

from avmm.debian import Fetched
from tests.conftest import AVMM_BOOT

pytestmark = pytest.mark.guest


def argv(debian: Fetched, *command: str, options: tuple[str, ...] = ()) -> list[str]:
    boot = [*AVMM_BOOT, str(debian.kernel), str(debian.initrd), *options]
    return [*boot, "--", *command]


def test_streams_and_exit_codes(debian: Fetched) -> None:
    content = random.Random(1).randbytes(3_000_000)
    script = "cat; echo err >&2; exit 7"
    done = subprocess.run(argv(debian, "sh", "-c", script), input=content, capture_output=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (7, content, b"err\n")
    done = subprocess.run(argv(debian, "sh", "-c", "kill -15 $$"), stdin=subprocess.DEVNULL, timeout=100)
    assert done.returncode == 128 + 15
    done = subprocess.run(argv(debian, "nothing"), stdin=subprocess.DEVNULL, capture_output=True, timeout=100)
    assert (done.returncode, done.stderr) == (127, b"avmm: nothing: no such program\n")


@pytest.mark.parametrize(
    ("command", "options", "code", "said"),
    [
        (["sleep", "1000"], ("--timeout", "6"), 124, "had not ended after 6 s"),
        (["sh", "-c", "echo c >/proc/sysrq-trigger; sleep 100"], (), 4, "Kernel panic"),
        (["poweroff", "-f"], (), 5, "powered off"),
        ([], (), 2, "which command?"),
    ],
)
def test_ends_that_are_no_commands(
    debian: Fetched, command: list[str], options: tuple[str, ...], code: int, said: str
) -> None:
    done = subprocess.run(
        argv(debian, *command, options=("--no-reboot", *options)),
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_without_an_initrd_it_says_so(debian: Fetched) -> None:
    boot = [sys.executable, "-m", "avmm.cli", "boot", str(debian.kernel), "--", "true"]
    done = subprocess.run(boot, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "needs an initrd" in done.stderr


def test_a_signal_ends_it(debian: Fetched) -> None:
    command = argv(debian, "sh", "-c", "echo up; sleep 1000")
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + 15


def test_on_a_terminal_it_has_one(debian: Fetched) -> None:
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, argv(debian, "sh", "-c", "tty && read x && echo got $x"))
    seen = b""

    def until(text: bytes) -> None:
        nonlocal seen
        deadline = time.monotonic() + 60
        while text not in seen:
            assert select.select([terminal], [], [], max(0, deadline - time.monotonic()))[0], seen
            seen += os.read(terminal, 4096)

    until(b"/dev/pts/")
    os.write(terminal, b"word\r")
    until(b"got word\r")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    os.close(terminal)
