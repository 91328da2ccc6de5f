"""The ``avmm`` command. Each subcommand is a module with ``add_parser`` and ``run``."""

from __future__ import annotations

import argparse
import sys

from avmm.cli import boot, doctor, fetch, sign, snapshot, top
from avmm.cli.exitcodes import ExitCode


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    whole = argparse.ArgumentParser(
        prog="avmm", description="An asyncio-native virtual machine monitor for arm64 guests.", allow_abbrev=False
    )
    whole.add_argument("--version", action="version", version=f"avmm {_version()}")
    commands = whole.add_subparsers(dest="command", metavar="COMMAND", required=True)
    boot.add_parser(commands)
    fetch.add_parser(commands)
    snapshot.add_parser(commands)
    top.add_parser(commands)
    doctor.add_parser(commands)
    sign.add_parser(commands)
    return whole


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's own); the exit code, see :class:`ExitCode`."""
    words = sys.argv[1:] if argv is None else argv
    # What follows "--" is the guest's, whatever it looks like.
    split = words.index("--") if "--" in words and words[0] == "boot" else len(words)
    args = parser().parse_args(words[:split])
    args.guest_command = words[split + 1 :] if split < len(words) else None
    from avmm.errors import ConfigError, HostError, ImageError

    try:
        code: int = args.run(args)
    except (ConfigError, ImageError) as error:
        print(f"avmm: {error}", file=sys.stderr)
        return ExitCode.USAGE
    except HostError as error:
        print(f"avmm: {error}", file=sys.stderr)
        return ExitCode.HOST
    except KeyboardInterrupt:
        return ExitCode.SIGNAL + 2
    return code


def _version() -> str:
    from avmm import __version__

    return __version__
