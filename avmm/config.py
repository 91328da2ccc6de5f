"""What a VM is made of, checked: the one place where user input becomes numbers and paths."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from avmm.errors import ConfigError
from avmm.faults import Faults, duration
from avmm.link import Network

MIB = 1 << 20
GIB = 1 << 30

#: Guest RAM: less boots no Linux; more does not fit the 40-bit guest physical address space we use.
MEMORY_MIN = 16 * MIB
MEMORY_MAX = 255 * GIB

CPUS_MAX = 64

#: COMMAND_LINE_SIZE of arm64 Linux less the final NUL; the kernel silently cuts what is longer.
CMDLINE_MAX = 2047

#: The longest halt poll, in nanoseconds.
HALT_POLL_MAX = 1_000_000

#: `panic=-1` makes a panicking kernel reset at once, which is how we learn of it.
DEFAULT_CMDLINE = "console=ttyAMA0 panic=-1"

#: Whose interrupt controller: ours, or one inside the hypervisor.
IRQCHIPS = ("avmm", "hypervisor")

ENGINES = ("auto", "framework", "softhv", "softhv,interpreter", "softhv,turns")

#: Where the agent is in the guest's initrd; beside it, a link called ``init`` to the program it makes way for.
AGENT_PATH = "/.avmm/agent"

DISK_FORMATS = ("raw", "qcow2")

#: The machine has 32 virtio slots; some are for what is not a disk.
DRIVES_MAX = 24

#: Ports of the virtio console, by name.
PORTS_MAX = 30
_PORT = re.compile(r"[\w.-]{1,64}", re.ASCII)

#: The length of a share's tag (virtio 1.2, 5.11.4), and how long the guest may be out of date, in seconds.
TAG_MAX = 36
CACHE_MAX = 86400
_TAG = re.compile(rf"[\w.-]{{1,{TAG_MAX}}}", re.ASCII)

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


#: Networks a VM can be given by name; one of these may follow "--net".
NETWORKS = ("user", "none", "tap=IF", "socket=PATH")
NETS_MAX = 8

_MAC = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}")
_INTERFACE = re.compile(r"[^\s/]{1,15}", re.ASCII)


@dataclass(frozen=True, slots=True)
class NetConfig:
    """One network card and the network at the other end of its cable.

    ``kind`` is ``user``, ``tap`` (``target`` is the interface), ``socket`` (``target`` is the path), ``none`` or
    ``network`` (``network`` is a Switch, or whatever can be plugged into). ``restrict``: a user-mode network without a
    way out. ``mac``: six bytes, made up where not given. ``pcap``: a file that records its frames.
    """

    kind: str
    target: str = ""
    network: Network | None = None
    restrict: bool = False
    mac: bytes | None = None
    pcap: Path | None = None

    @classmethod
    def parse(cls, text: str) -> NetConfig:
        """``user|none|tap=IF|socket=PATH[,restrict][,mac=…][,pcap=FILE]``. Raises ConfigError."""
        first, *options = text.split(",")
        kind, _, target = first.partition("=")
        if kind not in ("user", "none", "tap", "socket") or bool(target) is not (kind in ("tap", "socket")):
            raise ConfigError(f"no network {first!r}; choose one of {', '.join(NETWORKS)}")
        if kind == "tap" and not _INTERFACE.fullmatch(target):
            raise ConfigError(f"{target!r} cannot be the name of a TAP interface")
        restrict, mac, pcap = False, None, None
        for option in options:
            name, _, value = option.partition("=")
            if option == "restrict" and kind == "user":
                restrict = True
            elif name == "mac" and _MAC.fullmatch(value) and not int(value[:2], 16) & 1:
                mac = bytes.fromhex(value.replace(":", ""))
            elif name == "pcap" and value:
                pcap = Path(value)
            else:
                raise ConfigError(
                    f"{option!r} means nothing to the network {first}: there are mac=52:54:00:…, pcap=FILE "
                    "and, with user, restrict"
                )
        return cls(kind, target, restrict=restrict, mac=mac, pcap=pcap)


#: What a caller may name a network with: a Switch, NetConfig, or text as for ``--net``.
NetLike = str | NetConfig | Network


def net_configs(nets: NetLike | Sequence[NetLike]) -> tuple[NetConfig, ...]:
    """What ``nets`` names; ``none`` is left out. Raises ConfigError."""
    several = nets if isinstance(nets, Sequence) and not isinstance(nets, str) else (nets,)
    configs = []
    for each in several:
        if isinstance(each, str):
            each = NetConfig.parse(each)
        elif not isinstance(each, NetConfig):
            each = NetConfig("network", network=each)
        configs.append(each)
    found = tuple(each for each in configs if each.kind != "none")
    if found and len(found) < len(configs):
        raise ConfigError("a VM has either no network or some")
    if len(found) > NETS_MAX:
        raise ConfigError(f"a VM has at most {NETS_MAX} network cards, not {len(found)}")
    return found


@dataclass(frozen=True, slots=True)
class PublishConfig:
    """A port of the guest's that the host offers at ``address``, port ``host`` (0: any that is free)."""

    host: int
    guest: int
    udp: bool = False
    address: str = "127.0.0.1"

    @classmethod
    def parse(cls, text: str) -> PublishConfig:
        """``[ADDRESS:]HOST:GUEST[/tcp|/udp]``. Raises ConfigError."""
        ports, _, protocol = text.partition("/")
        front, _, guest = ports.rpartition(":")
        address, colon, host = front.rpartition(":")
        try:
            if protocol not in ("", "tcp", "udp") or not 0 <= int(host) <= 65535 or not 1 <= int(guest) <= 65535:
                raise ValueError
            where = str(ipaddress.ip_address(address.strip("[]"))) if colon else "127.0.0.1"
        except ValueError:
            raise ConfigError(f"{text!r} publishes no port; write it like 8080:80 or 127.0.0.1:5353:53/udp") from None
        return cls(int(host), int(guest), protocol == "udp", where)


