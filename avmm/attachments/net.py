"""A network: a virtio network card in the guest, a cable that can be broken, and what is at its other end."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from avmm.attachments.base import Attachment
from avmm.backends.cable import Cable
from avmm.backends.pcap import Pcap
from avmm.backends.stream import Stream
from avmm.backends.tap import Tap
from avmm.config import NetConfig, PublishConfig
from avmm.devices.virtio.net import Net
from avmm.devices.virtio.transport import VirtioDevice
from avmm.errors import ConfigError
from avmm.link import End, join, part
from avmm.link import Network as Pluggable

if TYPE_CHECKING:  # see base.py
    from avmm.backends.flow.streams import Handler, Streams
    from avmm.backends.usernet.dns import Names
    from avmm.backends.usernet.network import UserNetwork
    from avmm.backends.usernet.stack import Guests
    from avmm.snapfile import Reader, Writer


class Backend(Protocol):
    """What moves the frames of a network on the host. ``end`` is where the cable goes."""

    end: End

    async def run(self) -> None:
        """Move frames, until cancelled; then they wait, or are lost."""

    def close(self) -> None:
        """Let go of everything; not running."""


class Network(Cable):
    """``vm.net``: the cable with its counters and faults, and what a user-mode network can do for a test."""

    def __init__(self, pcap: Pcap | None, user: UserNetwork | None) -> None:
        super().__init__(pcap)
        self._user = user

    @property
    def user(self) -> UserNetwork:
        """The user-mode network itself. Raises ConfigError when this is another kind, as all that follows does."""
        if self._user is None:
            raise ConfigError('this takes a user-mode network: net="user", --net user')
        return self._user

    def gone(self) -> None:
        """The guest's machine has ended: nothing is on its way, nobody waits for it any more."""
        self.clear()
        if self._user is not None:
            self._user.gone()

    @property
    def dns(self) -> Names:
        """Names of one's own: ``vm.net.dns["api.test"] = "10.0.2.2"``, an address of the network's or any other."""
        return self.user.dns

    def serve(self, port: int, handler: Handler, *, address: str = "10.0.2.2") -> None:
        """``handler(reader, writer)``, as for :func:`asyncio.start_server`, answers guests that connect to ``port`` of
        ``address``; no port of the host's is used."""
        self.user.serve(port, handler, address=address)

    def stop_serving(self, port: int, *, address: str = "10.0.2.2") -> None:
        """Take no more connections to ``port``."""
        self.user.stop_serving(port, address=address)

    async def connect(self, port: int, *, timeout: float | None = None) -> Streams:
        """(reader, writer) of a connection to the guest's ``port``. Raises ConnectionRefusedError when nobody listens
        there, WaitTimeout, GuestGone."""
        return await self.user.connect(port, timeout=timeout)

    @property
    def published(self) -> list[tuple[str, int]]:
        """(address, port) on the host of each published port, in order: what a port of 0 has become."""
        return self.user.published


