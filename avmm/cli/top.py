"""``avmm top``: what the vCPUs of running VMs do, live."""

from __future__ import annotations

import argparse

from avmm.cli.exitcodes import ExitCode
from avmm.cli.parser import Commands, seconds


def add_parser(commands: Commands) -> None:
    """Declare ``top``."""
    p = commands.add_parser(
        "top",
        help="watch running VMs: CPU, exits, parking, wake-ups",
        description="Show what the vCPUs of your running VMs do, and which path their idling takes.",
        epilog="The library rich (pip install 'avmm[top]') makes it prettier; nothing else needs it.",
    )
    p.add_argument("vm", metavar="VM", nargs="?", help="a process id, an id as shown, or part of a kernel's name")
    p.add_argument("--interval", metavar="SECONDS", type=seconds, default=1.0, help="between two looks (default 1)")
    p.add_argument("--once", action="store_true", help="look over one interval, print, exit")
    form = p.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object per VM and line: raw counters and rates")
    form.add_argument("--prometheus", action="store_true", help="counters in Prometheus' text format, once")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Look until interrupted, or once."""
    import signal
    import sys

    from avmm.cli import watch
    from avmm.errors import ConfigError

    if not 0.05 <= args.interval <= 3600:
        raise ConfigError(f"--interval must be between 0.05 and 3600 seconds, not {args.interval:g}")
    for number in (signal.SIGTERM, signal.SIGHUP):  # leave the terminal as it was
        signal.signal(number, lambda number, frame: sys.exit(ExitCode.SIGNAL + number))
    if args.prometheus:
        watch.print_prometheus(args.vm)
    elif args.json:
        watch.print_json(args.vm, args.interval, args.once)
    else:
        watch.show(args.vm, args.interval, args.once)
    return ExitCode.POWER_OFF
