"""``avmm snapshot [VM] FILE``: a running VM into a file; ``avmm restore FILE``, ``avmm resume BUNDLE``: out of it."""

from __future__ import annotations

import argparse
import gc

from avmm.cli.exitcodes import ExitCode
from avmm.cli.parser import Commands, Parser, seconds


def add_parser(commands: Commands) -> None:
    """Declare ``snapshot``, ``restore`` and ``resume``."""
    p = commands.add_parser(
        "snapshot",
        help="write a running VM to a file",
        description="Write a running VM of yours, its memory, devices and disks, to FILE. It runs on.",
    )
    p.add_argument(
        "vm", metavar="VM", nargs="?", help="a process id, an id as in `avmm top`, or part of a kernel's name"
    )
    p.add_argument("file", metavar="FILE", help="appears when it is complete; needs not have been there before")
    p.set_defaults(run=snapshot)
    p = commands.add_parser(
        "restore",
        help="go on from a file that `avmm snapshot` wrote",
        description="Go on from a snapshot, with the guest's console on stdin and stdout; Ctrl-A x quits. "
        "What the guest writes to its disks is forgotten when it ends. Restore only files you trust.",
        epilog="exit codes: as those of `avmm boot`",
    )
    p.add_argument("file", metavar="FILE", help="a snapshot")
    _common(p)
    p = commands.add_parser(
        "resume",
        help="go on from the moment a test failed",
        description="Go on from the snapshot in a failure bundle, as `avmm restore` does.",
    )
    p.add_argument("file", metavar="BUNDLE", help="the bundle's folder")
    _common(p)


def _common(p: Parser) -> None:
    p.add_argument("--timeout", metavar="SECONDS", type=seconds, help="end with exit code 124 after this long")
    p.add_argument("--timing", action="store_true", help="print a timeline and the exits by kind on stderr")
    p.add_argument("--no-monitor", action="store_true", help="keep this VM out of `avmm top`")
    p.add_argument("-v", "--verbose", action="count", default=0, help="log to stderr (-vv: debug)")
    p.set_defaults(run=restore)


def snapshot(args: argparse.Namespace) -> int:
    """Have the VM write itself."""
    import os

    from avmm.cli.watch import the_one

    peer = the_one(args.vm)
    try:
        peer.ask("snapshot", os.path.abspath(args.file))
    finally:
        peer.close()
    return ExitCode.POWER_OFF


def restore(args: argparse.Namespace) -> int:
    """Go on."""
    from pathlib import Path

    gc.disable()  # until session.run()
    from avmm.cli import attach
    from avmm.errors import ImageError

    path = Path(args.file)
    if args.command == "resume" and path.is_dir():
        found = sorted(path.glob("*snapshot*"))
        if len(found) != 1:
            raise ImageError(f"the bundle {path} has {'several snapshots' if found else 'no snapshot'} in it")
        path = found[0]
    if args.verbose:
        attach.configure_logging(args.verbose)
    return attach.resume(path, timeout=args.timeout, timing=args.timing, monitor=not args.no_monitor)
