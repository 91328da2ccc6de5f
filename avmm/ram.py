"""Guest RAM on the host: mapped once at one address, and frozen there whenever somebody wants to share it.

A lone VM writes straight into an unnamed file (memfd). At a fork or a snapshot the file is *frozen*: nobody writes to
it any more, and whoever has it maps it privately, the parent in place, at the same address. From then on the kernel
copies a page when it is written, and nothing else is ever copied::

    lone      RAM ──shared──► file
    frozen    RAM ──private─► file ◄─private── twin's RAM          pages written since: anonymous, each VM's own

Frozen again, a VM that is the file's last user writes its own pages back into it; while there are others, its pages
go to the twin as copies. Which they are the kernel knows (PAGEMAP_SCAN of ioctl(2), else /proc/self/pagemap).

macOS has no memfd, and its hypervisor one VM to a process: RAM there is anonymous, cannot be frozen, and a snapshot
is written while the VM is paused.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import struct
import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from avmm.errors import HostError

#: Linux's, which the mmap module of Python 3.11 does not name; macOS reserves nothing anyway.
_MAP_NORESERVE: Final = 0x4000 if sys.platform == "linux" else 0
_MAP_FIXED: Final = 0x10

_PAGE: Final = mmap.PAGESIZE

# PAGEMAP_SCAN (Linux 6.7): pages that are there, in memory or swapped out, and are no file's (linux/fs.h).
_PAGEMAP_SCAN: Final = 0xC060_6610
_SCAN: Final = struct.Struct("=12Q")
_IS_FILE, _IS_PRESENT, _IS_SWAPPED = 1 << 2, 1 << 3, 1 << 4
_RANGE: Final = struct.Struct("=3Q")
_RANGES: Final = 4096
# The same in an entry of /proc/self/pagemap (Documentation/admin-guide/mm/pagemap.rst).
_ENTRY_THERE: Final = 1 << 63 | 1 << 62
_ENTRY_FILE: Final = 1 << 61

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64
]  # fmt: skip

#: A huge page of x86-64, and of arm64 with 4 KiB pages; what asks for one the mmap module does not name.
_HUGE: Final = 2 << 20
_MADV_COLLAPSE: Final = 25

#: Whether RAM can be frozen here.
CAN_FREEZE: Final = hasattr(os, "memfd_create")

#: (offset, length) in bytes.
Span = tuple[int, int]


class RamFile:
    """A file that RAM is mapped from: ``size`` bytes at ``offset`` of ``fd``, which is closed with its last user.

    ``writable``: its last user may write back into it. One that was opened from a snapshot is not.
    """

    def __init__(self, fd: int, size: int, offset: int = 0, *, writable: bool) -> None:
        self.fd = fd
        self.size = size
        self.offset = offset
        self.writable = writable
        self.users = 1

    def share(self) -> RamFile:
        """One user more."""
        self.users += 1
        return self

    def release(self) -> None:
        """One user less."""
        self.users -= 1
        if not self.users:
            os.close(self.fd)

    def written(self) -> Iterator[Span]:
        """Where it may have something else than zeroes."""
        at, end = self.offset, self.offset + self.size
        while at < end:
            try:
                start = os.lseek(self.fd, at, os.SEEK_DATA)
            except OSError:  # ENXIO: nothing from here on
                return
            at = os.lseek(self.fd, start, os.SEEK_HOLE)
            if start < end:
                yield start - self.offset, min(at, end) - start


@dataclass(slots=True)
class FrozenRam:
    """RAM as it was when it was frozen: a file, and on top of it pages that are not in it. Close it when done."""

    file: RamFile
    pages: Sequence[tuple[int, bytes]]  # offset, content; in order

    @property
    def size(self) -> int:
        """Bytes."""
        return self.file.size

    def spans(self) -> Iterator[tuple[int, bytes | None, int]]:
        """What may be other than zeroes, in order: (offset, content or None where the file has it, length)."""
        pages = iter(self.pages)
        page = next(pages, None)
        done = 0  # a run of pages may cover holes of the file and what follows them
        for begin, length in self.file.written():
            start, end = max(begin, done), begin + length
            while page is not None and page[0] < end:
                at, data = page
                if start < at:
                    yield start, None, at - start
                yield at, data, len(data)
                start = done = at + len(data)
                page = next(pages, None)
            if start < end:
                yield start, None, end - start
        while page is not None:
            yield page[0], page[1], len(page[1])
            page = next(pages, None)

    def read(self, offset: int, length: int) -> bytes:
        """What the file has."""
        return os.pread(self.file.fd, length, self.file.offset + offset)

    def close(self) -> None:
        """Let go of the file."""
        self.file.release()


class LiveRam:
    """RAM that cannot be frozen, read while nobody writes to it. Like FrozenRam, but not to be mapped."""

    def __init__(self, buffer: mmap.mmap) -> None:
        self.size = len(buffer)
        self._buffer = buffer

    def spans(self) -> Iterator[tuple[int, bytes | None, int]]:
        """See FrozenRam: all of it."""
        yield 0, None, self.size

    def read(self, offset: int, length: int) -> bytes:
        """See FrozenRam."""
        return self._buffer[offset : offset + length]

    def close(self) -> None:
        """See FrozenRam."""


class Ram:
    """``size`` bytes of guest RAM in ``buffer``: zeroes, or what ``image`` has. Raises HostError."""

    def __init__(self, size: int, image: FrozenRam | None = None) -> None:
        self.buffer = _reserve(size)
        self._at = _address(self.buffer)
        self._file: RamFile | None = None
        self._private = image is not None
        try:
            if image is not None:
                self._file = image.file.share()
                self._map(mmap.MAP_PRIVATE)
                for offset, data in image.pages:
                    self.buffer[offset : offset + len(data)] = data
            elif CAN_FREEZE:
                fd = os.memfd_create("avmm-ram", os.MFD_CLOEXEC)
                self._file = RamFile(fd, size, writable=True)
                os.truncate(fd, size)
                self._map(mmap.MAP_SHARED)
        except BaseException:
            self.close()
            raise

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.buffer)

    def prepare(self, length: int) -> None:
        """Its first ``length`` bytes are about to be written: take memory for them, in the host's huge pages if it has
        some (MADV_COLLAPSE of madvise(2), Linux 6.1). Page by page it would take three times as long."""
        if self._file is None or self._private:
            return
        with contextlib.suppress(OSError):  # an older kernel, or it has none; then it is page by page
            for at in range(-self._at % _HUGE, length - _HUGE + 1, _HUGE):
                self.buffer[at] = self.buffer[at]  # only what is there collapses
                self.buffer.madvise(_MADV_COLLAPSE, at, _HUGE)

    def freeze(self) -> FrozenRam:
        """RAM as it is now, which nobody may be writing to meanwhile. Raises HostError where that cannot be had."""
        file = self._file
        if file is None:
            raise HostError("memory cannot be shared between VMs on this system")
        pages: list[tuple[int, bytes]] = []
        if not self._private:
            self._private = True
            self._map(mmap.MAP_PRIVATE)
        elif file.users == 1 and file.writable:
            for offset, length in self._own_spans():
                self._write_back(file.fd, offset, length)
                self.buffer.madvise(mmap.MADV_DONTNEED, offset, length)
        else:
            pages = [(offset, self.buffer[offset : offset + length]) for offset, length in self._own_spans()]
        return FrozenRam(file.share(), pages)

    def discard(self, offset: int, length: int) -> None:
        """The guest does not need what is there (whole pages): give its memory back. It may read as anything after."""
        if self._file is not None and not self._private:
            self.buffer.madvise(mmap.MADV_REMOVE, offset, length)
        else:
            self.buffer.madvise(mmap.MADV_DONTNEED if sys.platform == "linux" else mmap.MADV_FREE, offset, length)

    def close(self) -> None:
        """Unmap; where somebody still holds a view, when the last one goes."""
        if self._file is not None:
            self._file.release()
            self._file = None
        with contextlib.suppress(BufferError):
            self.buffer.close()

    def own_bytes(self) -> int:
        """How much of it is this VM's alone: what it has written since it was frozen or made from an image."""
        return sum(length for _, length in self._own_spans()) if self._private else self.size

    def _map(self, sharing: int) -> None:
        file = self._file
        assert file is not None
        flags = sharing | _MAP_FIXED | _MAP_NORESERVE
        at = _libc.mmap(self._at, self.size, mmap.PROT_READ | mmap.PROT_WRITE, flags, file.fd, file.offset)
        if at != self._at:
            raise HostError(f"cannot map the guest's memory: {os.strerror(ctypes.get_errno())}")

    def _write_back(self, fd: int, offset: int, length: int) -> None:
        with memoryview(self.buffer)[offset : offset + length] as view:
            done = 0
            while done < length:
                done += os.pwrite(fd, view[done:], offset + done)

    def _own_spans(self) -> list[Span]:
        """Pages of this VM alone, in runs."""
        try:
            return _scan(self._at, self.size)
        except OSError:  # an older kernel
            return _scan_pagemap(self._at, self.size)