@dataclass(frozen=True, slots=True)
class ShareConfig:
    """One folder of the host. ``tag`` is what the guest mounts it by; ``cache``: for how many seconds the guest may
    believe names and attributes it has seen, while the host may have changed them."""

    path: Path
    tag: str
    writable: bool = False
    cache: float = 0.0

    @classmethod
    def parse(cls, text: str | os.PathLike[str]) -> ShareConfig:
        """``DIR[:TAG][:rw][:cache=SECONDS]``; without TAG it is the folder's own name. Raises ConfigError."""
        rest = os.fspath(text)
        writable, cache = False, 0.0
        while (tail := rest.rpartition(":"))[1] and (tail[2] in ("ro", "rw") or tail[2].startswith("cache=")):
            rest = tail[0]
            if tail[2].startswith("cache="):
                cache = _cache(rest, tail[2].removeprefix("cache="))
            else:
                writable = tail[2] == "rw"
        path, given, tag = rest.rpartition(":")
        if not given or "/" in tag:
            path, tag = rest, ""
        if not path:
            raise ConfigError("a share needs a folder: DIR[:TAG][:rw][:cache=SECONDS]")
        if not tag:
            tag = re.sub(r"[^\w.-]", "_", os.path.basename(os.path.abspath(path)), flags=re.ASCII)[:TAG_MAX] or "share"
        elif not _TAG.fullmatch(tag):
            raise ConfigError(f"the tag {tag!r} of a share is not 1 to {TAG_MAX} letters, digits, '.', '_' or '-'")
        return cls(Path(path), tag, writable, cache)


