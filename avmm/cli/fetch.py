"""``avmm fetch debian``: get something to boot; prints the paths of a kernel and an initrd."""

from __future__ import annotations

import argparse
import sys

from avmm.cli.exitcodes import ExitCode
from avmm.cli.parser import Commands


def add_parser(commands: Commands) -> None:
    """Declare ``fetch``."""
    p = commands.add_parser(
        "fetch",
        help="get a kernel and an initrd to boot",
        description="Get a kernel and an initrd to boot, and print the two paths.",
        epilog="exit codes: 0 there they are, 2 bad usage, 3 they cannot be had",
    )
    p.add_argument("what", metavar="debian", choices=["debian"], help="whose kernel")
    p.add_argument("--release", metavar="NAME", default="bookworm", help="a Debian release (default bookworm)")
    p.add_argument(
        "--flavour", metavar="cloud|generic|16k", choices=["cloud", "generic", "16k"], default="cloud",
        help="which kernel (default cloud)",
    )  # fmt: skip
    p.add_argument("--mirror", metavar="URL", help="a Debian mirror, for hosts without apt")
    p.add_argument("--dir", metavar="DIR", help="where to keep it (default: your cache)")
    p.add_argument("--refresh", action="store_true", help="look for a newer one even if there is one")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Fetch, and print the kernel's path, then the initrd's. Raises FetchError."""
    from pathlib import Path

    from avmm.debian import fetch_debian

    fancy = sys.stderr.isatty()
    start, end = ("\r\x1b[K", "") if fancy else ("", "\n")

    def progress(message: str) -> None:
        lasting = message.startswith("warning")
        print(f"{start}avmm fetch: {message}", end="\n" if lasting else end, file=sys.stderr, flush=True)

    try:
        fetched = fetch_debian(
            args.release, args.flavour, args.mirror, Path(args.dir) if args.dir else None, progress, args.refresh
        )
    finally:
        if fancy:
            print(start, end="", file=sys.stderr, flush=True)
    print(fetched.kernel)
    print(fetched.initrd)
    return ExitCode.POWER_OFF