def _scan(start: int, size: int) -> list[Span]:
    """Anonymous pages in [start, start + size), as (offset, length). Raises OSError where the kernel cannot tell."""
    end = start + size
    ranges = (ctypes.c_char * (_RANGE.size * _RANGES))()
    found: list[Span] = []
    at = start
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        while at < end:
            argument = bytearray(
                _SCAN.pack(_SCAN.size, 0, at, end, 0, ctypes.addressof(ranges), _RANGES, 0,
                           _IS_FILE, _IS_FILE, _IS_PRESENT | _IS_SWAPPED, _IS_PRESENT)
            )  # fmt: skip
            count = fcntl.ioctl(fd, _PAGEMAP_SCAN, argument)
            at = _SCAN.unpack(argument)[4]
            for index in range(count):
                first, last, _ = _RANGE.unpack_from(ranges, index * _RANGE.size)
                _append(found, first - start, last - first)
    finally:
        os.close(fd)
    return found


def _scan_pagemap(start: int, size: int) -> list[Span]:
    """The same from /proc/self/pagemap. Raises HostError where there is none."""
    found: list[Span] = []
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            file.seek(start // _PAGE * 8)
            left = size // _PAGE
            offset = 0
            while left:
                data = file.read(min(left, 4096) * 8)
                count = len(data) // 8
                if data.count(0) < len(data):
                    for entry in array("Q", data):
                        if entry & _ENTRY_THERE and not entry & _ENTRY_FILE:
                            _append(found, offset, _PAGE)
                        offset += _PAGE
                else:
                    offset += count * _PAGE
                left -= count
    except OSError as error:
        raise HostError(f"cannot tell which pages were written: /proc/self/pagemap: {error.strerror}") from error
    return found


def _append(found: list[Span], offset: int, length: int) -> None:
    if found and sum(found[-1]) == offset:
        found[-1] = (found[-1][0], found[-1][1] + length)
    else:
        found.append((offset, length))


def _reserve(size: int) -> mmap.mmap:
    """Address space; pages that nobody touches cost nothing. Raises HostError."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    try:
        return mmap.mmap(-1, size, flags=flags)
    except OSError as error:
        raise HostError(f"the host has no {size >> 20} MiB for the guest ({error.strerror}): give it less") from error


def _address(buffer: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
