"""The engines, and the one function that picks one. Nobody outside this package knows which runs."""

from __future__ import annotations

import os
import sys

from avmm.errors import ConfigError
from avmm.faults import Faults
from avmm.hypervisor.base import Capabilities, ExitKind, Finish, Frame, Hypervisor, Reg, Vcpu, sysreg

__all__ = [
    "ENGINES",
    "Capabilities",
    "ExitKind",
    "Finish",
    "Frame",
    "Hypervisor",
    "Reg",
    "Vcpu",
    "available_engines",
    "open_hypervisor",
    "sysreg",
]

#: Every engine's name, the preferred first.
ENGINES = ("framework", "softhv", "softhv,interpreter", "softhv,turns")


def available_engines() -> tuple[str, ...]:
    """The engines this machine can have, the preferred first; whether one may be used shows when it is opened."""
    apple = sys.platform == "darwin" and os.uname().machine == "arm64"
    return ENGINES if apple else ENGINES[1:]


def open_hypervisor(name: str = "auto", faults: Faults | None = None) -> Hypervisor:
    """A new VM of the named engine, or of the preferred one. Raises ConfigError or EngineError.

    Only softhv misbehaves on demand.
    """
    if name == "auto":
        name = "softhv" if faults is not None else available_engines()[0]
    if faults is not None and not name.startswith("softhv"):
        raise ConfigError(f"faults are softhv's: use --engine softhv, not {name}")
    # Imported only now: loading an engine costs milliseconds that `import avmm` must not.
    if name in ENGINES[1:]:
        from avmm.hypervisor.softhv import Softhv

        return Softhv(compiled=name != "softhv,interpreter", turns=name == "softhv,turns", faults=faults)
    if name == "framework":
        from avmm.hypervisor.framework import Framework

        return Framework()
    raise ConfigError(f"no engine named {name!r}: use auto, {', '.join(ENGINES[:-1])} or {ENGINES[-1]}")
