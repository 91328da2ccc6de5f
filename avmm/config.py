"""What a VM is made of, checked: the one place where user input becomes numbers and paths."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
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

ENGINES = ("auto", "framework", "softhv", "softhv,interpreter", "softhv,turns")

DISK_FORMATS = ("raw", "qcow2")

#: The machine has 32 virtio slots; some are for what is not a disk.
DRIVES_MAX = 24

#: Ports of the virtio console, by name.
PORTS_MAX = 30
_PORT = re.compile(r"[\w.-]{1,64}", re.ASCII)

_SIZE = re.compile(r"(\d+)\s*([kmgt]?)i?b?", re.IGNORECASE)


def parse_size(text: str | int) -> int:
    """``"512M"``, ``"2G"``, ``"1048576K"`` or a number of bytes, in bytes. Raises ConfigError."""
    if isinstance(text, int):
        return text
    found = _SIZE.fullmatch(text.strip())
    if not found:
        raise ConfigError(f"{text!r} is not a size; write it like 512M or 2G")
    return int(found[1]) << {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}[found[2].lower()]


@dataclass(frozen=True, slots=True)
class DriveConfig:
    """One disk. ``format`` None: by the file's name. ``snapshot``: writes are forgotten when the VM ends."""

    path: Path
    read_only: bool = False
    snapshot: bool = False
    format: str | None = None

    @classmethod
    def parse(cls, text: str | os.PathLike[str]) -> DriveConfig:
        """``PATH[,ro][,snapshot][,format=raw|qcow2]``. Raises ConfigError."""
        rest = os.fspath(text)
        options: set[str] = set()
        # From the end, so that a path may hold commas.
        while (tail := rest.rpartition(","))[1] and (tail[2] in ("ro", "snapshot") or tail[2].startswith("format=")):
            rest = tail[0]
            options.add(tail[2])
        formats = [option.removeprefix("format=") for option in options if option.startswith("format=")]
        if len(formats) > 1 or (formats and formats[0] not in DISK_FORMATS):
            raise ConfigError(f"the drive {rest} is of one format: {' or '.join(DISK_FORMATS)}")
        if {"ro", "snapshot"} <= options:
            raise ConfigError(f"the drive {rest} is either ro or snapshot: a snapshot is there to be written to")
        if not rest:
            raise ConfigError("a drive needs a path")
        return cls(Path(rest), "ro" in options, "snapshot" in options, formats[0] if formats else None)


#: What a caller may name a drive with.
DriveLike = str | os.PathLike[str] | DriveConfig


def drive_config(drive: DriveLike) -> DriveConfig:
    """What ``drive`` names. Raises ConfigError."""
    return drive if isinstance(drive, DriveConfig) else DriveConfig.parse(drive)


@dataclass(frozen=True, slots=True, kw_only=True)
class VmConfig:
    """One virtual machine, resolved. ``memory`` is in bytes; ``ports`` are names of virtio console ports."""

    kernel: Path
    initrd: Path | None = None
    cmdline: str = DEFAULT_CMDLINE
    memory: int = 512 * MIB
    cpus: int = 1
    engine: str = "auto"
    reboot: bool = True
    faults: Faults | None = None
    drives: tuple[DriveConfig, ...] = ()
    ports: tuple[str, ...] = ()

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
        drives: Sequence[DriveLike] = (),
        ports: Sequence[str] = (),
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
        if len(drives) > DRIVES_MAX:
            raise ConfigError(f"a VM has at most {DRIVES_MAX} drives, not {len(drives)}")
        if len(ports) > PORTS_MAX or len(set(ports)) < len(ports) or not all(map(_PORT.fullmatch, ports)):
            raise ConfigError(f"console ports are up to {PORTS_MAX} different names of letters, digits, '.', '_', '-'")
        return cls(
            kernel=Path(kernel),
            initrd=None if initrd is None else Path(initrd),
            cmdline=line,
            memory=size,
            cpus=cpus,
            engine=engine,
            reboot=reboot,
            faults=Faults.parse(faults) if isinstance(faults, str) else faults,
            drives=tuple(map(drive_config, drives)),
            ports=tuple(ports),
        )
