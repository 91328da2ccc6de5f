"""``avmm doctor``: does this host behave as avmm assumes?"""

from __future__ import annotations

import argparse

from avmm.cli.exitcodes import ExitCode
from avmm.cli.parser import Commands

#: Exit code when something is not as assumed.
NOT_AS_ASSUMED = 1


def add_parser(commands: Commands) -> None:
    """Declare ``doctor``."""
    p = commands.add_parser(
        "doctor",
        help="test this host and its hypervisor, and write a report",
        description="Test every assumption avmm makes about this host and its hypervisor with tiny guests, print what "
        "was found, and write it to a file that you can attach to an issue.",
        epilog="exit codes: 0 all as assumed, 1 something is not, 2 bad usage",
    )
    p.add_argument(
        "-o", "--output", metavar="FILE", default="avmm-doctor.json", help="the report (default avmm-doctor.json)"
    )
    p.add_argument("--engine", metavar="NAME", default="auto", help="auto, framework or softhv (default auto)")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Test, print, write."""
    import json
    from dataclasses import asdict
    from pathlib import Path

    from avmm.config import ENGINES
    from avmm.doctor import Finding, host, probes
    from avmm.errors import ConfigError, EngineError

    if args.engine not in ENGINES:
        raise ConfigError(f"unknown engine {args.engine!r}; choose one of {', '.join(ENGINES)}")
    findings = host.run()
    try:
        findings += probes.run(args.engine)
    except EngineError as error:
        findings.append(Finding(f"engine {args.engine}", "a VM can be made", str(error), False, "yes"))
    topic = None
    for finding in findings:
        if finding.topic != topic:
            topic = finding.topic
            print(f"{topic}:")
        print(f"  {finding}")
    bad = [finding for finding in findings if finding.ok is False]
    judged = sum(finding.ok is not None for finding in findings)
    print(f"{judged - len(bad)} of {judged} as assumed", end="")
    # Nobody needs the user's name in an issue.
    report = json.dumps([asdict(finding) for finding in findings], indent=1).replace(str(Path.home()), "~")
    try:
        Path(args.output).write_text(report + "\n")
    except OSError as error:
        print()
        raise ConfigError(f"cannot write {args.output}: {error.strerror}") from error
    print(f"; written to {args.output}: attach it to an issue if avmm does not work here")
    return NOT_AS_ASSUMED if bad else ExitCode.POWER_OFF
