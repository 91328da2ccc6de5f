"""The Internet checksum (RFC 1071)."""

from __future__ import annotations


def ones_sum(data: bytes | bytearray | memoryview) -> int:
    """The one's complement sum of big-endian 16-bit words, odd lengths padded, not yet inverted; 0 for one of 0xFFFF.

    65536 is 1 modulo 65535, so that the sum of the digits to that base is the number itself: the loop over the words
    runs in C.
    """
    total = int.from_bytes(data, "big") % 0xFFFF
    return total * 256 % 0xFFFF if len(data) & 1 else total


def checksum(total: int) -> int:
    """The checksum for the sum of all words, its own field as zero. Never 0, which UDP reads as "none" (RFC 768)."""
    return 0xFFFF - total % 0xFFFF
