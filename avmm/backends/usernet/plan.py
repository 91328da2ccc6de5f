"""Who is where on the user-mode network: by default what QEMU's has, so that people and guests recognise it."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from avmm.backends.usernet.packet import address


@dataclass(frozen=True, slots=True)
class Plan:
    """The addresses of a network, as the bytes on the wire.

    ``gateway`` is this host (its loopback), ``dns`` the name server, ``guest`` the first address that is leased.
    ``isolated``: guests reach nothing but what this program serves them.
    """

    network: bytes = field(default_factory=lambda: address("10.0.2.0"))
    prefix: int = 24
    gateway: bytes = field(default_factory=lambda: address("10.0.2.2"))
    dns: bytes = field(default_factory=lambda: address("10.0.2.3"))
    guest: bytes = field(default_factory=lambda: address("10.0.2.15"))
    mac: bytes = bytes.fromhex("525500000202")
    hostname: str = ""
    isolated: bool = False

    @property
    def mask(self) -> bytes:
        """The network mask."""
        return (0xFFFFFFFF << 32 - self.prefix & 0xFFFFFFFF).to_bytes(4, "big")

    @property
    def broadcast(self) -> bytes:
        """The network's broadcast address."""
        return ipaddress.IPv4Network((self.network, self.prefix)).broadcast_address.packed

    def inside(self, where: bytes) -> bool:
        """Whether ``where`` is an address of this network."""
        shift = 32 - self.prefix
        return int.from_bytes(where, "big") >> shift == int.from_bytes(self.network, "big") >> shift

    def is_guest(self, where: bytes) -> bool:
        """Whether a guest may have the address ``where``."""
        return self.inside(where) and where not in (self.network, self.broadcast, self.gateway, self.dns)
