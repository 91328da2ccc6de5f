"""A network: a virtio network card in the guest, a cable that can be broken, and what is at its other end."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from avmm.attachments.base import Attachment
from avmm.backends.cable import Cable
from avmm.backends.pcap import Pcap
from avmm.backends.stream import Stream
from avmm.backends.tap import Tap
from avmm.config import NetConfig, PublishConfig
from avmm.devices.virtio.net import Net
from avmm.devices.virtio.transport import VirtioDevice
from avmm.errors import ConfigError
from avmm.link import End, Network, join, part


class Backend(Protocol):
    """What moves the frames of a network on the host. ``end`` is where the cable goes."""

    end: End

    async def run(self) -> None:
        """Move frames, until cancelled; then they wait, or are lost."""

    def close(self) -> None:
        """Let go of everything; not running."""


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
        self.cable: Cable | None = None

    def open(self) -> None:
        """See :class:`Attachment`. Raises HostError, ConfigError."""
        config = self._config
        self._pcap = None if config.pcap is None else Pcap(config.pcap)
        cable = Cable(self._pcap)
        try:
            self._backend = _backend(config, cable)
        except BaseException:
            self.close()
            raise
        join(cable.network, self._backend.end)
        self.cable = cable

    def device(self) -> VirtioDevice:
        """See :class:`Attachment`."""
        assert self.cable is not None
        if self._card is not None:
            part(self._card.end)
        card = self._card = Net(self._mac, name=self._name)
        join(card.end, self.cable.card)
        self.cable.watch_link(card.set_link)
        return card

    async def run(self) -> None:
        """See :class:`Attachment`."""
        assert self._backend is not None
        await self._backend.run()

    def gone(self) -> None:
        """See :class:`Attachment`."""
        assert self.cable is not None
        self.cable.close()

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


def _backend(config: NetConfig, cable: Cable) -> Backend:
    if config.kind == "tap":
        return Tap(config.target)
    if config.kind == "socket":
        return Stream(Path(config.target))
    if config.network is None:
        raise ConfigError(f"there is no network {config.kind!r} yet")
    return _Plugged(config.network, cable)


class _Plugged:
    """A network of the program's own, which runs by itself: a switch."""

    def __init__(self, network: Network, owner: object) -> None:
        self._network = network
        self.end = network.plug(owner)

    async def run(self) -> None:
        """See :class:`Backend`."""

    def close(self) -> None:
        """See :class:`Backend`."""
        self._network.unplug(self.end)
