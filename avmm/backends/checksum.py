"""The Internet checksum (RFC 1071)."""

from __future__ import annotations

from typing import Final

#: Where in their headers TCP and UDP have it.
TCP_SUM_AT: Final = 16
UDP_SUM_AT: Final = 6


def ones_sum(data: bytes | bytearray | memoryview) -> int:
    """The one's complement sum of big-endian 16-bit words, odd lengths padded, not yet inverted; 0 for one of 0xFFFF.

    65536 is 1 modulo 65535, so that the sum of the digits to that base is the number itself: the loop over the words
    runs in C.
    """
    total = int.from_bytes(data, "big") % 0xFFFF
    return total * 256 % 0xFFFF if len(data) & 1 else total


def checksum(total: int) -> int:
    """The checksum for the sum of all words, its own field as zero. Never 0xFFFF, which is 0 too (RFC 1624, 3)."""
    return -total % 0xFFFF


def udp_checksum(total: int) -> int:
    """The same for UDP: never 0, which says that there is none (RFC 768)."""
    return checksum(total) or 0xFFFF
