"""qcow2 version 3, QEMU's disk format (docs/interop/qcow2.txt in its sources): read, write, copy on write.

A disk is cut into clusters; two levels of tables say where each lies in the file, and a reference count is kept for
every cluster of the file. What is written where there is no cluster yet goes to a new one at the file's end.

What survives a crash: data and reference counts are written at once, the tables that make new clusters visible at a
flush, after what they point to is on the medium. So whatever happens in between, the image is whole: at worst it has
clusters that nothing refers to, which ``qemu-img check`` calls leaked.

Clusters that are discarded become "reads as zeroes" and holes in the file, but keep their place: no cluster is ever
given to somebody else while an earlier request may still write to it.

Read but never made: compressed clusters. Refused: encryption, external data files, extended tables, and for writing,
images with internal snapshots. The table of reference counts does not grow: with clusters of 64 KiB it lasts for a
file of 16 TiB, and whoever fills it gets "no space left".
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import sys
import threading
import zlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from avmm.backends.disk import (
    FORMATS,
    QCOW2_MAGIC,
    SECTOR,
    Disk,
    clear,
    open_disk,
    punch,
    read_all,
    read_cached,
    sync,
    write_all,
)
from avmm.errors import ImageError
from avmm.memory import split

_HEADER: Final = struct.Struct(">4sIQIIQIIQQIIQQQQII")
_HEADER_LENGTH: Final = 112  # with the compression type, padded
_AUTOCLEAR_AT: Final = 88
_EXTENSION: Final = struct.Struct(">II")
_BACKING_FORMAT: Final = 0xE2792ACA
_INCOMPATIBLE_DIRTY, _INCOMPATIBLE_CORRUPT = 1, 2

_COPIED: Final = 1 << 63  # exactly one reference: may be written in place
_COMPRESSED: Final = 1 << 62
_ZERO: Final = 1
_OFFSET: Final = 0x00FF_FFFF_FFFF_FE00

_REFCOUNT_ORDER: Final = 4  # 16 bits
_L1_MAX: Final = 32 << 20  # bytes, as QEMU allows
_TABLE_MAX: Final = 8 << 20
_NAME_MAX: Final = 1023
# Second-level tables kept in memory when they are clean; with clusters of 64 KiB each is 64 KiB, for half a gigabyte.
_KEPT: Final = 256


class _Kind(Enum):
    DATA = 0
    ZERO = 1
    BACKING = 2
    COMPRESSED = 3


@dataclass(slots=True)
class _Table:
    """A second-level table in memory: its place in the file, and its entries in the host's byte order."""

    offset: int
    entries: array[int]
    dirty: bool = False


