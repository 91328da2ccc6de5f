"""``avmm fetch debian``: get something to boot; prints the paths of a kernel and an initrd."""

from __future__ import annotations

import argparse
import sys
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add ``fetch`` to the command line's subcommands."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "fetch", help="get a kernel and an initrd to boot", description="Get a kernel and an initrd to boot."
    )
    parser.add_argument("what", choices=["debian"], help="whose kernel")
    parser.add_argument("--release", default="bookworm", help="a Debian release (default: %(default)s)")
    parser.add_argument(
        "--flavour", choices=["cloud", "generic", "16k"], default="cloud", help="which kernel (default: %(default)s)"
    )
    parser.add_argument("--mirror", metavar="URL", help="a Debian mirror, for hosts without apt")
    parser.add_argument("--dir", metavar="DIR", help="where to keep it (default: your cache)")
    parser.add_argument("--refresh", action="store_true", help="look for a newer one even if there is one")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Fetch, and print the kernel's path, then the initrd's. Returns the exit status; raises FetchError."""
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
    return 0
