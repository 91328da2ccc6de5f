"""IPv4 fragments (RFC 791, 3.2), sans-io: put together what guests send in pieces, cut what is too long for them."""

from __future__ import annotations

from typing import Final

from avmm.backends.usernet.packet import IP_AT, IPV4, L4_AT, MORE_FRAGMENTS, Octets, put_ipv4

_SECONDS: Final = 15.0
#: Datagrams being put together, and pieces of one.
_DATAGRAMS: Final = 32
_PIECES: Final = 128
_LONGEST: Final = 0xFFFF - IPV4.size


class _Pieces:
    def __init__(self, now: float) -> None:
        self.since = now
        self.data = bytearray()
        self.spans: list[tuple[int, int]] = []
        self.length: int | None = None


class Fragments:
    """Datagrams being put together. Bounded: the oldest makes way."""

    def __init__(self) -> None:
        self._waiting: dict[bytes, _Pieces] = {}

    def add(self, key: bytes, offset: int, more: bool, data: memoryview, now: float) -> bytearray | None:
        """A piece at ``offset`` of the datagram known by ``key``; the whole when this was the last one missing."""
        end = offset + len(data)
        if end > _LONGEST or (more and len(data) % 8) or not data:
            return None
        pieces = self._waiting.get(key)
        if pieces is None or now - pieces.since > _SECONDS:
            while len(self._waiting) >= _DATAGRAMS:
                del self._waiting[next(iter(self._waiting))]
            pieces = self._waiting[key] = _Pieces(now)
        overlaps = any(offset < stop and start < end for start, stop in pieces.spans)
        if overlaps or len(pieces.spans) >= _PIECES or (pieces.length is not None and end > pieces.length):
            del self._waiting[key]  # RFC 5722 says so for IPv6, and nobody honest does it in IPv4
            return None
        if len(pieces.data) < end:
            pieces.data.extend(bytes(end - len(pieces.data)))
        pieces.data[offset:end] = data
        pieces.spans.append((offset, end))
        if not more:
            pieces.length = end
        if pieces.length is None or sum(stop - start for start, stop in pieces.spans) < pieces.length:
            return None
        del self._waiting[key]
        return pieces.data


def cut(frame: Octets, macs: tuple[bytes, bytes], protocol: int, ident: int, mtu: int) -> list[bytearray]:
    """The frames that carry the packet in ``frame`` (no IPv4 options, all sums made) in pieces of ``mtu`` bytes."""
    payload = memoryview(frame)[L4_AT:]
    source, destination = bytes(frame[IP_AT + 12 : IP_AT + 16]), bytes(frame[IP_AT + 16 : IP_AT + 20])
    step = (mtu - IPV4.size) // 8 * 8
    frames = []
    for at in range(0, len(payload), step):
        piece = bytearray(L4_AT) + payload[at : at + step]
        more = MORE_FRAGMENTS if at + step < len(payload) else 0
        put_ipv4(piece, macs, source, destination, protocol, ident=ident, fragment=more | at >> 3)
        frames.append(piece)
    return frames
