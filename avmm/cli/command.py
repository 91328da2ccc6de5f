"""``avmm boot KERNEL INITRD -- CMD…``: a command in the guest with this process's streams, and its exit code."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal

from avmm.cli import session
from avmm.cli.exitcodes import ExitCode
from avmm.cli.session import KEEP, Outside, beside, exit_code
from avmm.cli.terminal import EscapeKey, Output, raw_mode, read_input, say
from avmm.cli.timing import print_timing
from avmm.config import VmConfig
from avmm.debian import ready_pattern
from avmm.errors import AvmmError, ConfigError, WaitTimeout
from avmm.guest.process import Process
from avmm.vm import VirtualMachine

#: How much of the console's output, in bytes, is shown of a guest that does not come up.
_SHOWN = 2000


def run(
    config: VmConfig, argv: list[str], *, timeout: float | None, timing: bool, monitor: bool, trace: str | None
) -> int:
    """Boot, run ``argv`` in the guest, end the guest; the command's exit code, 128+N when signal N killed it."""
    if config.agent is None:
        raise ConfigError("a command needs an initrd: avmm boot KERNEL INITRD -- COMMAND")

    async def go() -> int:
        vm = VirtualMachine(config, keep_output=KEEP, monitor=monitor, trace=trace)
        async with vm:
            code = await _run(vm, argv, timeout)
        if timing:
            print_timing(vm)
        return code

    return session.run(go())


async def _run(vm: VirtualMachine, argv: list[str], timeout: float | None) -> int:
    outside = Outside()
    work = asyncio.create_task(_command(vm, argv, outside))
    code = await outside.outlasts(work, timeout)
    if code is not None:
        if code == ExitCode.TIMEOUT:
            say(f"avmm: the command had not ended after {timeout:g} s")
        return code
    try:
        return work.result()
    except AvmmError as error:
        last = vm.console.output[-_SHOWN:].decode(errors="replace").replace("\r\n", "\n").strip()
        say(f"avmm: {error}" + (f"; the guest's console last showed:\n{last}" if last else ""))
        return ExitCode.GUEST if isinstance(error, WaitTimeout) else exit_code(error)


async def _command(vm: VirtualMachine, argv: list[str], outside: Outside) -> int:
    if (pattern := ready_pattern(vm.config)) is not None:
        await vm.console.expect(pattern)
    terminal = os.isatty(0) and os.isatty(1)
    async with contextlib.AsyncExitStack() as stack:
        size = os.get_terminal_size(0) if terminal else (80, 24)
        env = {"TERM": os.environ.get("TERM", "dumb")} if terminal else None
        process = await stack.enter_async_context(await vm.popen(*argv, pty=terminal, size=(size[0], size[1]), env=env))
        outputs = [outside.output(fd) for fd in ((1,) if terminal else (1, 2))]
        for output in outputs:
            stack.callback(output.flush)
        keys = None
        if terminal:
            keys = EscapeKey(lambda: outside.end(ExitCode.SIGNAL + signal.SIGHUP), lambda: None)
            stack.enter_context(raw_mode(0))
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGWINCH, lambda: process.resize(*os.get_terminal_size(0)))
            stack.callback(loop.remove_signal_handler, signal.SIGWINCH)
        readers = [reader for reader in (process.stdout, process.stderr) if reader is not None]
        async with beside(_type(process, keys)):
            await asyncio.gather(*map(_show, readers, outputs))
            code = await process.wait()
    return code if code >= 0 else ExitCode.SIGNAL - code


async def _type(process: Process, keys: EscapeKey | None) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        async for data in read_input(0):
            process.stdin.write(keys.feed(data) if keys is not None else data)
            await process.stdin.drain()
        process.stdin.write_eof()


async def _show(reader: asyncio.StreamReader, output: Output) -> None:
    room = asyncio.Event()
    room.set()
    output.on_full = lambda full: room.clear() if full else room.set()
    while data := await reader.read(1 << 16):
        output.write(data)
        await room.wait()
