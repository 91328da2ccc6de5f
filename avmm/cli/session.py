"""A guest and the outside: what ends avmm before the guest has ended, and the exit code of either."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
from collections.abc import AsyncIterator, Coroutine
from typing import Any, Final

import uvloop

from avmm.cli.exitcodes import ExitCode
from avmm.cli.terminal import Output, say
from avmm.errors import AvmmError, GuestError, GuestPanic

#: Console output kept for error messages, in bytes; stdout has it all.
KEEP: Final = 1 << 16


def run(coroutine: Coroutine[Any, Any, int]) -> int:
    """Run it in an event loop.

    What has been imported by then is here to stay: to look for garbage in it would take a fifth of the start, and as
    long again at the end. So who gets here calls ``gc.disable()`` before the imports.
    """
    gc.freeze()
    gc.enable()
    return uvloop.run(coroutine)


class Outside:
    """Whatever ends a guest's session from outside: a signal, a key, a reader that has gone. The first counts."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self._code: asyncio.Future[int] = loop.create_future()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self.end, ExitCode.SIGNAL + number)

    def end(self, code: int) -> None:
        """Leave with this exit code."""
        if not self._code.done():
            self._code.set_result(code)

    @property
    def code(self) -> int | None:
        """The exit code, once something has ended the session."""
        return self._code.result() if self._code.done() else None

    def output(self, fd: int) -> Output:
        """``fd`` to write to; when that fails, the session ends."""
        return Output(fd, on_broken=self._broken)

    def _broken(self, error: OSError) -> None:
        if isinstance(error, BrokenPipeError):  # a SIGPIPE to any other program, which has nobody to complain to
            self.end(ExitCode.SIGNAL + signal.SIGPIPE)
        elif not self._code.done():
            say(f"avmm: cannot write the guest's output: {error.strerror}")
            self.end(ExitCode.HOST)

    async def outlasts(self, work: asyncio.Task[Any], timeout: float | None) -> int | None:
        """None when ``work`` has ended by itself; else it is cancelled, and this is the exit code.

        ``timeout`` in seconds; None waits for ever.
        """
        await asyncio.wait((work, self._code), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return None
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        return self._code.result() if self._code.done() else ExitCode.TIMEOUT


@contextlib.asynccontextmanager
async def beside(coroutine: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """``coroutine`` runs during the block; whether it ends before, and how, is nobody's concern."""
    task = asyncio.create_task(coroutine)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def exit_code(error: AvmmError) -> int:
    """What ``error``, which ended a guest, makes of avmm's exit."""
    if isinstance(error, GuestPanic):
        return ExitCode.PANIC
    return ExitCode.GUEST if isinstance(error, GuestError) else ExitCode.HOST
