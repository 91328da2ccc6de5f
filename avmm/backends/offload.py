"""What a network card does to a frame in hardware, done in software where the far end cannot: checksums, segments.

Frames come from guests: what makes no sense is dropped, never believed.
"""

from __future__ import annotations

import struct
from typing import Final

from avmm.backends.checksum import TCP_SUM_AT, UDP_SUM_AT, checksum, ones_sum, udp_checksum
from avmm.link import Frame

_IPV4, _IPV6, _VLAN = b"\x08\x00", b"\x86\xdd", b"\x81\x00"
_TCP: Final = 6
_FIN_PSH, _CWR = 0x09, 0x80
#: No sender has smaller segments than this (Linux's TCP_MIN_GSO_SIZE): a guest gets no thousands of frames for one.
_SEGMENT_MIN: Final = 8


def summed(frame: Frame) -> bytes | bytearray | memoryview:
    """The frame in one piece, however large, with its checksum in place."""
    start = frame.csum_start
    if not start:
        return frame.data
    data = bytearray(frame.data)
    if start + frame.csum_offset + 2 <= len(data):
        complete = udp_checksum if frame.csum_offset == UDP_SUM_AT else checksum
        struct.pack_into(">H", data, start + frame.csum_offset, complete(ones_sum(memoryview(data)[start:])))
    return data


def finished(frame: Frame) -> list[Frame]:
    """``frame`` as frames that anybody understands: complete checksums, no segment larger than it should be."""
    if not frame.csum_start:
        return [frame]
    if not frame.gso_size:
        return [Frame(summed(frame))]
    return [Frame(data) for data in _segments(frame)]


def _segments(frame: Frame) -> list[bytearray]:
    data = memoryview(frame.data)
    tcp, size = frame.csum_start, frame.gso_size
    ip = 18 if data[12:14] == _VLAN else 14
    kind = bytes(data[ip - 2 : ip])
    if tcp + 20 > len(data) or size < _SEGMENT_MIN or frame.csum_offset != TCP_SUM_AT:
        return []
    first = tcp + (data[tcp + 12] >> 4) * 4  # of the payload
    if first < tcp + 20 or first > len(data) or tcp < ip + (20 if kind == _IPV4 else 40) or kind not in (_IPV4, _IPV6):
        return []
    addresses = data[ip + 12 : ip + 20] if kind == _IPV4 else data[ip + 8 : ip + 40]
    head = bytearray(data[:first])
    (sequence,) = struct.unpack_from(">I", head, tcp + 4)
    (identity,) = struct.unpack_from(">H", head, ip + 4)
    flags = head[tcp + 13]
    pseudo = ones_sum(addresses) + _TCP
    struct.pack_into(">H", head, tcp + TCP_SUM_AT, 0)
    if kind == _IPV4:
        struct.pack_into(">H", head, ip + 10, 0)
    pieces = []
    for number, at in enumerate(range(first, len(data), size)):
        payload = data[at : at + size]
        segment = head + payload
        last = at + size >= len(data)
        length = len(segment) - tcp
        struct.pack_into(">I", segment, tcp + 4, sequence + at - first & 0xFFFFFFFF)
        segment[tcp + 13] = flags & ~(_CWR if number else 0) & ~(0 if last else _FIN_PSH)
        if kind == _IPV4:
            struct.pack_into(">H", segment, ip + 2, len(segment) - ip)
            struct.pack_into(">H", segment, ip + 4, identity + number & 0xFFFF)
            struct.pack_into(">H", segment, ip + 10, checksum(ones_sum(memoryview(segment)[ip:tcp])))
        else:
            struct.pack_into(">H", segment, ip + 4, len(segment) - ip - 40)
        total = pseudo + length + ones_sum(memoryview(segment)[tcp:])
        struct.pack_into(">H", segment, tcp + TCP_SUM_AT, checksum(total))
        pieces.append(segment)
    return pieces
