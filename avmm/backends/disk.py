"""Disks on the host: what a block device reads and writes. Blocking and safe to call from several threads at once.

:class:`Disk` is the interface, :class:`RawDisk` a file or block device as it is; :mod:`avmm.backends.qcow2` has the
other format. :func:`open_disk` picks.

    disk = open_disk(Path("root.img"), "raw")
    disk.readv(0, [memoryview(bytearray(4096))])
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Protocol

from avmm.errors import ImageError
from avmm.memory import split

SECTOR: Final = 512

QCOW2_MAGIC: Final = b"QFI\xfb"
FORMATS: Final = ("raw", "qcow2")

#: Files behind files, at most: a chain that is longer is most likely a circle.
BACKING_MAX: Final = 32

_PUNCH_HOLE: Final = 0x02 | 0x01  # and keep the size (linux/falloc.h)
_ZERO_RANGE: Final = 0x10 | 0x01
_ZEROES: Final = memoryview(bytes(1 << 20))
_NOWAIT: Final = getattr(os, "RWF_NOWAIT", 0)


class Disk(Protocol):
    """Bytes that stay. Offsets and lengths lie inside ``size``, which is a multiple of :data:`SECTOR`.

    Every method may raise OSError; nothing is then lost that :meth:`flush` had returned for.
    """

    size: int
    read_only: bool

    def readv(self, offset: int, views: list[memoryview]) -> None:
        """Fill ``views`` with what is at ``offset``."""
        ...

    def read_now(self, offset: int, views: list[memoryview]) -> bool:
        """The same if it takes no waiting for a device; False, and ``views`` of no meaning, where it would."""
        ...

    def writev(self, offset: int, views: list[memoryview]) -> None:
        """Store ``views`` at ``offset``."""
        ...

    def flush(self) -> None:
        """Return when everything written before would survive a power cut."""
        ...

    def discard(self, offset: int, length: int) -> None:
        """The content there is of no interest any more: give the room back where that is possible."""
        ...

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        """Make the range read as zeroes; its room may be given back when ``unmap``."""
        ...

    def close(self) -> None:
        """Store what is to be stored, and close."""
        ...


def open_disk(path: Path, kind: str | None = None, *, read_only: bool = False, depth: int = 0) -> Disk:
    """The disk in the file ``path``. ``kind``: ``raw``, ``qcow2``, or None: by its name. Raises ImageError.

    The content alone never decides: a guest that has a raw disk could write another format's header into it, and be
    given the host's files as backing files the next time.
    """
    from avmm.backends.qcow2 import Qcow2

    if kind is None:
        kind = "qcow2" if path.suffix == ".qcow2" else "raw"
        if kind == "raw" and looks_like_qcow2(path):
            raise ImageError(f"{path} has the header of a qcow2 image; say format=qcow2 or format=raw")
    if depth > BACKING_MAX:
        raise ImageError(f"{path}: more than {BACKING_MAX} backing files; do they refer to each other?")
    fd = open_file(path, read_only)
    try:
        return RawDisk(fd, read_only) if kind == "raw" else Qcow2(fd, path, read_only=read_only, depth=depth)
    except BaseException:
        os.close(fd)
        raise


def open_file(path: Path, read_only: bool) -> int:
    """A descriptor for ``path``, locked: one writer, or any number of readers. Raises ImageError."""
    try:
        fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
    except OSError as error:
        hint = ""
        if error.errno in (errno.EACCES, errno.EROFS) and not read_only:
            hint = "; open it with ro"
        elif error.errno == errno.ENOENT and path.parent.is_dir():
            hint = f"; `truncate -s 4G {path}` makes an empty one"
        raise ImageError(f"cannot open the disk {path}: {error.strerror}{hint}") from error
    try:
        if not (stat.S_ISREG(os.fstat(fd).st_mode) or stat.S_ISBLK(os.fstat(fd).st_mode)):
            raise ImageError(f"the disk {path} is neither a file nor a block device")
        fcntl.flock(fd, (fcntl.LOCK_SH if read_only else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise ImageError(f"the disk {path} is in use; share it with ro everywhere, or with snapshot") from None
    except BaseException:
        os.close(fd)
        raise
    return fd


def looks_like_qcow2(path: Path) -> bool:
    """Whether the file begins as a qcow2 image does. False where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(4) == QCOW2_MAGIC
    except OSError:
        return False


