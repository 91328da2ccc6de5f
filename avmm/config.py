"""What a VM is made of, checked: the one place where user input becomes numbers and paths."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from avmm.errors import ConfigError
from avmm.faults import Faults

MIB = 1 << 20
GIB = 1 << 30

#: Guest RAM: less boots no Linux; more does not fit the 40-bit guest physical address space we use.
MEMORY_MIN = 16 * MIB
MEMORY_MAX = 255 * GIB

CPUS_MAX = 64

#: COMMAND_LINE_SIZE of arm64 Linux less the final NUL; the kernel silently cuts what is longer.
CMDLINE_MAX = 2047

#: `panic=-1` makes a panicking kernel reset at once, which is how we learn of it.
DEFAULT_CMDLINE = "console=ttyAMA0 panic=-1"

ENGINES = ("auto", "framework", "softhv", "softhv,interpreter")

_SIZE = re.compile(r"(\d+)\s*([kmgt]?)i?b?", re.IGNORECASE)


def parse_size(text: str | int) -> int:
    """``"512M"``, ``"2G"``, ``"1048576K"`` or a number of bytes, in bytes. Raises ConfigError."""
    if isinstance(text, int):
        return text
    found = _SIZE.fullmatch(text.strip())
    if not found:
        raise ConfigError(f"{text!r} is not a size; write it like 512M or 2G")
    return int(found[1]) << {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}[found[2].lower()]


@dataclass(frozen=True, slots=True, kw_only=True)
class VmConfig:
    """One virtual machine, resolved. ``memory`` is in bytes."""

    kernel: Path
    initrd: Path | None = None
    cmdline: str = DEFAULT_CMDLINE
    memory: int = 512 * MIB
    cpus: int = 1
    engine: str = "auto"
    reboot: bool = True
    faults: Faults | None = None

    @classmethod
    def resolve(
        cls,
        kernel: str | os.PathLike[str],
        initrd: str | os.PathLike[str] | None = None,
        *,
        memory: str | int = 512 * MIB,
        cpus: int = 1,
        append: str = "",
        cmdline: str | None = None,
        engine: str = "auto",
        reboot: bool = True,
        faults: str | Faults | None = None,
    ) -> VmConfig:
        """Check everything that can be checked without opening a file. Raises ConfigError.

        ``append`` is added to the default command line; ``cmdline`` replaces it.
        """
        size = parse_size(memory)
        if not MEMORY_MIN <= size <= MEMORY_MAX:
            raise ConfigError(
                f"memory must be between {MEMORY_MIN // MIB} MiB and {MEMORY_MAX // GIB} GiB, not {memory}"
            )
        if size % (2 * MIB):
            raise ConfigError(f"memory must be a multiple of 2 MiB, not {memory}")
        if not isinstance(cpus, int) or not 1 <= cpus <= CPUS_MAX:
            raise ConfigError(f"a VM has 1 to {CPUS_MAX} CPUs, not {cpus}")
        if engine not in ENGINES:
            raise ConfigError(f"unknown engine {engine!r}; choose one of {', '.join(ENGINES)}")
        line = DEFAULT_CMDLINE if cmdline is None else cmdline
        line = " ".join(part for part in (line.strip(), append.strip()) if part)
        if "\0" in line or not line.isascii():
            raise ConfigError("the kernel command line must be plain ASCII")
        if len(line) > CMDLINE_MAX:
            raise ConfigError(f"the kernel command line has {len(line)} characters; arm64 Linux reads {CMDLINE_MAX}")
        return cls(
            kernel=Path(kernel),
            initrd=None if initrd is None else Path(initrd),
            cmdline=line,
            memory=size,
            cpus=cpus,
            engine=engine,
            reboot=reboot,
            faults=Faults.parse(faults) if isinstance(faults, str) else faults,
        )
