"""A disk of a VM: blocking :class:`Disk` calls made awaitable in a bounded thread pool, and faults on request.

::

    vm.drives[0].fail(sector=2048, count=8, error="io", op="read")     # until .heal()
    vm.drives[0].delay(0.2, op="flush")
    vm.drives[0].tear(sector=100, seed=1)                              # the next write there is cut off in the middle
    vm.drives[0].hold_writes(); ...; vm.drives[0].power_cut(seed=7)    # what was not flushed is lost, in part or whole
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from avmm.backends.disk import SECTOR, Disk, RawDisk, open_disk
from avmm.backends.moment import Moment, SharedDisk
from avmm.backends.partial import PartialDisk, Span, held
from avmm.backends.qcow2 import Qcow2
from avmm.backends.threads import Brief, Threads, is_slow
from avmm.errors import ConfigError, ImageError
from avmm.memory import split

Op = Literal["read", "write", "flush", "discard", "any"]
_PIECE: Final = 1 << 20
_ERRORS: Final = {"io": errno.EIO, "nospace": errno.ENOSPC}


@dataclass(slots=True)
class _Fault:
    """What happens to requests of one kind that touch a range of sectors, ``times`` times (None: always)."""

    op: Op
    first: int
    last: int  # the one after
    times: int | None
    error: int = 0
    delay: float = 0.0
    keep: int = -1  # bytes of a torn write that arrive


class Drive:
    """``disk`` for one device. Made on the event loop; ``name`` is what messages call it, ``slow``: its file system may
    have to wait for a network."""

    def __init__(self, disk: Disk, name: str, *, slow: bool = False) -> None:
        self.name = name
        self.size = disk.size
        self.read_only = disk.read_only
        self._disk: Disk = disk
        self._pool = Threads(f"avmm-{name}")
        self._slow = slow
        self._brief = Brief()
        self._faults: list[_Fault] = []
        self._dead = False
        #: Bytes and requests since the start, by kind.
        self.counters = {"read_bytes": 0, "written_bytes": 0, "reads": 0, "writes": 0, "flushes": 0, "errors": 0}

    # What a block device needs (avmm.devices.virtio.blk.BlockBackend).

    def read_now(self, offset: int, views: list[memoryview]) -> bool:
        """Read at once if the host has it in memory and nothing is to go wrong; False where it must wait."""
        if self._faults or self._dead or not self._disk.read_now(offset, views):
            return False
        self._count("read", sum(map(len, views)))
        return True

    def write_now(self, offset: int, views: list[memoryview]) -> bool:
        """Store ``views``, which are small, at once: into the page cache, where there is no waiting as a rule, and not
        for a while when there was. False leaves it to :meth:`writev`, errors too. On the event loop."""
        if self._slow or self._faults or self._dead or not isinstance(self._disk, RawDisk) or not self._brief.allowed():
            return False
        disk = self._disk
        try:
            self._brief.run(lambda: disk.writev(offset, views))
        except OSError:
            return False
        self._count("write", sum(map(len, views)))
        return True

    async def readv(self, offset: int, views: list[memoryview]) -> None:
        """Fill ``views`` from ``offset``. Raises OSError, as all of these do."""
        await self._do("read", offset, sum(map(len, views)), lambda: self._disk.readv(offset, views))

    async def writev(self, offset: int, views: list[memoryview]) -> None:
        """Store ``views`` at ``offset``."""
        length = sum(map(len, views))
        torn = self._torn(offset, length) if self._faults else None
        if torn is None:
            await self._do("write", offset, length, lambda: self._disk.writev(offset, views))
            return
        kept = split(views, torn)[0]
        await self._do("write", offset, length, lambda: self._disk.writev(offset, kept))
        raise OSError(errno.EIO, "torn write")

    async def flush(self) -> None:
        """Make everything written so far survive a power cut."""
        await self._do("flush", 0, 0, lambda: self._disk.flush())

    async def discard(self, offset: int, length: int) -> None:
        """The range's content is of no interest any more."""
        await self._do("discard", offset, length, lambda: self._disk.discard(offset, length))

    async def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        """Zeroes into the range."""
        await self._do("write", offset, length, lambda: self._disk.write_zeroes(offset, length, unmap))

    def moment(self) -> DriveMoment:
        """The disk as it is now, for a twin of the machine; nothing may be in flight."""
        held: dict[int, bytes] = {}
        if isinstance(self._disk, HeldWrites):
            self._disk.disk = shared = _share(self._disk.disk)
            held = self._disk.held()
        else:
            self._disk = shared = _share(self._disk)
        return DriveMoment(shared.moment(), held)

    def contents(self, *, whole: bool) -> Iterator[tuple[int, int, bytes]]:
        """What it has beyond the file that it was made from, or ``whole``: beyond zeroes, for a snapshot.

        Spans in order, each cut to pieces: (offset, bytes left of the span, content). Blocks. Raises OSError.
        """
        for offset, length in held(self._disk, whole=whole):
            for at in range(0, length, _PIECE):
                data = bytearray(min(_PIECE, length - at))
                self._disk.readv(offset + at, [memoryview(data)])
                yield offset + at, length - at, bytes(data)

    def close(self) -> None:
        """Store and close. Blocks until the disk has done it; nothing may be in flight."""
        self._pool.close()
        self._disk.close()

    # Faults.

    def fail(
        self,
        *,
        sector: int = 0,
        count: int | None = None,
        error: Literal["io", "nospace"] = "io",
        op: Op = "any",
        times: int | None = None,
    ) -> None:
        """Requests of kind ``op`` that touch ``count`` sectors (None: all that follow) from ``sector`` on fail."""
        if error not in _ERRORS:
            raise ConfigError(f"no error {error!r}; choose one of {', '.join(_ERRORS)}")
        self._add(_Fault(op, *_sectors(sector, count, self.size), times, error=_ERRORS[error]))

    def delay(
        self, seconds: float, *, sector: int = 0, count: int | None = None, op: Op = "any", times: int | None = None
    ) -> None:
        """Requests take ``seconds`` longer."""
        self._add(_Fault(op, *_sectors(sector, count, self.size), times, delay=seconds))

    def tear(self, *, sector: int = 0, count: int | None = None, seed: int = 0) -> None:
        """The next write there fails, and only its first part arrives: how much is decided by ``seed``, in bytes of a
        sector, since that is how disks tear."""
        keep = random.Random(seed).randrange(1 << 30)
        self._add(_Fault("write", *_sectors(sector, count, self.size), 1, keep=keep))

    def heal(self) -> None:
        """No more faults. What a power cut lost stays lost."""
        self._faults.clear()
        self._dead = False

    def hold_writes(self) -> None:
        """From now on keep what the guest writes in memory until it flushes, as a disk's volatile cache does."""
        if not isinstance(self._disk, HeldWrites):
            self._disk = HeldWrites(self._disk)

    def power_cut(self, seed: int | None = None) -> None:
        """The disk loses power: requests fail from now on, and what :meth:`hold_writes` holds is lost.

        With ``seed`` some of the held sectors, chosen by it, arrive all the same, as they do on a real disk.
        """
        self._dead = True
        if isinstance(self._disk, HeldWrites):
            self._disk.lose(seed)

    # Inside.

    def _add(self, fault: _Fault) -> None:
        self._faults.append(fault)

    def _matching(self, op: str, offset: int, length: int, torn: bool = False) -> _Fault | None:
        first, last = offset // SECTOR, -(-(offset + length) // SECTOR)
        for fault in self._faults:
            touches = not length or (fault.first < last and first < fault.last)
            if touches and fault.op in (op, "any") and (fault.keep >= 0) is torn:
                if fault.times is not None:
                    fault.times -= 1
                    if not fault.times:
                        self._faults.remove(fault)
                return fault
        return None

    def _torn(self, offset: int, length: int) -> int | None:
        fault = self._matching("write", offset, length, torn=True)
        return None if fault is None else fault.keep % (length // SECTOR or 1) * SECTOR

    async def _do(self, op: Literal["read", "write", "flush", "discard"], offset: int, length: int,
                  work: Callable[[], None]) -> None:  # fmt: skip
        try:
            fault = self._matching(op, offset, length) if self._faults else None
            if fault is not None and fault.delay:
                await asyncio.sleep(fault.delay)
            if fault is not None and fault.error:
                raise OSError(fault.error, "a fault that was asked for")
            if self._dead:
                raise OSError(errno.EIO, "the disk has no power")
            await self._pool.run(work)
        except OSError:
            self.counters["errors"] += 1
            raise
        self._count(op, length)

    def _count(self, op: str, length: int) -> None:
        counters = self.counters
        if op == "read":
            counters["reads"] += 1
            counters["read_bytes"] += length
        elif op == "write":
            counters["writes"] += 1
            counters["written_bytes"] += length
        elif op == "flush":
            counters["flushes"] += 1


def open_drive(path: Path, kind: str | None, name: str, *, read_only: bool = False, snapshot: bool = False) -> Drive:
    """The disk in the file ``path``, see :func:`avmm.backends.disk.open_disk`. With ``snapshot`` the file is only read,
    and what is written goes to a temporary one. Raises ImageError."""
    disk = open_disk(path, kind, read_only=read_only or snapshot)
    return Drive(_overlay(disk, path) if snapshot else disk, name, slow=is_slow(path))


@dataclass(slots=True)
class StoredDrive:
    """A disk in a snapshot: ``spans`` of it lie in ``fd``, see PartialDisk; ``over``: the rest is what its file has."""

    fd: int
    at: int
    size: int
    spans: Sequence[Span]
    over: bool

    def open(self, path: Path, kind: str | None, name: str) -> Drive:
        """A drive that goes on from it; what is written goes to a temporary file. Blocks. Raises ImageError."""
        backing = open_disk(path, kind, read_only=True) if self.over else None
        fd, self.fd = self.fd, -1  # the disk's from now on
        return Drive(_overlay(PartialDisk(fd, self.at, self.size, self.spans, backing), path), name)

    def close(self) -> None:
        """It is not wanted after all."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


@dataclass(slots=True)
class DriveMoment:
    """What :meth:`Drive.moment` gives: the disk, and what it had not stored yet. To be opened or closed."""

    disk: Moment
    held: dict[int, bytes]

    def open(self, path: Path, name: str, *, read_only: bool) -> Drive:
        """A drive that goes on from it; what is written goes to a temporary file. Blocks. Raises ImageError."""
        if read_only:
            return Drive(self.disk, name)
        overlay = _overlay(self.disk, path)
        for sector, data in self.held.items():
            overlay.writev(sector * SECTOR, [memoryview(data)])
        return Drive(overlay, name)

    def close(self) -> None:
        """It is not wanted after all. Blocks."""
        self.disk.close()


def _share(disk: Disk) -> SharedDisk:
    return disk if isinstance(disk, SharedDisk) else SharedDisk(disk)


def _overlay(disk: Disk, path: Path) -> Disk:
    """A disk in a temporary file over ``disk``, which it closes. Raises ImageError, having closed ``disk``."""
    try:
        with tempfile.TemporaryFile(prefix="avmm-") as file:
            return Qcow2.create(os.dup(file.fileno()), path, disk.size, backing=disk)
    except OSError as error:
        disk.close()
        raise ImageError(f"no room for a snapshot of {path}: {error.strerror}; point TMPDIR elsewhere") from error


def _sectors(sector: int, count: int | None, size: int) -> tuple[int, int]:
    last = size // SECTOR if count is None else sector + count
    if not 0 <= sector < last:
        raise ConfigError(f"no sectors {sector}..{last}: the disk has {size // SECTOR}")
    return sector, last


class HeldWrites:
    """A disk in front of another that has a volatile write cache: sectors wait in memory for a flush."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.size = disk.size
        self.read_only = disk.read_only
        self._lock = threading.Lock()
        self._held: dict[int, bytes] = {}

    def readv(self, offset: int, views: list[memoryview]) -> None:
        """See :class:`Disk`."""
        with self._lock:
            self.disk.readv(offset, views)
            if self._held:
                self._overlay(offset, views)

    def read_now(self, offset: int, views: list[memoryview]) -> bool:
        """See :class:`Disk`."""
        return False

    def writev(self, offset: int, views: list[memoryview]) -> None:
        """See :class:`Disk`."""
        data = b"".join(views)
        with self._lock:
            for at in range(0, len(data), SECTOR):
                self._held[(offset + at) // SECTOR] = data[at : at + SECTOR]

    def flush(self) -> None:
        """See :class:`Disk`."""
        with self._lock:
            self._store(self._held)
            self._held = {}
            self.disk.flush()

    def discard(self, offset: int, length: int) -> None:
        """See :class:`Disk`: a hint, which is not taken, since it could not be taken back."""

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        """See :class:`Disk`."""
        for at in range(0, length, 1 << 20):
            self.writev(offset + at, [memoryview(bytes(min(length - at, 1 << 20)))])

    def held(self) -> dict[int, bytes]:
        """What waits, by sector."""
        with self._lock:
            return dict(self._held)

    def lose(self, seed: int | None) -> None:
        """Forget what is held; with ``seed``, store a part of it first."""
        with self._lock:
            if seed is not None:
                chance = random.Random(seed)
                self._store({sector: data for sector, data in self._held.items() if chance.random() < 0.5})
                self.disk.flush()
            self._held = {}

    def close(self) -> None:
        """See :class:`Disk`."""
        self.flush()
        self.disk.close()

    def _store(self, held: dict[int, bytes]) -> None:
        for sector, data in sorted(held.items()):
            self.disk.writev(sector * SECTOR, [memoryview(data)])

    def _overlay(self, offset: int, views: list[memoryview]) -> None:
        sector = offset // SECTOR
        while views:
            length = min(SECTOR, sum(map(len, views)))
            piece, views = split(views, length)
            data = memoryview(self._held.get(sector, b""))
            for view in piece if data else ():
                view[:] = data[: len(view)]
                data = data[len(view) :]
            sector += 1
