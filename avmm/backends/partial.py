"""A disk of which a file holds some parts: what a snapshot keeps of it, over the file it was made from or over nothing.

:func:`held` says of any disk where it has something of its own, so that a snapshot need not look at the rest.
"""

from __future__ import annotations

import errno
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import Final

from avmm.backends.disk import Disk, RawDisk, clear, read_all, read_cached
from avmm.backends.moment import Moment, SharedDisk
from avmm.backends.qcow2 import Qcow2
from avmm.memory import split

#: Spans are whole multiples of this, in bytes, but for the disk's end.
GRAIN: Final = 1 << 16

#: (offset, length) in bytes.
Span = tuple[int, int]


class PartialDisk:
    """A disk of ``size`` bytes that is never written to.

    ``spans``, in order, lie in ``fd`` (closed with it) from ``at`` on, each at its own offset; the rest is that of
    ``backing``, or zeroes.
    """

    read_only = True

    def __init__(self, fd: int, at: int, size: int, spans: Iterable[Span], backing: Disk | None) -> None:
        self.size = size
        self.spans = list(spans)
        self.backing = backing
        self._fd = fd
        self._at = at
        self._starts = [start for start, _ in self.spans]

    def readv(self, offset: int, views: list[memoryview]) -> None:
        """See :class:`Disk`."""
        for mine, at, length in self._pieces(offset, sum(map(len, views))):
            piece, views = split(views, length)
            if mine:
                read_all(self._fd, self._at + at, piece)
            elif self.backing is not None and at < self.backing.size:
                inside, beyond = split(piece, min(length, self.backing.size - at))
                self.backing.readv(at, inside)
                clear(beyond)
            else:
                clear(piece)

    def read_now(self, offset: int, views: list[memoryview]) -> bool:
        """See :class:`Disk`: only what lies in one piece."""
        pieces = self._pieces(offset, sum(map(len, views)))
        if len(pieces) != 1:
            return False
        mine, at, length = pieces[0]
        if mine:
            return read_cached(self._fd, self._at + at, views)
        return self.backing is not None and at + length <= self.backing.size and self.backing.read_now(at, views)

    def writev(self, offset: int, views: list[memoryview]) -> None:
        """Never."""
        raise OSError(errno.EROFS, "a snapshot does not change")

    def discard(self, offset: int, length: int) -> None:
        """Never."""
        raise OSError(errno.EROFS, "a snapshot does not change")

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        """Never."""
        raise OSError(errno.EROFS, "a snapshot does not change")

    def flush(self) -> None:
        """See :class:`Disk`."""

    def close(self) -> None:
        """See :class:`Disk`."""
        os.close(self._fd)
        if self.backing is not None:
            self.backing.close()

    def _pieces(self, offset: int, length: int) -> list[tuple[bool, int, int]]:
        """The range in order, as (whether it is in the file, offset, length)."""
        found = []
        end = offset + length
        index = max(bisect_right(self._starts, offset) - 1, 0)
        while offset < end:
            start, size = self.spans[index] if index < len(self.spans) else (end, 0)
            if offset < start:
                found.append((False, offset, min(start, end) - offset))
                offset = min(start, end)
            elif offset < start + size:
                last = min(start + size, end)
                found.append((True, offset, last - offset))
                offset = last
            else:
                index += 1
        return found


def held(disk: Disk, *, whole: bool) -> list[Span]:
    """Where ``disk`` may differ from the file that it was made from, in order; ``whole``: from zeroes."""
    found: list[Span] = []
    for start, length in sorted(_held(disk, whole)):
        first = start // GRAIN * GRAIN
        last = min(-(-(start + length) // GRAIN) * GRAIN, disk.size)
        if found and first <= sum(found[-1]):
            found[-1] = (found[-1][0], max(last, sum(found[-1])) - found[-1][0])
        elif first < last:
            found.append((first, last - first))
    return found


def _held(disk: Disk | None, whole: bool) -> Iterator[Span]:
    if isinstance(disk, Moment):
        # In this order: what is kept meanwhile was on the disk before.
        yield from _held(disk.shared, whole)
        yield from disk.kept()
    elif isinstance(disk, SharedDisk):
        yield from _held(disk.disk, whole)
    elif isinstance(disk, PartialDisk):
        yield from disk.spans
        yield from _held(disk.backing, whole)
    elif isinstance(disk, Qcow2):
        if whole or disk.temporary:
            yield from disk.allocated()
            yield from _held(disk.backing, whole)
    elif isinstance(disk, RawDisk):
        if whole:
            yield from disk.written()
    elif disk is not None:
        yield 0, disk.size