class RawDisk:
    """A file or block device ``fd`` (closed with this object), byte for byte. Holes stay holes."""

    def __init__(self, fd: int, read_only: bool) -> None:
        self._fd = fd
        self._end = os.lseek(fd, 0, os.SEEK_END)
        # What is missing of the last sector reads as zeroes, and is there once it is written.
        self.size = -(-self._end // SECTOR) * SECTOR
        self.read_only = read_only

    def readv(self, offset: int, views: list[memoryview]) -> None:
        """See :class:`Disk`."""
        read_all(self._fd, offset, views)

    def read_now(self, offset: int, views: list[memoryview]) -> bool:
        """See :class:`Disk`."""
        return read_cached(self._fd, offset, views)

    def writev(self, offset: int, views: list[memoryview]) -> None:
        """See :class:`Disk`."""
        write_all(self._fd, offset, views)

    def flush(self) -> None:
        """See :class:`Disk`."""
        sync(self._fd)

    def discard(self, offset: int, length: int) -> None:
        """See :class:`Disk`."""
        punch(self._fd, offset, length)

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        """See :class:`Disk`."""
        if not (_allocate(self._fd, _PUNCH_HOLE if unmap else _ZERO_RANGE, offset, length)):
            write_zeroes(self._fd, offset, length)

    def written(self) -> Iterator[tuple[int, int]]:
        """Where there may be something else than zeroes, as (offset, length)."""
        at = 0
        while at < self.size:
            try:
                start = os.lseek(self._fd, at, os.SEEK_DATA)
                at = os.lseek(self._fd, start, os.SEEK_HOLE)
            except OSError as error:
                if error.errno == errno.ENXIO:  # nothing from here on
                    return
                start, at = at, self.size  # a file or a device that cannot tell
            yield start, at - start

    def close(self) -> None:
        """See :class:`Disk`."""
        os.close(self._fd)


# Files: reads and writes that are whole, and what Python's os module does not have.


def read_all(fd: int, offset: int, views: list[memoryview]) -> None:
    """Fill ``views`` from ``offset`` on, with zeroes from the end of the file on."""
    wanted = sum(map(len, views))
    while wanted:
        got = os.preadv(fd, views, offset)
        if got == wanted:
            return
        views = split(views, got)[1]
        if not got:
            clear(views)
            return
        wanted -= got
        offset += got


def read_cached(fd: int, offset: int, views: list[memoryview]) -> bool:
    """Fill ``views`` from the page cache; False where not all is there."""
    if not _NOWAIT:
        return False
    try:
        return os.preadv(fd, views, offset, _NOWAIT) == sum(map(len, views))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EOPNOTSUPP):
            return False
        raise


def write_all(fd: int, offset: int, views: Sequence[memoryview]) -> None:
    """Store all of ``views`` at ``offset``."""
    rest = list(views)
    wanted = sum(map(len, rest))
    while wanted:
        done = os.pwritev(fd, rest, offset)
        if done == wanted:
            return
        rest = split(rest, done)[1]
        wanted -= done
        offset += done


def clear(views: list[memoryview]) -> None:
    """Zeroes into all of ``views``."""
    for view in views:
        for at in range(0, len(view), len(_ZEROES)):
            piece = view[at : at + len(_ZEROES)]
            piece[:] = _ZEROES[: len(piece)]


def write_zeroes(fd: int, offset: int, length: int) -> None:
    """Zeroes, the slow way."""
    while length:
        piece = _ZEROES[: min(length, len(_ZEROES))]
        write_all(fd, offset, [piece])
        offset += len(piece)
        length -= len(piece)


def punch(fd: int, offset: int, length: int) -> bool:
    """Make a hole, which reads as zeroes; False where the file system has none."""
    return _allocate(fd, _PUNCH_HOLE, offset, length)


def sync(fd: int) -> None:
    """Everything written to ``fd`` onto the medium."""
    if sys.platform == "darwin":
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)  # fsync there ends in the drive's own cache
    else:
        os.fdatasync(fd)


def _allocate(fd: int, mode: int, offset: int, length: int) -> bool:
    if sys.platform != "linux":
        return False
    while _libc.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)):
        number = ctypes.get_errno()
        if number == errno.EINTR:
            continue
        if number in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV):
            return False
        raise OSError(number, os.strerror(number))
    return True


_libc: Final = ctypes.CDLL(None, use_errno=True)
