"""Ethernet links: what a network device and the host's networks have in common.

A link has two ends, each with an owner: a device, a switch, a TAP interface, a network stack. All on one event loop.
Nothing is lost on a link by itself: an end that has no room says so, and tells when it has room again.

::

    end = End(self._received, offload=True)
    join(end, other)
    if not end.send(Frame(data)):
        ...  # not taken: keep it until end.on_room is called, or drop it
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


@dataclass(slots=True)
class Frame:
    """One Ethernet frame without its FCS, or a TCP segment that stands for several.

    ``csum_start`` 0: checksums are complete. Else the 16-bit one's complement sum from there to the end is still to be
    stored at ``csum_start + csum_offset``, where that of the pseudo header is now.
    ``gso_size`` 0: one frame as it stands. Else its TCP payload is to be cut into segments of so many bytes, each with
    the headers of this one (TCP over IPv4 or IPv6, as the headers say); that needs ``csum_start``, too.
    """

    data: bytes | bytearray | memoryview
    csum_start: int = 0
    csum_offset: int = 0
    gso_size: int = 0

    @property
    def ipv6(self) -> bool:
        """Whether it carries IPv6."""
        at = 16 if self.data[12:14] == b"\x81\x00" else 12  # behind a VLAN tag
        return self.data[at : at + 2] == b"\x86\xdd"

    @property
    def header_size(self) -> int:
        """Bytes of all its headers, the TCP header's included: of a frame with ``gso_size``."""
        return self.csum_start + (self.data[self.csum_start + 12] >> 4) * 4


def _ignore() -> None:
    pass


class End:
    """One end of a link. ``receive(frame)`` gets what the other end sends and returns whether it took it; whoever
    returns False calls :meth:`room` later. ``offload``: it takes unfinished checksums and large segments."""

    __slots__ = ("offload", "on_room", "peer", "receive")

    def __init__(self, receive: Callable[[Frame], bool], *, offload: bool = False) -> None:
        self.receive = receive
        self.offload = offload
        #: Called when the other end can take frames again after it refused one.
        self.on_room: Callable[[], None] = _ignore
        self.peer: End | None = None

    def send(self, frame: Frame) -> bool:
        """Hand ``frame`` to the other end; False when it has no room. With nobody there it is gone, as on a cable
        without a plug. Only where ``peer.offload`` may it be unfinished."""
        return self.peer is None or self.peer.receive(frame)

    def room(self) -> None:
        """Say that this end can take frames again."""
        if self.peer is not None:
            self.peer.on_room()


def join(one: End, other: End) -> None:
    """Make a link of two ends."""
    one.peer, other.peer = other, one


def part(end: End) -> None:
    """Unplug it."""
    if end.peer is not None:
        end.peer.peer = None
        end.peer = None


class Network(Protocol):
    """What network cards can be plugged into: a switch."""

    def plug(self, owner: object) -> End:
        """An end for one more card, to be joined with the card's; ``owner`` is whose it is."""
        ...

    def unplug(self, end: End) -> None:
        """The card at ``end`` is no more."""
        ...
