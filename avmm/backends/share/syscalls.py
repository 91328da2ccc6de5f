"""Linux system calls that Python's os module does not have. They raise OSError as those of the os module do."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys
from collections.abc import Iterator
from typing import Any, Final

#: The same on x86-64 and arm64, as all system calls since Linux 5.1 are.
_OPENAT2: Final = 437
_RENAMEAT2: Final = {"x86_64": 316, "aarch64": 276}.get(platform.machine(), -1)
_GETDENTS64: Final = {"x86_64": 217, "aarch64": 61}.get(platform.machine(), -1)

# openat2(2): stay below the folder, touch no disk.
_RESOLVE_BENEATH: Final = 0x08
_RESOLVE_CACHED: Final = 0x20
_OPEN_HOW: Final = struct.Struct("<QQQ")  # flags, mode, resolve

O_PATH: Final = getattr(os, "O_PATH", 0)

RENAME_NOREPLACE: Final = 1
RENAME_EXCHANGE: Final = 2

UTIME_NOW: Final = (1 << 30) - 1
UTIME_OMIT: Final = (1 << 30) - 2

#: One entry of a directory: inode, the offset of the one after it, its type (DT_*), its name.
_DIRENT: Final = struct.Struct("<QqHB")

_libc: Final = ctypes.CDLL(None, use_errno=True)


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def open_cached(directory: int, name: str) -> int:
    """An O_PATH descriptor for ``name`` in ``directory``, if that takes no look at the disk: else BlockingIOError."""
    how = _OPEN_HOW.pack(O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, 0, _RESOLVE_BENEATH | _RESOLVE_CACHED)
    fd: int = _libc.syscall(_OPENAT2, directory, os.fsencode(name), how, len(how))
    if fd >= 0:
        return fd
    number = ctypes.get_errno()
    # Before Linux 5.6 there is no such call, before 5.12 no such flag, and some sandboxes forbid it.
    if number in (errno.ENOSYS, errno.EINVAL, errno.EPERM):
        number = errno.EAGAIN
    raise OSError(number, os.strerror(number))


def rename(source: int, name: str, target: int, new_name: str, flags: int) -> None:
    """renameat2(2)."""
    _check(_libc.syscall(_RENAMEAT2, source, os.fsencode(name), target, os.fsencode(new_name), flags))


def set_times(path: str, atime: tuple[int, int], mtime: tuple[int, int]) -> None:
    """utimensat(2): (seconds, nanoseconds), where nanoseconds may be UTIME_NOW or UTIME_OMIT."""
    times = (_Timespec * 2)(_Timespec(*atime), _Timespec(*mtime))
    _check(_libc.utimensat(-100, os.fsencode(path), times, 0))


def allocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2)."""
    _check(_libc.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)))


def sync_file_system(fd: int) -> None:
    """syncfs(2)."""
    _check(_libc.syncfs(fd))


def read_directory(fd: int, offset: int, size: int) -> Iterator[tuple[int, int, int, str]]:
    """Entries from ``offset`` on, as many as ``size`` bytes of getdents64(2) hold: inode, next offset, type, name."""
    os.lseek(fd, offset, os.SEEK_SET)
    buffer: Any = ctypes.create_string_buffer(size)
    end = _check(_libc.syscall(_GETDENTS64, fd, buffer, size))
    data = memoryview(buffer)
    at = 0
    while at < end:
        inode, following, length, kind = _DIRENT.unpack_from(data, at)
        name = bytes(data[at + _DIRENT.size : at + length])
        yield inode, following, kind, os.fsdecode(name[: name.index(b"\0")])
        at += length


def is_supported() -> bool:
    """Whether this host can share folders: it is Linux, of an architecture with known numbers, with /proc."""
    return sys.platform == "linux" and _RENAMEAT2 > 0 and os.path.isdir("/proc/self/fd")
