"""``avmm boot`` as its users run it: pipes, files, a terminal, signals, exit codes."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from avmm.debian import Fetched
from tests.conftest import AVMM_BOOT

pytestmark = pytest.mark.guest

TIMEOUT = 120


def test_pipe_in_pipe_out(debian: Fetched) -> None:
    done = subprocess.run(
        [*AVMM_BOOT, debian.kernel, debian.initrd], input=b"echo $((6*7))\nexit\n", capture_output=True, timeout=TIMEOUT
    )
    assert done.returncode == 0, done.stderr
    assert b"\r\n42\r\n" in done.stdout
    assert done.stderr == b""


def test_output_is_byte_exact(with_init: Callable[[str], Path], debian: Fetched) -> None:
    script = """stty raw </dev/console
echo START
i=0
while [ $i -lt 256 ]; do printf \\\\x$(printf %02x $i); i=$((i+1)); done
echo END
poweroff -f
"""
    initrd = with_init(script)
    done = subprocess.run(
        # A line of the kernel's would come in between.
        [*AVMM_BOOT, debian.kernel, initrd, "-a", "avmm.init=/test-init loglevel=1"],
        stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = re.search(rb"START\n(.{256})END\n", done.stdout, re.DOTALL)
    assert found is not None, done.stdout[-1000:]
    assert found[1] == bytes(range(256))


def test_input_from_a_file(debian: Fetched, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_bytes(b"echo $((1000+337))\npoweroff -f\n")
    with script.open("rb") as stdin:
        done = subprocess.run(
            [*AVMM_BOOT, debian.kernel, debian.initrd], stdin=stdin, capture_output=True, timeout=TIMEOUT
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"\r\n1337\r\n" in done.stdout


def test_panic_exits_with_4(debian: Fetched) -> None:
    done = subprocess.run([*AVMM_BOOT, debian.kernel], stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT)
    assert done.returncode == 4
    assert b"guest panicked: VFS: Unable to mount root fs" in done.stderr


def test_timeout_exits_with_124(debian: Fetched) -> None:
    done = subprocess.run(
        [*AVMM_BOOT, debian.kernel, debian.initrd, "--timeout", "0.5"],
        stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT,
    )  # fmt: skip
    assert done.returncode == 124
    assert b"still running after 0.5 s" in done.stderr


def test_no_reboot(debian: Fetched) -> None:
    done = subprocess.run(
        [*AVMM_BOOT, debian.kernel, debian.initrd, "--no-reboot"],
        input=b"reboot -f\n", capture_output=True, timeout=TIMEOUT,
    )  # fmt: skip
    assert done.returncode == 0
    assert done.stdout.count(b"Booting Linux") == 1


@pytest.mark.parametrize("command", [[], ["--", "true"]])
def test_timing_goes_to_stderr(debian: Fetched, command: list[str]) -> None:
    done = subprocess.run(
        [*AVMM_BOOT, debian.kernel, debian.initrd, "--timing", *command],
        input=b"exit\n", capture_output=True, timeout=TIMEOUT,
    )  # fmt: skip
    assert done.returncode == 0
    names = [line.split(maxsplit=2)[2] for line in done.stderr.decode().splitlines() if " s  " in line]
    assert names == ["engine ready", "first instruction", "first console byte", "end"]
    assert re.search(rb"\d+ +mmio_write exits", done.stderr)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it_with_128_plus_n(debian: Fetched, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [*AVMM_BOOT, debian.kernel, debian.initrd], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdin is not None
    _read_until(process.stdout.fileno(), b"Booting Linux")
    process.send_signal(number)
    process.communicate(timeout=TIMEOUT)
    assert process.returncode == 128 + number


def test_a_reader_that_goes_away_ends_it(debian: Fetched) -> None:
    process = subprocess.Popen(
        [*AVMM_BOOT, debian.kernel, debian.initrd], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdin is not None
    _read_until(process.stdout.fileno(), b"Booting Linux")
    process.stdout.close()
    assert process.wait(TIMEOUT) == 128 + signal.SIGPIPE
    process.stdin.close()


def test_output_that_does_not_fit_on_the_disk_ends_it(debian: Fetched) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*AVMM_BOOT, debian.kernel, debian.initrd],
            stdin=subprocess.DEVNULL, stdout=full, stderr=subprocess.PIPE, timeout=TIMEOUT,
        )  # fmt: skip
    assert done.returncode == 3
    assert done.stderr == b"avmm: cannot write the guest's output: No space left on device\n"


class Terminal:
    """A process on a terminal of its own."""

    def __init__(self, *argv: object) -> None:
        self.master, slave = pty.openpty()
        self.slave = slave
        self.before = termios.tcgetattr(slave)
        self.process = subprocess.Popen(
            # A process group of its own in our session: SIGTSTP does nothing to an orphaned one.
            [*map(str, argv)],
            stdin=slave,
            stdout=slave,
            stderr=subprocess.PIPE,
            process_group=0,
        )
        self._more = b""

    def read_until(self, wanted: bytes) -> None:
        """What comes after it is the next one's."""
        self._more = _read_until(self.master, wanted, self._more).partition(wanted)[2]

    def type(self, data: bytes) -> None:
        os.write(self.master, data)

    @property
    def raw(self) -> bool:
        return not termios.tcgetattr(self.slave)[3] & (termios.ICANON | termios.ECHO)

    def restored(self) -> bool:
        return termios.tcgetattr(self.slave) == self.before

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
        os.close(self.master)
        os.close(self.slave)