class Qcow2:
    """The image in ``fd`` (closed with this object); ``path`` is for its backing file's name and for messages.

    ``backing``: the disk behind it, where the caller knows better than the header. ``temporary``: it was made in this
    process, and is no file that anybody else could open. Raises ImageError.
    """

    _next: int  # the first cluster of the file that is free, as are all after it

    def __init__(
        self, fd: int, path: Path, *, read_only: bool = False, depth: int = 0, backing: Disk | None = None
    ) -> None:
        self._fd = fd
        self._path = path
        self._bits: int
        self._refcounts_at: int
        self.read_only = read_only
        self.temporary = False
        self._lock = threading.Lock()  # the tables, in memory and in the file
        self._flushing = threading.Lock()
        self._tables: dict[int, _Table] = {}
        self._dirty_l1: set[int] = set()
        self._unused: list[int] = []  # clusters whose count goes down once no table in the file refers to them
        head = os.pread(fd, 1 << 16, 0)
        if len(head) < _HEADER.size or not head.startswith(QCOW2_MAGIC):
            raise ImageError(f"{path} is not a qcow2 image; is it format=raw?")
        (
            _, version, name_at, name_size, self._bits, size, crypt, l1_size, l1_at, self._refcounts_at,
            refcount_clusters, snapshots, _, incompatible, _, autoclear, refcount_order, header_length,
        ) = _HEADER.unpack_from(head)  # fmt: skip
        if version != 3:
            raise ImageError(f"{path} is qcow2 of version {version}; make it 3 with: qemu-img amend -o compat=1.1")
        if crypt or incompatible & ~(_INCOMPATIBLE_DIRTY | _INCOMPATIBLE_CORRUPT):
            raise ImageError(f"{path} uses encryption or a feature we do not have; convert it with qemu-img convert")
        if not 9 <= self._bits <= 21 or not _HEADER.size <= header_length <= 1 << self._bits:
            raise ImageError(f"{path} is damaged: its header makes no sense")
        if not read_only:
            if snapshots or refcount_order != _REFCOUNT_ORDER:
                raise ImageError(f"{path} has internal snapshots or odd reference counts; open it with ro or snapshot")
            if incompatible:
                raise ImageError(f"{path} was not closed properly; repair it with: qemu-img check -r all")
        self._cluster = 1 << self._bits
        self._per_table = self._cluster // 8
        self.size = -(-size // SECTOR) * SECTOR
        needed = -(-size // (self._cluster * self._per_table))
        if l1_size < needed or l1_size * 8 > _L1_MAX or self._is_no_place(l1_at):
            raise ImageError(f"{path} is damaged: its first table does not cover the disk")
        if (refcount_clusters << self._bits) > _TABLE_MAX or self._is_no_place(self._refcounts_at):
            raise ImageError(f"{path} is damaged: its reference counts make no sense")
        self._l1_at = l1_at
        self._l1 = self._read_table(l1_at, l1_size)
        self.backing = backing or self._open_backing(head, header_length, name_at, name_size, depth)
        if not read_only:
            self._refcounts = self._read_table(self._refcounts_at, refcount_clusters * self._per_table)
            self._per_block = self._cluster // 2
            self._next = self._first_free()
            if autoclear:
                os.pwrite(fd, bytes(8), _AUTOCLEAR_AT)  # extensions we do not keep up, such as bitmaps

    @classmethod
    def create(cls, fd: int, path: Path, size: int, backing: Disk | None = None, cluster_bits: int = 16) -> Qcow2:
        """A new image of ``size`` bytes in the empty file ``fd``. The header does not name ``backing``,
        which is a disk of this process."""
        cluster = 1 << cluster_bits
        entries = -(-size // (cluster * cluster // 8))
        l1_clusters = -(-entries * 8 // cluster)
        header = _HEADER.pack(
            QCOW2_MAGIC, 3, 0, 0, cluster_bits, size, 0, entries, 3 * cluster, cluster, 1, 0, 0, 0, 0, 0,
            _REFCOUNT_ORDER, _HEADER_LENGTH,
        )  # fmt: skip
        os.pwrite(fd, header.ljust(_HEADER_LENGTH, b"\0"), 0)
        os.pwrite(fd, struct.pack(">Q", 2 * cluster), cluster)
        os.pwrite(fd, b"\0\1" * (3 + l1_clusters), 2 * cluster)
        os.ftruncate(fd, (3 + l1_clusters) * cluster)
        made = cls(fd, path, backing=backing)
        made.temporary = True
        return made

    # What a disk does.

    def readv(self, offset: int, views: list[memoryview]) -> None:
        """See :class:`Disk`."""
        for kind, place, at, length in self._runs(offset, sum(map(len, views))):
            piece, views = split(views, length)
            self._read(kind, place, at, piece)

    def read_now(self, offset: int, views: list[memoryview]) -> bool:
        """See :class:`Disk`: only what lies in one piece, or in the backing file."""
        length = sum(map(len, views))
        if self._lock.locked() or not self._tables_at_hand(offset, length):
            return False  # somebody allocates, or a table has to be read: that may take a while
        first, *more = self._runs(offset, length)
        if more:
            return False
        kind, place, at, _ = first
        if kind is _Kind.DATA:
            return read_cached(self._fd, place, views)
        if kind is _Kind.BACKING and self.backing is not None and at + length <= self.backing.size:
            return self.backing.read_now(at, views)
        return False

    def writev(self, offset: int, views: list[memoryview]) -> None:
        """See :class:`Disk`."""
        end = offset + sum(map(len, views))
        while offset < end:
            with self._lock:
                place, length = self._in_place(offset, end)
                if not length:
                    length = self._allocating(offset, end)
                    piece, views = split(views, length)
                    self._write_new(offset, piece, length)
            if place:
                piece, views = split(views, length)
                write_all(self._fd, place, piece)
            offset += length

    def flush(self) -> None:
        """See :class:`Disk`. What the tables point to comes first, then second-level tables, then the first."""
        with self._flushing:
            with self._lock:
                tables = [table for table in self._tables.values() if table.dirty]
                content = [(table.offset, _big_endian(table.entries)) for table in tables]
                entries = [(self._l1_at + 8 * index, struct.pack(">Q", self._l1[index])) for index in self._dirty_l1]
                pointers, unused = self._dirty_l1, self._unused
                for table in tables:
                    table.dirty = False
                self._dirty_l1, self._unused = set(), []
            try:
                if tables or entries:
                    sync(self._fd)
                for offset, data in content:
                    self._put(offset, data)
                if entries:
                    sync(self._fd)
                for offset, data in entries:
                    self._put(offset, data)
                sync(self._fd)
            except OSError:
                with self._lock:  # still to be done
                    for table in tables:
                        table.dirty = True
                    self._dirty_l1 |= pointers
                    self._unused += unused
                raise
            with self._lock:
                self._give_back(unused)

    def discard(self, offset: int, length: int) -> None:
        """See :class:`Disk`: whole clusters only."""
        first = -(-offset // self._cluster) * self._cluster
        last = (offset + length) // self._cluster * self._cluster
        if first < last:
            self._zero_clusters(first, last, unmap=True)

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        """See :class:`Disk`."""
        end = offset + length
        first = min(-(-offset // self._cluster) * self._cluster, end)
        last = max(end if end == self.size else end // self._cluster * self._cluster, first)
        if offset < first:
            self.writev(offset, [memoryview(bytes(first - offset))])
        if first < last:
            self._zero_clusters(first, last, unmap)
        if last < end:
            self.writev(last, [memoryview(bytes(end - last))])

    def close(self) -> None:
        """See :class:`Disk`."""
        try:
            if not self.read_only:
                self.flush()
        finally:
            os.close(self._fd)
            if self.backing is not None:
                self.backing.close()

    def allocated(self) -> Iterator[tuple[int, int]]:
        """What it has itself and not from its backing file, as (offset, length)."""
        for index in range(len(self._l1)):
            with self._lock:
                table = self._table(index)
                entries = array("Q") if table is None else table.entries[:]
            for number, entry in enumerate(entries, index * self._per_table):
                if entry and number << self._bits < self.size:
                    yield number << self._bits, min(self._cluster, self.size - (number << self._bits))

    # Reading.

    def _tables_at_hand(self, offset: int, length: int) -> bool:
        reach = self._bits + self._per_table.bit_length() - 1
        indices = range(offset >> reach, (offset + length - 1 >> reach) + 1)
        return all(index in self._tables or not self._l1[index] for index in indices)

    def _runs(self, offset: int, length: int) -> list[tuple[_Kind, int, int, int]]:
        """What the range is made of: (kind, where in the file, where on the disk, length), in order, without gaps."""
        runs: list[tuple[_Kind, int, int, int]] = []
        with self._lock:
            for at, size, entry in self._entries(offset, offset + length):
                kind, place = self._kind(entry, at)
                if runs and kind is not _Kind.COMPRESSED:
                    last_kind, last_place, last_at, last_size = runs[-1]
                    if kind is last_kind and (kind is not _Kind.DATA or last_place + last_size == place):
                        runs[-1] = (kind, last_place, last_at, last_size + size)
                        continue
                runs.append((kind, place, at, size))
        return runs

    def _entries(self, offset: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(offset, length, table entry) of each cluster's part of the range. Under the lock."""
        while offset < end:
            number = offset >> self._bits
            size = min(end, (number + 1) << self._bits) - offset
            table = self._table(number // self._per_table)
            yield offset, size, 0 if table is None else table.entries[number % self._per_table]
            offset += size

    def _kind(self, entry: int, at: int) -> tuple[_Kind, int]:
        if entry & _COMPRESSED:
            return _Kind.COMPRESSED, entry & _COMPRESSED - 1
        if entry & _ZERO:
            return _Kind.ZERO, 0
        place = entry & _OFFSET
        if not place:
            return _Kind.BACKING, 0
        if place % self._cluster:
            raise OSError(errno.EIO, f"{self._path} is damaged: a cluster at {place:#x}")
        return _Kind.DATA, place + (at & self._cluster - 1)

    def _read(self, kind: _Kind, place: int, at: int, views: list[memoryview]) -> None:
        if kind is _Kind.DATA:
            read_all(self._fd, place, views)
        elif kind is _Kind.COMPRESSED:
            inside = at & self._cluster - 1
            data = memoryview(self._decompress(place))[inside:]
            for view in views:
                view[:] = data[: len(view)]
                data = data[len(view) :]
        elif kind is _Kind.BACKING and self.backing is not None:
            held = max(min(self.backing.size - at, sum(map(len, views))), 0)
            inside_views, beyond = split(views, held)
            if held:
                self.backing.readv(at, inside_views)
            clear(beyond)
        else:
            clear(views)

    def _decompress(self, descriptor: int) -> bytes:
        at, size = self._compressed(descriptor)
        try:
            data = zlib.decompressobj(-15).decompress(os.pread(self._fd, size, at), self._cluster)
        except zlib.error as error:
            raise OSError(errno.EIO, f"{self._path} is damaged: {error}") from error
        if len(data) != self._cluster:
            raise OSError(errno.EIO, f"{self._path} is damaged: a compressed cluster is too short")
        return data

    def _compressed(self, descriptor: int) -> tuple[int, int]:
        """Offset and bytes of a compressed cluster, which begins anywhere and ends with a sector."""
        shift = 62 - (self._bits - 8)
        at = descriptor & (1 << shift) - 1
        return at, ((descriptor >> shift) + 1) * SECTOR - at % SECTOR

    # Writing: all under the lock.

    def _in_place(self, offset: int, end: int) -> tuple[int, int]:
        """Where in the file a write at ``offset`` may go at once, and how many bytes of it; (0, 0) where it may not."""
        start = length = 0
        for at, size, entry in self._entries(offset, end):
            if not _writable(entry):
                break
            place = (entry & _OFFSET) + (at & self._cluster - 1)
            if start and place != start + length:
                break
            start = start or place
            length += size
        return start, length

    def _allocating(self, offset: int, end: int) -> int:
        """How many bytes from ``offset`` on need clusters first: as many as can be had at once."""
        length = 0
        for _, size, entry in self._entries(offset, end):
            if length and (_writable(entry) or _reusable(entry)):
                break
            length += size
            if _reusable(entry):
                break
        return length

    def _write_new(self, offset: int, views: list[memoryview], length: int) -> None:
        first = offset >> self._bits
        count = (offset + length - 1 >> self._bits) - first + 1
        before = self._lookup(first)
        place = before & _OFFSET if _reusable(before) else self._allocate(count)
        start, end = first << self._bits, (first + count) << self._bits
        # The parts of the first and the last cluster that are not written keep what they show now.
        head = self._content(start, offset)
        tail = self._content(offset + length, end)
        done = 0
        try:
            write_all(self._fd, place, [head, *views, tail])
            while done < count:
                self._point(first + done, place + (done << self._bits) | _COPIED)
                done += 1
        except OSError:
            if not _reusable(before):
                free = range((place >> self._bits) + done, (place >> self._bits) + count)
                self._give_back(free)
                if free and self._next == free.stop:
                    self._next = free.start
            raise

    def _content(self, start: int, end: int) -> memoryview:
        """What the disk shows there, without taking the lock again. Zeroes from the disk's end on."""
        data = memoryview(bytearray(end - start))
        for at, size, entry in self._entries(start, min(end, self.size)):
            kind, place = self._kind(entry, at)
            self._read(kind, place, at, [data[at - start : at - start + size]])
        return data

    def _zero_clusters(self, first: int, last: int, unmap: bool) -> None:
        with self._lock:
            for number in range(first >> self._bits, last + self._cluster - 1 >> self._bits):
                entry = self._lookup(number)
                if self._kind(entry, 0)[0] is _Kind.ZERO or (not entry and self.backing is None):
                    continue
                if entry & _COMPRESSED or not entry & _COPIED:
                    self._point(number, _ZERO)
                    continue
                self._point(number, entry | _ZERO)
                if unmap:
                    punch(self._fd, entry & _OFFSET, self._cluster)

    def _lookup(self, number: int) -> int:
        table = self._table(number // self._per_table)
        return 0 if table is None else int(table.entries[number % self._per_table])

    def _point(self, number: int, entry: int) -> None:
        """Cluster ``number`` of the disk is ``entry`` from now on."""
        table = self._table(number // self._per_table) or self._new_table(number // self._per_table)
        old = table.entries[number % self._per_table]
        table.entries[number % self._per_table] = entry
        table.dirty = True
        if old & _COMPRESSED:
            at, size = self._compressed(old & _COMPRESSED - 1)
            self._unused += range(at >> self._bits, (at + size - 1 >> self._bits) + 1)

    # Tables and reference counts.

    def _table(self, index: int) -> _Table | None:
        table = self._tables.get(index)
        if table is None:
            place = self._l1[index] & _OFFSET
            if not place:
                return None
            if place % self._cluster:
                raise OSError(errno.EIO, f"{self._path} is damaged: a table at {place:#x}")
            table = _Table(place, self._read_table(place, self._per_table))
            if len(self._tables) >= _KEPT and not self._flushing.locked():  # which is at work on some of them
                clean = next((key for key, kept in self._tables.items() if not kept.dirty), None)
                if clean is not None:
                    del self._tables[clean]
            self._tables[index] = table
        return table

    def _new_table(self, index: int) -> _Table:
        table = _Table(self._allocate(1), array("Q", bytes(self._cluster)), dirty=True)
        self._tables[index] = table
        self._l1[index] = table.offset | _COPIED
        self._dirty_l1.add(index)
        return table

    def _is_no_place(self, offset: int) -> bool:
        """Of a cluster, in a file of the greatest size that an entry of a table can name."""
        return offset % self._cluster != 0 or offset > _OFFSET

    def _read_table(self, offset: int, entries: int) -> array[int]:
        data = os.pread(self._fd, 8 * entries, offset)
        table = array("Q", data.ljust(8 * entries, b"\0"))
        if sys.byteorder == "little":
            table.byteswap()
        return table

    def _allocate(self, count: int) -> int:
        """``count`` clusters in a row at the end of the file, counted: the offset of the first."""
        block = self._next // self._per_block
        while block <= (self._next + count - 1) // self._per_block:
            if block >= len(self._refcounts):
                raise OSError(errno.ENOSPC, f"{self._path}: its table of reference counts is full")
            if not self._refcounts[block]:
                self._new_block(block)
            block += 1
        first, left = self._next, count
        while left:
            at = first + count - left
            here = min(left, self._per_block - at % self._per_block)
            self._put(self._count_at(at), b"\0\1" * here)
            left -= here
        self._next = first + count
        return first << self._bits

    def _give_back(self, clusters: Iterable[int]) -> None:
        """Nothing refers to them; where the file system lets us say so no more, they are lost room and no harm."""
        with contextlib.suppress(OSError):
            for cluster in clusters:
                self._count(cluster, -1)

    def _put(self, offset: int, data: bytes | bytearray) -> None:
        """All of ``data`` into the file; of what is not whole a full disk would say nothing."""
        write_all(self._fd, offset, [memoryview(data)])

    def _new_block(self, block: int) -> None:
        """A block of reference counts, in the next free cluster; it counts itself, or an earlier block does."""
        cluster = self._next
        counts = bytearray(self._cluster)
        inside = cluster // self._per_block == block
        if inside:
            struct.pack_into(">H", counts, 2 * (cluster % self._per_block), 1)
        else:
            self._put(self._count_at(cluster), b"\0\1")
        self._put(cluster << self._bits, counts)
        self._put(self._refcounts_at + 8 * block, struct.pack(">Q", cluster << self._bits))
        self._refcounts[block] = cluster << self._bits
        self._next = cluster + 1

    def _count_at(self, cluster: int) -> int:
        """Where in the file the reference count of ``cluster`` is."""
        return (self._refcounts[cluster // self._per_block] & _OFFSET) + 2 * (cluster % self._per_block)

    def _count(self, cluster: int, change: int) -> None:
        if cluster // self._per_block >= len(self._refcounts):
            raise OSError(errno.EIO, f"{self._path} is damaged: it has no cluster {cluster:#x}")
        at = self._count_at(cluster)
        count = int.from_bytes(os.pread(self._fd, 2, at), "big") + change
        if not 0 <= count <= 0xFFFF:
            raise OSError(errno.EIO, f"{self._path} is damaged: the count of its cluster {cluster:#x}")
        self._put(at, struct.pack(">H", count))

    def _first_free(self) -> int:
        """The first cluster after the file's end and after the last that is counted."""
        end = -(-os.lseek(self._fd, 0, os.SEEK_END) // self._cluster)
        for block in range(len(self._refcounts) - 1, -1, -1):
            place = self._refcounts[block] & _OFFSET
            if not place:
                continue
            counts = os.pread(self._fd, self._cluster, place)
            used = len(counts.rstrip(b"\0"))
            if used:
                return max(end, block * self._per_block + -(-used // 2))
        return end

    def _open_backing(self, head: bytes, at: int, name_at: int, name_size: int, depth: int) -> Disk | None:
        if not name_at:
            return None
        if name_size > _NAME_MAX or name_at + name_size > len(head):
            raise ImageError(f"{self._path} is damaged: the name of its backing file")
        name = os.fsdecode(head[name_at : name_at + name_size])
        kind = ""
        while at + _EXTENSION.size <= name_at:
            number, length = _EXTENSION.unpack_from(head, at)
            if not number:
                break
            if number == _BACKING_FORMAT:
                kind = head[at + 8 : at + 8 + length].decode("ascii", "replace")
            at += 8 + -(-length // 8) * 8
        if kind not in FORMATS:
            raise ImageError(
                f"{self._path} does not say its backing file's format; use qemu-img rebase -u -b FILE -F raw"
            )
        return open_disk(self._path.parent / name, kind, read_only=True, depth=depth + 1)


def _writable(entry: int) -> bool:
    """Whether the cluster can be written where it is."""
    return bool(entry & _COPIED and entry & _OFFSET) and not entry & (_COMPRESSED | _ZERO)


def _reusable(entry: int) -> bool:
    """Whether the cluster reads as zeroes but has a place of its own."""
    return bool(entry & _COPIED and entry & _OFFSET and entry & _ZERO) and not entry & _COMPRESSED


def _big_endian(entries: array[int]) -> bytes:
    if sys.byteorder == "big":
        return entries.tobytes()
    swapped = array("Q", entries)
    swapped.byteswap()
    return swapped.tobytes()
