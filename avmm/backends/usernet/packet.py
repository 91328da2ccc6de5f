"""The headers of Ethernet, IPv4, ICMP, UDP and TCP: their layouts, checksums, and how a frame of each is built.

Addresses are what is on the wire: 6 bytes of MAC, 4 bytes of IPv4 address. A built frame has room for its headers in
front of the payload, in one buffer, so that a payload can be read from a socket straight into its place.
"""

from __future__ import annotations

import socket
import struct
from typing import Final, TypeAlias

from avmm.backends.checksum import checksum, ones_sum

Octets: TypeAlias = bytes | bytearray | memoryview

ETHERNET: Final = struct.Struct("!6s6sH")  # destination, source, type
ARP: Final = struct.Struct("!HHBBH6s4s6s4s")  # RFC 826: hardware, protocol, sizes, operation, sender, target
IPV4: Final = struct.Struct("!BBHHHBBH4s4s")  # RFC 791: version+length, TOS, total, id, fragment, TTL, protocol, sum
UDP: Final = struct.Struct("!HHHH")  # source, destination, length, checksum
ICMP: Final = struct.Struct("!BBHI")  # type, code, checksum, the rest
TCP: Final = struct.Struct("!HHIIBBHHH")  # ports, sequence, acknowledgement, offset, flags, window, checksum, urgent

TYPE_IPV4: Final = 0x0800
TYPE_ARP: Final = 0x0806
PROTO_ICMP, PROTO_TCP, PROTO_UDP = 1, 6, 17

#: Where the parts of a frame begin that has no IPv4 options.
IP_AT: Final = ETHERNET.size
L4_AT: Final = IP_AT + IPV4.size
TCP_DATA_AT: Final = L4_AT + TCP.size
UDP_DATA_AT: Final = L4_AT + UDP.size

BROADCAST: Final = b"\xff" * 6
NOBODY: Final = bytes(4)

DONT_FRAGMENT: Final = 0x4000
MORE_FRAGMENTS: Final = 0x2000
_TTL: Final = 64

_HEADERS: Final = struct.Struct("!6s6sH BBHHHBBH4s4s")
_TCP_HEADERS: Final = struct.Struct("!6s6sH BBHHHBBH4s4s HHIIBBHHH")


def address(text: str) -> bytes:
    """The four bytes of ``10.0.2.2``. Raises OSError when it is no IPv4 address."""
    return socket.inet_pton(socket.AF_INET, text)


def name(packed: bytes) -> str:
    """``10.0.2.2`` of its four bytes."""
    return socket.inet_ntop(socket.AF_INET, packed)


def pseudo(source: bytes, destination: bytes, protocol: int, length: int) -> int:
    """The sum of the pseudo-header that TCP and UDP add to theirs (RFC 9293, 3.1)."""
    return ones_sum(source + destination) + protocol + length


def put_ipv4(
    buffer: bytearray,
    macs: tuple[bytes, bytes],
    source: bytes,
    destination: bytes,
    protocol: int,
    *,
    ident: int = 0,
    fragment: int = DONT_FRAGMENT,
) -> None:
    """Write the Ethernet and IPv4 headers of a packet that fills ``buffer``; ``macs`` is (destination, source)."""
    length = len(buffer) - IP_AT
    header = 0x4500 + length + ident + fragment + (_TTL << 8 | protocol) + ones_sum(source + destination)
    _HEADERS.pack_into(
        buffer, 0, *macs, TYPE_IPV4, 0x45, 0, length, ident, fragment, _TTL, protocol, checksum(header), source,
        destination,
    )  # fmt: skip


class TcpHeader:
    """What the headers of all segments of one direction of a connection have in common."""

    __slots__ = ("_ip", "_pair", "_ports", "_tcp", "macs")

    def __init__(self, macs: tuple[bytes, bytes], source: bytes, destination: bytes, ports: tuple[int, int]) -> None:
        self.macs = macs
        self._pair = source, destination
        self._ports = ports
        pair = ones_sum(source + destination)
        self._ip = 0x4500 + DONT_FRAGMENT + (_TTL << 8 | PROTO_TCP) + pair
        self._tcp = PROTO_TCP + pair

    def put(
        self, buffer: bytearray, sequence: int, acknowledgement: int, flags: int, window: int, options: bytes = b""
    ) -> None:
        """Write all headers of a segment that fills ``buffer``. The checksum is that of the pseudo-header only."""
        length = len(buffer) - IP_AT
        source, destination = self._pair
        partial = (self._tcp + length - IPV4.size) % 0xFFFF
        _TCP_HEADERS.pack_into(
            buffer, 0, *self.macs, TYPE_IPV4, 0x45, 0, length, 0, DONT_FRAGMENT, _TTL, PROTO_TCP,
            checksum(self._ip + length), source, destination, *self._ports, sequence, acknowledgement,
            0x50 + (len(options) << 2), flags, window, partial, 0,
        )  # fmt: skip
        if options:
            buffer[TCP_DATA_AT : TCP_DATA_AT + len(options)] = options


def build_udp(
    macs: tuple[bytes, bytes], source: tuple[bytes, int], destination: tuple[bytes, int], payload: Octets
) -> bytearray:
    """A frame with one datagram; the checksum is that of the pseudo-header only."""
    data = memoryview(payload)
    length = UDP.size + len(data)
    buffer = bytearray(L4_AT + length)
    put_ipv4(buffer, macs, source[0], destination[0], PROTO_UDP)
    partial = pseudo(source[0], destination[0], PROTO_UDP, length) % 0xFFFF
    UDP.pack_into(buffer, L4_AT, source[1], destination[1], length, partial)
    buffer[UDP_DATA_AT:] = data
    return buffer