def _cache(path: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= CACHE_MAX:
        raise ConfigError(f"the share {path} takes cache=SECONDS from 0 to {CACHE_MAX}, not {text!r}")
    return value


#: What a caller may name a share with.
ShareLike = str | os.PathLike[str] | ShareConfig


def share_config(share: ShareLike) -> ShareConfig:
    """What ``share`` names. Raises ConfigError."""
    return share if isinstance(share, ShareConfig) else ShareConfig.parse(share)


@dataclass(frozen=True, slots=True)
class VsockConfig:
    """A guest that connects to ``port`` of the host (CID 2) by vsock reaches the Unix socket ``path``."""

    port: int
    path: Path

    @classmethod
    def parse(cls, text: str) -> VsockConfig:
        """``PORT=SOCKET``. Raises ConfigError."""
        port, _, path = text.partition("=")
        if not port.isdecimal() or int(port) >= 0xFFFFFFFF or not path:
            raise ConfigError(f"{text!r} is no vsock port; write it like 1234=/path/of/a/unix/socket")
        return cls(int(port), Path(path))


def port_names(ports: Sequence[str]) -> tuple[str, ...]:
    """Names of a virtio console's ports. Raises ConfigError for what can be none."""
    if len(ports) > PORTS_MAX or len(set(ports)) < len(ports) or not all(map(_PORT.fullmatch, ports)):
        raise ConfigError(f"console ports are up to {PORTS_MAX} different names of letters, digits, '.', '_', '-'")
    return tuple(ports)


def vsock_configs(vsock: bool | Sequence[str | VsockConfig]) -> tuple[VsockConfig, ...] | None:
    """What ``vsock`` names: ports with their sockets, True: a device without any; None for no device. Raises
    ConfigError."""
    if isinstance(vsock, bool):
        return () if vsock else None
    found = tuple(VsockConfig.parse(each) if isinstance(each, str) else each for each in vsock)
    if len({each.port for each in found}) < len(found):
        raise ConfigError("a vsock port reaches one socket")
    return found or None


@dataclass(frozen=True, slots=True, kw_only=True)
class VmConfig:
    """One virtual machine, resolved. ``memory`` in bytes, ``halt_poll`` in ns; ``ports``: names of a virtio console's.

    ``agent`` is the program that the guest is to start first where avmm's agent is in its initrd; None: no agent.
    """

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
    nets: tuple[NetConfig, ...] = ()
    publish: tuple[PublishConfig, ...] = ()
    shares: tuple[ShareConfig, ...] = ()
    vsock: tuple[VsockConfig, ...] | None = None
    agent: str | None = None
    halt_poll: int = 0
    irqchip: str = "avmm"

    @property
    def bootargs(self) -> str:
        """The kernel's command line with what the guest is to know of its devices: it finds no tag by itself."""
        return " ".join((self.cmdline, *(f"avmm.share={share.tag}" for share in self.shares)))

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
        net: NetLike | Sequence[NetLike] = "none",
        publish: Sequence[str | PublishConfig] = (),
        pcap: str | os.PathLike[str] | None = None,
        shares: Sequence[ShareLike] = (),
        vsock: bool | Sequence[str | VsockConfig] = False,
        agent: bool = False,
        halt_poll: str | int = 0,
        irqchip: str = "avmm",
    ) -> VmConfig:
        """Check everything that can be checked without opening a file. Raises ConfigError.

        ``append`` is added to the default command line; ``cmdline`` replaces it. ``pcap`` records the first of ``net``.
        ``agent``: run avmm's agent in the guest, where there is an initrd to put it into.
        """
        for what, path in (("kernel", kernel), ("initrd", initrd)):
            if path is not None and not os.fspath(path):  # which Path would take for the current folder
                raise ConfigError(f"the path of the {what} is empty")
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
        if irqchip not in IRQCHIPS:
            raise ConfigError(f"unknown irqchip {irqchip!r}; choose one of {', '.join(IRQCHIPS)}")
        if irqchip == "hypervisor" and faults:
            raise ConfigError("faults concern exits that --irqchip hypervisor does not make: use --irqchip avmm")
        line = DEFAULT_CMDLINE if cmdline is None else cmdline
        line = " ".join(part for part in (line.strip(), append.strip()) if part)
        first = None
        if agent and initrd is not None:
            line, first = _start_agent(line)
        if "\0" in line or not line.isascii():
            raise ConfigError("the kernel command line must be plain ASCII")
        if len(drives) > DRIVES_MAX:
            raise ConfigError(f"a VM has at most {DRIVES_MAX} drives, not {len(drives)}")
        nets = net_configs(net)
        published = tuple(PublishConfig.parse(each) if isinstance(each, str) else each for each in publish)
        if published and not any(each.kind == "user" for each in nets):
            raise ConfigError("a port is published through a user-mode network: this VM has none (--net user)")
        if pcap is not None:
            if not nets:
                raise ConfigError("there is no network to record: this VM has none")
            nets = (replace(nets[0], pcap=Path(pcap)), *nets[1:])
        config = cls(
            kernel=Path(kernel),
            initrd=None if initrd is None else Path(initrd),
            cmdline=line,
            memory=size,
            cpus=cpus,
            engine=engine,
            reboot=reboot,
            faults=Faults.parse(faults) if isinstance(faults, str) else faults,
            drives=tuple(map(drive_config, drives)),
            ports=port_names(ports),
            nets=nets,
            publish=published,
            shares=tuple(map(share_config, shares)),
            vsock=vsock_configs(vsock),
            agent=first,
            halt_poll=duration("halt-poll", halt_poll) if isinstance(halt_poll, str) else halt_poll,
            irqchip=irqchip,
        )
        if not 0 <= config.halt_poll <= HALT_POLL_MAX:
            raise ConfigError(f"a halt poll takes up to {HALT_POLL_MAX // 1000} us, not {halt_poll}")
        if len(config.bootargs) > CMDLINE_MAX:
            raise ConfigError(
                f"the kernel command line has {len(config.bootargs)} characters; arm64 Linux reads {CMDLINE_MAX}"
            )
        return config


def _start_agent(cmdline: str) -> tuple[str, str]:
    """The command line with the agent as the first program, and what would have been that."""
    # What follows "--" is for the first program.
    words = re.fullmatch(r"(?s)(.*?)((?:^|\s)--(?:\s.*)?)?", cmdline)
    assert words is not None
    own, rest = words[1], words[2] or ""
    named = re.findall(r"(?:^|\s)rdinit=(\S+)", own)
    return f"{own} rdinit={AGENT_PATH}{rest}".strip(), named[-1] if named else "/init"
