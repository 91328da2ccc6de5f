"""The host's terminal: raw mode that is always undone, the escape key, stdin and stdout without blocking the loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import stat
import sys
import termios
from collections.abc import AsyncIterator, Callable, Iterator

#: Ctrl-A, as in QEMU, kvmtool and minicom.
ESCAPE = 0x01

HELP = """
Ctrl-A h  this help
Ctrl-A x  quit
Ctrl-A Ctrl-A  send Ctrl-A
"""

#: A pipe counts as writable when this much fits (PIPE_BUF on Linux), so a piece of it never blocks.
_PIECE = 4096

#: Output the host has not taken yet; beyond it the guest's UART says it is full.
_BACKLOG_MAX = 1 << 20


class EscapeKey:
    """Takes the escape sequences out of what is typed. ``feed`` returns what the guest gets."""

    def __init__(self, on_quit: Callable[[], None], on_help: Callable[[], None]) -> None:
        self._actions = {ord("x"): on_quit, ord("h"): on_help}
        self._escaped = False

    def feed(self, data: bytes) -> bytes:
        """Bytes for the guest; actions are called on the spot."""
        out = bytearray()
        for byte in data:
            if self._escaped:
                self._escaped = False
                if byte == ESCAPE:
                    out.append(byte)
                elif byte in self._actions:
                    self._actions[byte]()
            elif byte == ESCAPE:
                self._escaped = True
            else:
                out.append(byte)
        return bytes(out)


@contextlib.contextmanager
def raw_mode(fd: int) -> Iterator[None]:
    """Raw input on terminal ``fd``; undone on every way out, also around a stop (SIGTSTP) and a return (SIGCONT).

    Output processing stays on, as in QEMU: the program itself still prints lines on this terminal.
    """
    loop = asyncio.get_running_loop()
    saved = termios.tcgetattr(fd)
    raw = termios.tcgetattr(fd)
    # cfmakeraw() without its output half.
    raw[0] &= ~(
        termios.IGNBRK | termios.BRKINT | termios.PARMRK | termios.ISTRIP
        | termios.INLCR | termios.IGNCR | termios.ICRNL | termios.IXON
    )  # fmt: skip
    raw[2] = raw[2] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
    raw[3] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
    raw[6][termios.VMIN], raw[6][termios.VTIME] = 1, 0

    def enter() -> None:
        termios.tcsetattr(fd, termios.TCSADRAIN, raw)

    def leave() -> None:
        termios.tcsetattr(fd, termios.TCSADRAIN, saved)

    def stop() -> None:
        leave()
        loop.remove_signal_handler(signal.SIGTSTP)  # back to the default action ...
        os.kill(os.getpid(), signal.SIGTSTP)  # ... which stops us here until SIGCONT, unless nobody could send that
        loop.add_signal_handler(signal.SIGTSTP, stop)
        enter()

    loop.add_signal_handler(signal.SIGTSTP, stop)
    loop.add_signal_handler(signal.SIGCONT, enter)  # after a SIGSTOP, too
    enter()
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGTSTP)
        loop.remove_signal_handler(signal.SIGCONT)
        leave()


async def read_input(fd: int, limit: int = 65536) -> AsyncIterator[bytes]:
    """What arrives on ``fd``, piece by piece, until its end."""
    if stat.S_ISREG(os.fstat(fd).st_mode) or not _pollable(fd):
        while data := os.read(fd, limit):  # a file or /dev/null: always ready
            yield data
        return
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(fd, ready.set)
    try:
        while True:
            await ready.wait()
            ready.clear()
            if not select.select([fd], [], [], 0)[0]:
                continue  # the stock loop may tell once more of what has been read already
            try:
                data = os.read(fd, limit)
            except BlockingIOError:
                continue
            except OSError:
                return  # EIO: the terminal is gone
            if not data:
                return
            yield data
    finally:
        loop.remove_reader(fd)


def _pollable(fd: int) -> bool:
    loop = asyncio.get_running_loop()
    try:
        loop.add_reader(fd, lambda: None)
    except OSError:
        return False  # EPERM from epoll: no such thing as waiting on it
    loop.remove_reader(fd)
    return True


class Output:
    """Bytes to ``fd`` in order, without blocking the loop. ``on_broken`` gets the error when that cannot go on.

    ``on_full(True)`` is called when the host is slower than the guest by a megabyte, ``on_full(False)`` when it has
    caught up.
    """

    def __init__(self, fd: int, on_broken: Callable[[OSError], None]) -> None:
        self._fd = fd
        self._on_broken = on_broken
        self._loop = asyncio.get_running_loop()
        self._waiting = bytearray()
        self._broken = False
        self._watching = False
        self._full = False
        self.on_full: Callable[[bool], None] = lambda full: None
        self._direct = stat.S_ISREG(os.fstat(fd).st_mode) or not self._watch()

    def write(self, data: bytes) -> None:
        """Queue ``data`` and write what can be written now."""
        if self._broken:
            return
        self._waiting += data
        if self._direct:
            self._write(len(self._waiting))
        elif not self._watching:
            self._watch()
        if not self._full and len(self._waiting) > _BACKLOG_MAX:
            self._full = True
            self.on_full(True)

    def flush(self) -> None:
        """Write everything, blocking if need be: the last thing before the end."""
        self._unwatch()
        while self._waiting and not self._broken:
            self._write(len(self._waiting))

    def _watch(self) -> bool:
        try:
            self._loop.add_writer(self._fd, self._writable)
        except OSError:
            return False
        self._watching = True
        return True

    def _unwatch(self) -> None:
        if self._watching:
            self._loop.remove_writer(self._fd)
            self._watching = False

    def _writable(self) -> None:
        self._write(_PIECE)
        if not self._waiting:
            self._unwatch()
            if self._full:
                self._full = False
                self.on_full(False)

    def _write(self, limit: int) -> None:
        try:
            written = os.write(self._fd, memoryview(self._waiting)[:limit].tobytes())
        except BlockingIOError:
            return
        except OSError as error:
            self._broken = True
            self._waiting.clear()
            self._unwatch()
            self._on_broken(error)
            return
        del self._waiting[:written]


def say(text: str) -> None:
    """One line on stderr, also right while the terminal is raw."""
    end = "\r\n" if sys.stderr.isatty() else "\n"
    sys.stderr.write(text.replace("\n", end) + end)
    sys.stderr.flush()
