"""The ``avmm`` command. Each subcommand is a module with ``add_parser`` and ``run``."""

from __future__ import annotations

import os
import signal
import sys

from avmm.cli import boot, doctor, fetch, sign, snapshot, top
from avmm.cli.exitcodes import ExitCode
from avmm.cli.parser import Parser


def parser() -> Parser:
    """The whole command line."""
    whole = Parser(prog="avmm", description="An asyncio-native virtual machine monitor for arm64 guests.")
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
    _open_standard_streams()
    words = sys.argv[1:] if argv is None else argv
    # What follows "--" is the guest's, whatever it looks like.
    split = words.index("--") if "--" in words and words[0] == "boot" else len(words)
    args = parser().parse_args(words[:split])
    args.guest_command = words[split + 1 :] if split < len(words) else None
    from avmm.errors import ConfigError, HostError, ImageError

    try:
        code: int = args.run(args)
        sys.stdout.flush()
    except (ConfigError, ImageError) as error:
        print(f"avmm: {error}", file=sys.stderr)
        return ExitCode.USAGE
    except HostError as error:
        print(f"avmm: {error}", file=sys.stderr)
        return ExitCode.HOST
    except KeyboardInterrupt:
        return ExitCode.SIGNAL + signal.SIGINT
    except BrokenPipeError:  # `avmm top --json | head`
        _give_up_stdout()
        return ExitCode.SIGNAL + signal.SIGPIPE
    except OSError as error:  # what is printed meets a full disk
        _give_up_stdout()
        print(f"avmm: {error.filename or 'the output'}: {error.strerror}", file=sys.stderr)
        return ExitCode.HOST
    return code


def _open_standard_streams() -> None:
    """A stream that was closed becomes /dev/null: else the next file we open would be taken for it."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115 - open as long as the process is
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115 - so is this


def _give_up_stdout() -> None:
    """Or the interpreter would try again when it ends, and complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _version() -> str:
    from avmm import __version__

    return __version__
