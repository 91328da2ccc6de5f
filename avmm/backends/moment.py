"""A disk as it was at one moment, while it goes on changing: copy before write.

::

    shared = SharedDisk(disk)           # takes the disk's place for whoever writes to it
    moment = shared.moment()            # reads as the disk does now, for as long as it is open

Before a piece of the disk is first written after the latest moment, what was there goes to an unnamed file. A moment
reads a piece from the first such file, its own or one of a later moment, that has it; if none has, the disk still does.
The writer is never harmed: what cannot be kept (no room) breaks the moments, whose reads fail from then on.
"""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from typing import Final

from avmm.backends.disk import Disk, clear, read_all, write_all
from avmm.memory import split

#: What is kept at once, in bytes: as in a qcow2 overlay's clusters, which is what reads a moment most often.
CHUNK: Final = 1 << 16


class _Kept:
    """What has been overwritten since a moment, until the next one; ``users`` have that moment open."""

    def __init__(self) -> None:
        self.users = 0
        self.broken = False
        self.places: dict[int, int | None] = {}  # chunk -> where in the file; None: it was zeroes
        self.fd = -1
        self._end = 0

    def keep(self, chunk: int, data: bytearray) -> None:
        """Store a chunk. Raises OSError."""
        if not any(data):
            self.places[chunk] = None
            return
        if self.fd < 0:
            with tempfile.TemporaryFile(prefix="avmm-") as file:
                self.fd = os.dup(file.fileno())
        write_all(self.fd, self._end, [memoryview(data)])
        self.places[chunk] = self._end
        self._end += CHUNK

    def close(self) -> None:
        """Forget it all."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class SharedDisk:
    """``disk`` (a :class:`~avmm.backends.disk.Disk`) of which moments can be kept. Closed, it stays open for them."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.size = disk.size
        self.read_only = disk.read_only
        #: Moments and what was kept for them, the oldest first. Under the lock.
        self.kept: list[_Kept] = []
        self.lock = threading.Lock()
        self._closed = False

    def moment(self) -> Moment:
        """The disk as it is now; nothing may be in flight."""
        with self.lock:
            if not self.kept or self.kept[-1].places or self.kept[-1].broken:
                self.kept.append(_Kept())
            self.kept[-1].users += 1
            return Moment(self, self.kept[-1])

    def leave(self, kept: _Kept) -> None:
        """A moment has been closed: forget what nobody can ask for any more. May raise OSError."""
        with self.lock:
            kept.users -= 1
            while self.kept and not self.kept[0].users:
                self.kept.pop(0).close()
            last = self._closed and not self.kept
        if last:
            self.disk.close()

    def readv(self, offset: int, views: list[memoryview]) -> None:
        """See :class:`Disk`."""
        self.disk.readv(offset, views)

    def read_now(self, offset: int, views: list[memoryview]) -> bool:
        """See :class:`Disk`."""
        return self.disk.read_now(offset, views)

    def writev(self, offset: int, views: list[memoryview]) -> None:
        """See :class:`Disk`."""
        if self.kept:
            self._keep(offset, sum(map(len, views)))
        self.disk.writev(offset, views)

    def flush(self) -> None:
        """See :class:`Disk`."""
        self.disk.flush()

    def discard(self, offset: int, length: int) -> None:
        """See :class:`Disk`."""
        if self.kept:
            self._keep(offset, length)
        self.disk.discard(offset, length)

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        """See :class:`Disk`."""
        if self.kept:
            self._keep(offset, length)
        self.disk.write_zeroes(offset, length, unmap)

    def close(self) -> None:
        """See :class:`Disk`: stored now, and closed with the last moment."""
        with self.lock:
            self._closed = True
            last = not self.kept
        if last:
            self.disk.close()
        elif not self.read_only:
            self.disk.flush()

    def _keep(self, offset: int, length: int) -> None:
        """What is in the range is about to change."""
        for chunk in chunks(offset, length):
            with self.lock:  # until it is kept nobody else may write there
                if not self.kept or self.kept[-1].broken:
                    return
                newest = self.kept[-1]
                if chunk in newest.places:
                    continue
                data = bytearray(min(CHUNK, self.size - chunk * CHUNK))
                try:
                    self.disk.readv(chunk * CHUNK, [memoryview(data)])
                    newest.keep(chunk, data)
                except OSError:
                    for kept in self.kept:
                        kept.broken = True
                    return