def _read_until(fd: int, wanted: bytes, seen: bytes = b"") -> bytes:
    deadline = time.monotonic() + TIMEOUT
    while wanted not in seen:
        assert select.select([fd], [], [], deadline - time.monotonic())[0], seen[-2000:]
        piece = os.read(fd, 65536)
        assert piece, seen[-2000:]
        seen += piece
    return seen


@pytest.fixture
def terminal(debian: Fetched) -> Iterator[Terminal]:
    terminal = Terminal(*AVMM_BOOT, debian.kernel, debian.initrd)
    yield terminal
    terminal.close()


def test_terminal_ctrl_c_reaches_the_guest_and_ctrl_a_x_quits(terminal: Terminal) -> None:
    terminal.read_until(b"ready")
    assert terminal.raw
    terminal.read_until(b"# ")
    terminal.type(b"echo G''O; cat -v\n")
    terminal.read_until(b"\nGO")  # the shell's own line editing is over
    terminal.type(b"\x01\x01:\n")  # Ctrl-A Ctrl-A sends one
    terminal.read_until(b"^A:")  # the terminal's echo
    terminal.read_until(b"^A:")  # cat's: the shell is not on the way to it any more, where a Ctrl-C would be lost
    terminal.type(b"\x03")
    terminal.read_until(b"# ")
    terminal.type(b"\x01x")
    assert terminal.process.wait(TIMEOUT) == 0
    assert terminal.restored()
    assert terminal.process.stderr is not None
    assert b"Ctrl-A x quits" in terminal.process.stderr.read()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_terminal_is_restored_on_a_signal(terminal: Terminal, number: signal.Signals) -> None:
    terminal.read_until(b"Booting Linux")
    assert terminal.raw
    terminal.process.send_signal(number)
    assert terminal.process.wait(TIMEOUT) == 128 + number
    assert terminal.restored()


def test_terminal_is_restored_on_power_off(terminal: Terminal) -> None:
    terminal.read_until(b"# ")
    terminal.type(b"poweroff -f\n")
    assert terminal.process.wait(TIMEOUT) == 0
    assert terminal.restored()


def test_terminal_is_restored_when_stopped_and_raw_again_after(terminal: Terminal) -> None:
    terminal.read_until(b"# ")
    terminal.process.send_signal(signal.SIGTSTP)
    _, status = os.waitpid(terminal.process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    assert terminal.restored()
    terminal.process.send_signal(signal.SIGCONT)
    os.waitpid(terminal.process.pid, os.WCONTINUED)
    terminal.type(b"echo $((70+7))\n")
    terminal.read_until(b"\n77")
    assert terminal.raw
    terminal.type(b"\x01x")
    assert terminal.process.wait(TIMEOUT) == 0
    assert terminal.restored()


def test_terminal_is_untouched_by_an_error_before_boot(tmp_path: Path) -> None:
    terminal = Terminal(*AVMM_BOOT, tmp_path / "none")
    assert terminal.process.wait(TIMEOUT) == 2
    assert terminal.restored()
    terminal.close()
