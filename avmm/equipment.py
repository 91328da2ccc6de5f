"""What a VM has been given besides processors and memory, as its user sees it: disks, networks, folders, ports.

Each is an attachment; before the start there is only its configuration.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from avmm.attachments.balloon import BalloonAttachment
from avmm.attachments.base import Attachment
from avmm.attachments.drive import DriveAttachment
from avmm.attachments.net import NetAttachment, Network
from avmm.attachments.ports import PortsAttachment
from avmm.attachments.share import ShareAttachment
from avmm.attachments.vsock import VsockAttachment
from avmm.backends.balloon import Balloon
from avmm.backends.port import Port
from avmm.config import (
    DriveLike,
    NetLike,
    ShareLike,
    VmConfig,
    VsockConfig,
    drive_config,
    net_configs,
    port_names,
    share_config,
    vsock_configs,
)
from avmm.errors import ConfigError

if TYPE_CHECKING:  # what a VM has not been given is not loaded
    from avmm.backends.drive import Drive
    from avmm.backends.share.server import Share
    from avmm.backends.vsock.host import VsockHost

_A = TypeVar("_A", bound=Attachment)


class Equipment:
    """The part of a VM that has them: its ``config``, its ``state`` and its attachments."""

    def __init__(self, config: VmConfig) -> None:
        self.config = config
        self.state = "created"
        self._attachments: list[Attachment] = []

    @property
    def drives(self) -> list[Drive]:
        """The disks, in the order they were given, for their counters and faults; none before the VM is started."""
        return [each.drive for each in self._all(DriveAttachment) if each.drive is not None]

    def add_drive(self, drive: DriveLike) -> None:
        """Give a VM that has not been started one more disk: a path with options as for ``--drive``, or DriveConfig."""
        self._expect_state("created")
        self.config = replace(self.config, drives=(*self.config.drives, drive_config(drive)))

    @property
    def nets(self) -> list[Network]:
        """The networks, in the order they were given; none before the VM is started."""
        return [each.network for each in self._all(NetAttachment) if each.network is not None]

    @property
    def net(self) -> Network:
        """The first of :attr:`nets`. Raises ConfigError when there is none."""
        if not self.nets:
            raise ConfigError("this VM has no network, or has not been started")
        return self.nets[0]

    def add_net(self, net: NetLike) -> None:
        """Give a VM that has not been started one more network: a Switch, text as for ``--net``, or NetConfig."""
        self._expect_state("created")
        self.config = replace(self.config, nets=net_configs([*self.config.nets, net]))

    @property
    def shares(self) -> list[Share]:
        """The shared folders, in the order they were given, for their counters; none before the VM is started."""
        return [each.share for each in self._all(ShareAttachment) if each.share is not None]

    def add_share(self, share: ShareLike) -> None:
        """Share one more folder with a VM that has not been started: a path with options as for ``--share``, or
        ShareConfig."""
        self._expect_state("created")
        self.config = replace(self.config, shares=(*self.config.shares, share_config(share)))

    @property
    def vsock(self) -> VsockHost:
        """Sockets between guest and host that need no network. Raises ConfigError when there is no such device."""
        found = self._all(VsockAttachment)
        if not found:
            raise ConfigError("this VM has no vsock (vsock=True, or sockets as for --vsock), or has not been started")
        return found[0].host

    def add_vsock(self, socket: str | VsockConfig | None = None) -> None:
        """Give a VM that has not been started a vsock, and one more port of the host's: text as for ``--vsock``, or
        VsockConfig; None for none."""
        self._expect_state("created")
        sockets = (*(self.config.vsock or ()), *(() if socket is None else (socket,)))
        self.config = replace(self.config, vsock=vsock_configs(sockets) or ())

    @property
    def balloon(self) -> Balloon:
        """Memory to be taken from the guest, and what it says of its own. Raises ConfigError before the start."""
        found = self._all(BalloonAttachment)
        if not found:
            raise ConfigError("this VM has not been started")
        return found[0].balloon

    @property
    def ports(self) -> dict[str, Port]:
        """The host's ends of the virtio console's ports, by name; none before the VM is started."""
        return {name: port for each in self._all(PortsAttachment) for name, port in each.ports.items()}

    def add_port(self, name: str) -> None:
        """Give a VM that has not been started one more virtio console port, see :func:`avmm.boot`."""
        self._expect_state("created")
        self.config = replace(self.config, ports=port_names((*self.config.ports, name)))

    def resize(self, port: str, columns: int, rows: int) -> None:
        """Tell the guest the size of the terminal at its virtio console port of this name."""
        if port not in self.ports:
            raise ConfigError(f"the VM has no port {port!r}; it has {', '.join(self.ports) or 'none'}")
        self._all(PortsAttachment)[0].resize(port, columns, rows)

    def _all(self, kind: type[_A]) -> list[_A]:
        return [each for each in self._attachments if isinstance(each, kind)]

    def _expect_state(self, wanted: str) -> None:
        if self.state != wanted:
            raise ConfigError(f"this needs a VM that is {wanted}; it is {self.state}")