class Moment:
    """A :class:`~avmm.backends.disk.Disk` that nobody writes to. Every method raises OSError once it is broken."""

    read_only = True

    def __init__(self, shared: SharedDisk, kept: _Kept) -> None:
        self.shared = shared
        self._kept = kept
        self._closed = False
        self.size = shared.size

    def readv(self, offset: int, views: list[memoryview]) -> None:
        """See :class:`Disk`."""
        disk = self.shared.disk
        for place, at, length in self._pieces(offset, sum(map(len, views))):
            piece, views = split(views, length)
            if place is not None:
                _fetch(place, piece)
                continue
            disk.readv(at, piece)
            # What was kept meanwhile may have been overwritten before we read it.
            for late, _, size in self._pieces(at, length):
                part, piece = split(piece, size)
                if late is not None:
                    _fetch(late, part)

    def read_now(self, offset: int, views: list[memoryview]) -> bool:
        """See :class:`Disk`: only what nobody has written to since."""
        length = sum(map(len, views))
        if not self.shared.disk.read_now(offset, views):
            return False
        return all(place is None for place, _, _ in self._pieces(offset, length))

    def writev(self, offset: int, views: list[memoryview]) -> None:
        """Never."""
        raise OSError(errno.EROFS, "a moment does not change")

    def discard(self, offset: int, length: int) -> None:
        """Never."""
        raise OSError(errno.EROFS, "a moment does not change")

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        """Never."""
        raise OSError(errno.EROFS, "a moment does not change")

    def flush(self) -> None:
        """See :class:`Disk`."""

    def close(self) -> None:
        """See :class:`Disk`. Does nothing a second time."""
        if not self._closed:
            self._closed = True
            self.shared.leave(self._kept)

    def kept(self) -> list[tuple[int, int]]:
        """Where the disk has been written to since, as (offset, length)."""
        shared = self.shared
        with shared.lock:
            since = shared.kept[shared.kept.index(self._kept) :]
            places = sorted({chunk for each in since for chunk in each.places})
        return [(chunk * CHUNK, min(CHUNK, self.size - chunk * CHUNK)) for chunk in places]

    def _pieces(self, offset: int, length: int) -> list[tuple[tuple[int, int] | None, int, int]]:
        """The range in order, as (where it is kept: descriptor and offset, or None: on the disk; offset; length)."""
        found: list[tuple[tuple[int, int] | None, int, int]] = []
        shared, end = self.shared, offset + length
        with shared.lock:
            if self._kept.broken:
                raise OSError(errno.EIO, "what the disk was has been lost: there was no room to keep it")
            since = [each for each in shared.kept[shared.kept.index(self._kept) :] if each.places]
            if not since:
                return [(None, offset, length)] if length else []
            for chunk in chunks(offset, length):
                at = max(offset, chunk * CHUNK)
                size = min(end, (chunk + 1) * CHUNK) - at
                holder = next((each for each in since if chunk in each.places), None)
                if holder is None:
                    if found and found[-1][0] is None:
                        found[-1] = (None, found[-1][1], found[-1][2] + size)
                    else:
                        found.append((None, at, size))
                    continue
                start = holder.places[chunk]
                found.append(((holder.fd, start + at % CHUNK) if start is not None else (-1, 0), at, size))
        return found


def _fetch(place: tuple[int, int], views: list[memoryview]) -> None:
    if place[0] < 0:
        clear(views)
    else:
        read_all(place[0], place[1], views)


def chunks(offset: int, length: int) -> range:
    """The numbers of the chunks that a range touches."""
    return range(offset // CHUNK, -(-(offset + length) // CHUNK)) if length else range(0)
