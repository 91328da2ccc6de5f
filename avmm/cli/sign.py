"""``avmm sign``: a Python that macOS lets use the hypervisor."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from avmm.cli.exitcodes import ExitCode
from avmm.cli.parser import Commands

if TYPE_CHECKING:
    from avmm.signing import Signing


def add_parser(commands: Commands) -> None:
    """Declare ``sign``."""
    p = commands.add_parser(
        "sign",
        help="macOS: make a Python that may use the hypervisor",
        description="Copy this Python, sign the copy with the hypervisor entitlement, and make the launcher avmm-hv. "
        "Run it again whenever you like: what is in place stays.",
    )
    p.add_argument("-n", "--dry-run", action="store_true", help="print what would be done")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Carry out the plan, saying why at each step."""
    if sys.platform != "darwin":
        print("avmm: `avmm sign` is only needed on macOS: here nothing asks for a signature", file=sys.stderr)
        return ExitCode.USAGE
    from pathlib import Path

    from avmm.signing import Python, Signing, running_image

    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    python = Python(running_image(), Path(sys.prefix), Path(sys.base_prefix), version)
    return carry_out(Signing(python, Path.home()), dry_run=args.dry_run)


def carry_out(signing: Signing, *, dry_run: bool) -> int:
    """Do what ``signing`` plans; the exit code."""
    from avmm.errors import HostError

    steps = signing.plan()
    for step in steps:
        print(f"{step.shown}\n    {step.why}")
        if not dry_run:
            try:
                step.do()
            except OSError as error:
                raise HostError(f"could not {step.shown}: {error.strerror}") from error
    if dry_run:
        return ExitCode.POWER_OFF
    signing.verify()
    print(f"{'done' if steps else 'nothing to do'}: run guests with `{signing.launcher} boot ...`")
    return ExitCode.POWER_OFF