class NetAttachment(Attachment):
    """The network of ``config``; ``name`` is what messages call it."""

    section = "nets"

    def __init__(self, config: NetConfig, name: str, publish: Sequence[PublishConfig] = ()) -> None:
        self._config = config
        self._name = name
        self._publish = publish
        self._mac = config.mac or b"\x52\x54\x00" + os.urandom(3)
        self._pcap: Pcap | None = None
        self._backend: Backend | None = None
        self._card: Net | None = None
        self._origin: NetAttachment | None = None
        self._loaded = False
        self._guests: Guests | None = None  # of which ours is a copy
        self.network: Network | None = None

    def open(self) -> None:
        """See :class:`Attachment`. Raises HostError, ConfigError."""
        config = self._config
        self._pcap = None if config.pcap is None else Pcap(config.pcap)
        try:
            user = self._user_network() if config.kind == "user" else None
            self.network = Network(self._pcap, user)
            self._backend = user or self._open_backend(self.network)
        except BaseException:
            self.close()
            raise
        if self._origin is not None and self._origin.network is not None and user is not None:
            user.serve_as(self._origin.network.user)
        if self._guests is not None and user is not None:
            user.adopt(self._guests)
        join(self.network.network, self._backend.end)

    def _open_backend(self, network: Network) -> Backend:
        config = self._config
        if self._origin is not None or (self._loaded and config.kind == "network"):
            return _Nowhere()
        if config.kind == "tap":
            return Tap(config.target)
        if config.kind == "socket":
            return Stream(Path(config.target))
        assert config.network is not None
        return _Plugged(config.network, network)

    def _user_network(self) -> UserNetwork:
        from avmm.backends.usernet.network import Forward, UserNetwork

        publish = [Forward(each.host, each.guest, each.udp, each.address) for each in self._publish]
        return UserNetwork(restrict=self._config.restrict, publish=publish)

    def fork(self) -> NetAttachment:
        """See :class:`Attachment`. A user-mode network is made again, with the same names and servers, its published
        ports at free ones, and without the connections there are, which the twin finds reset. A twin that has the same
        addresses as this VM is not plugged into anything else."""
        publish = [replace(each, host=0) for each in self._publish]
        twin = NetAttachment(replace(self._config, pcap=None, mac=self._mac), self._name, publish)
        twin._origin = self
        if self._config.kind == "user" and self.network is not None:
            twin._guests = self.network.user.stack.guests()
        return twin

    def record(self, pcap: Path | None) -> None:
        """Record its frames in this file, or not. Before it is opened."""
        self._config = replace(self._config, pcap=pcap)

    def store(self, writer: Writer, name: str) -> Any:
        """See :class:`Attachment`."""
        return {"mac": self._mac, "guests": self._guests}

    def load(self, reader: Reader, stored: Any) -> None:
        """See :class:`Attachment`. A network of the program that made the snapshot is not to be had again."""
        self._mac = stored["mac"]
        self._guests = stored.get("guests")
        self._loaded = True

    def device(self) -> VirtioDevice:
        """See :class:`Attachment`."""
        assert self.network is not None
        if self._card is not None:
            part(self._card.end)
        card = self._card = Net(self._mac, name=self._name)
        join(card.end, self.network.card)
        self.network.clear()
        self.network.watch_link(card.set_link)
        return card

    async def run(self) -> None:
        """See :class:`Attachment`."""
        assert self._backend is not None
        await self._backend.run()

    def gone(self) -> None:
        """See :class:`Attachment`."""
        if self.network is not None:
            self.network.gone()

    def close(self) -> None:
        """See :class:`Attachment`."""
        if self._backend is not None:
            self._backend.close()
        if self._pcap is not None:
            self._pcap.close()

    def describe(self) -> list[Any]:
        """See :class:`Attachment`."""
        config = self._config
        found: dict[str, Any] = {"kind": config.kind}
        if config.target:
            found["target"] = config.target
        if config.kind == "user":
            found["restrict"] = config.restrict
            found["publish"] = [
                {"address": each.address, "host": each.host, "guest": each.guest, "udp": each.udp}
                for each in self._publish
            ]
        found["mac"] = None if config.mac is None else config.mac.hex(":")
        found["pcap"] = None if config.pcap is None else os.fspath(config.pcap)
        return [found]


class _Nowhere:
    """The other end of a cable that is plugged into nothing."""

    def __init__(self) -> None:
        self.end = End(lambda frame: True, offload=True)

    async def run(self) -> None:
        """See :class:`Backend`."""

    def close(self) -> None:
        """See :class:`Backend`."""


class _Plugged:
    """A network of the program's own, which runs by itself: a switch."""

    def __init__(self, network: Pluggable, owner: object) -> None:
        self._network = network
        self.end = network.plug(owner)

    async def run(self) -> None:
        """See :class:`Backend`."""

    def close(self) -> None:
        """See :class:`Backend`."""
        self._network.unplug(self.end)
