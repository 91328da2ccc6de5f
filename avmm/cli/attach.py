"""A guest attached to this terminal, or to whatever stdin and stdout are: what ``avmm boot`` runs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from avmm.cli import session
from avmm.cli.exitcodes import ExitCode
from avmm.cli.session import KEEP, Outside, beside, exit_code
from avmm.cli.terminal import HELP, EscapeKey, raw_mode, read_input, say
from avmm.cli.timing import print_timing
from avmm.config import VmConfig
from avmm.vm import Outcome, VirtualMachine


def run(config: VmConfig, *, timeout: float | None, timing: bool, monitor: bool, trace: str | None) -> int:
    """Boot and stay until the guest ends, the user quits or ``timeout`` seconds have passed; the exit code."""
    return session.run(
        _attach(lambda: VirtualMachine(config, keep_output=KEEP, monitor=monitor, trace=trace), timeout, timing)
    )


def resume(path: Path, *, timeout: float | None, timing: bool, monitor: bool) -> int:
    """The same with the machine in the snapshot ``path``."""
    from avmm.snapshot.store import load  # takes longer to load than the engine: not for those who have no snapshot

    def make() -> VirtualMachine:
        config, origin = load(path)
        return VirtualMachine(config, origin=origin, keep_output=KEEP, monitor=monitor)

    return session.run(_attach(make, timeout, timing))


def configure_logging(verbose: int) -> None:
    """Send what avmm logs to stderr: warnings, from 1 on information, from 2 on everything."""
    import structlog  # takes longer to load than the engine: not for those who want no log

    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(level),
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S.%f"),
            structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"]),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


async def _attach(make: Callable[[], VirtualMachine], timeout: float | None, timing: bool) -> int:
    outside = Outside()
    stdin, stdout = 0, 1
    output = outside.output(stdout)
    vm = make()
    vm.console.listen(output.write)
    output.on_full = vm.hold_output
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(output.flush)
        await stack.enter_async_context(vm)
        keys = None
        if os.isatty(stdin):
            keys = EscapeKey(lambda: outside.end(ExitCode.POWER_OFF), lambda: say(HELP))
            say("avmm: Ctrl-A x quits, Ctrl-A h helps")
            stack.enter_context(raw_mode(stdin))
        await stack.enter_async_context(beside(_type(vm, stdin, keys)))
        ending = asyncio.create_task(vm.wait())
        code = await outside.outlasts(ending, timeout)
    if code is None:
        code = outside.code or _explain(ending.result())  # the last output may have found no reader
    elif code == ExitCode.TIMEOUT:
        say(f"avmm: the guest was still running after {timeout:g} s")
    if timing:
        print_timing(vm)
    return code


async def _type(vm: VirtualMachine, fd: int, keys: EscapeKey | None) -> None:
    async for data in read_input(fd):
        vm.console.write(keys.feed(data) if keys else data)
        await vm.console.drain()


def _explain(outcome: Outcome) -> int:
    if outcome.error is None:
        return ExitCode.POWER_OFF
    say(f"avmm: {outcome.error}")
    return exit_code(outcome.error)
