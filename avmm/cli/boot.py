"""``avmm boot KERNEL [INITRD]``: boot a guest with its console on stdin and stdout."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

from avmm.cli.exitcodes import ExitCode

if TYPE_CHECKING:
    from avmm.config import VmConfig
    from avmm.vm import Outcome, VirtualMachine

#: Output kept for error messages; stdout has it all.
_KEEP = 1 << 16


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare ``boot``."""
    p = commands.add_parser(
        "boot",
        help="boot a kernel with its console on this terminal",
        description="Boot an arm64 Linux kernel. The guest's console is on stdin and stdout; Ctrl-A x quits.",
        epilog="exit codes: 0 guest power-off, 2 bad usage or image, 3 engine or avmm error, 4 guest panic, "
        "5 guest fault, 124 timeout, 128+N ended by signal N",
        allow_abbrev=False,
    )
    p.add_argument("kernel", metavar="KERNEL", help="Image, Image.gz or EFI zboot image of an arm64 kernel")
    p.add_argument("initrd", metavar="INITRD", nargs="?", help="initial ramdisk")
    p.add_argument("-a", "--append", metavar="ARGS", default="", help="add to the default kernel command line")
    p.add_argument("--cmdline", metavar="ARGS", help="replace the default kernel command line")
    p.add_argument("-m", "--memory", metavar="SIZE", default="512M", help="guest RAM (default 512M)")
    p.add_argument("-c", "--cpus", metavar="N", type=int, default=1, help="number of vCPUs (default 1)")
    p.add_argument("--engine", default="auto", help="auto, framework or softhv (default auto)")
    p.add_argument("--timeout", metavar="SECONDS", type=_seconds, help="end with exit code 124 after this long")
    p.add_argument("--no-reboot", action="store_true", help="exit when the guest resets instead of rebooting it")
    p.add_argument("--dump-dtb", metavar="FILE", help="write the device tree to FILE and exit")
    p.add_argument("--dry-run", action="store_true", help="print the resolved configuration as JSON and exit")
    p.add_argument("--timing", action="store_true", help="print a boot timeline and the exits by kind on stderr")
    p.add_argument("-v", "--verbose", action="count", default=0, help="log to stderr (-vv: debug)")
    p.set_defaults(run=run)


def _seconds(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return value


def run(args: argparse.Namespace) -> int:
    """Boot, or say what would be booted."""
    from avmm.config import VmConfig

    config = VmConfig.resolve(
        args.kernel,
        args.initrd,
        memory=args.memory,
        cpus=args.cpus,
        append=args.append,
        cmdline=args.cmdline,
        engine=args.engine,
        reboot=not args.no_reboot,
    )
    if args.dry_run:
        import json

        from avmm.vm import describe

        print(json.dumps(describe(config), indent=2))
        return ExitCode.POWER_OFF
    if args.dump_dtb:
        from avmm.errors import ConfigError
        from avmm.vm import device_tree

        try:
            with open(args.dump_dtb, "wb") as file:
                file.write(device_tree(config))
        except OSError as error:
            raise ConfigError(f"cannot write {args.dump_dtb}: {error.strerror}") from error
        return ExitCode.POWER_OFF
    _configure_logging(args.verbose)
    from uvloop import run as run_loop

    return run_loop(_boot(config, args.timeout, args.timing))


def _configure_logging(verbose: int) -> None:
    import logging

    import structlog

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


async def _boot(config: VmConfig, timeout: float | None, timing: bool) -> int:
    from avmm.cli import terminal
    from avmm.vm import VirtualMachine

    loop = asyncio.get_running_loop()
    quitting: asyncio.Future[int] = loop.create_future()

    def quit(code: int) -> None:
        if not quitting.done():
            quitting.set_result(code)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, quit, ExitCode.SIGNAL + number)
    stdin, stdout = 0, 1
    # A reader that went away is a SIGPIPE to any other program.
    output = terminal.Output(stdout, on_broken=lambda: quit(ExitCode.SIGNAL + signal.SIGPIPE))
    vm = VirtualMachine(config, keep_output=_KEEP)
    vm.console.listen(output.write)
    output.on_full = vm.hold_output
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(output.flush)
        await stack.enter_async_context(vm)
        keys = None
        if os.isatty(stdin):
            keys = terminal.EscapeKey(lambda: quit(ExitCode.POWER_OFF), lambda: terminal.say(terminal.HELP))
            terminal.say("avmm: Ctrl-A x quits, Ctrl-A h helps")
            stack.enter_context(terminal.raw_mode(stdin))
        typing = asyncio.create_task(_type(vm, stdin, keys))
        ending = asyncio.create_task(vm.wait())
        try:
            await asyncio.wait((ending, quitting), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            typing.cancel()
            await asyncio.gather(typing, return_exceptions=True)
        if not ending.done():
            ending.cancel()
            await asyncio.gather(ending, return_exceptions=True)
    if ending.done() and not ending.cancelled():
        code = _explain(ending.result())
    elif quitting.done():
        code = quitting.result()
    else:
        terminal.say(f"avmm: the guest was still running after {timeout:g} s")
        code = ExitCode.TIMEOUT
    if timing:
        _print_timing(vm)
    return code


async def _type(vm: VirtualMachine, fd: int, keys: Any) -> None:
    from avmm.cli.terminal import read_input

    async for data in read_input(fd):
        vm.console.write(keys.feed(data) if keys else data)
        await vm.console.drain()


def _explain(outcome: Outcome) -> int:
    from avmm.cli.terminal import say
    from avmm.errors import GuestError, GuestPanic

    if outcome.error is None:
        return ExitCode.POWER_OFF
    say(f"avmm: {outcome.error}")
    if isinstance(outcome.error, GuestPanic):
        return ExitCode.PANIC
    return ExitCode.GUEST if isinstance(outcome.error, GuestError) else ExitCode.HOST


def _print_timing(vm: VirtualMachine) -> None:
    from avmm.cli.terminal import say

    began = _process_start()
    for name, moment in vm.timeline.items():
        say(f"{moment - began:9.3f} s  {name}")
    for kind, count in sorted(vm.counters()["exits"].items(), key=lambda item: -item[1]):
        if count:
            say(f"{count:9d}    {kind} exits")


def _process_start() -> float:
    """When this process started, on time.monotonic()'s clock."""
    try:
        with open("/proc/self/stat", "rb") as file:
            # Field 22, counted after the command's name, which may hold spaces: start time in clock ticks since boot.
            ticks = int(file.read().rpartition(b")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):  # not Linux: the moment the interpreter began to count CPU time is close enough
        age = time.process_time()
    return time.monotonic() - age
