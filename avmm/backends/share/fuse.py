"""The FUSE protocol, 7.31 and later (``linux/fuse.h``): requests taken apart, answers put together. No I/O.

What comes in was written by a guest: :func:`parse` believes no length, and every number is checked by whom it concerns.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

MAJOR: Final = 7
MINOR: Final = 38  # the newest we know
MINOR_MIN: Final = 31  # what virtio-fs began with

ROOT_ID: Final = 1
NAME_MAX: Final = 255

#: Bytes of a request that are not file content, at most: an extended attribute's value is the largest.
REQUEST_MAX: Final = (64 << 10) + 4096

IN_HEADER: Final = struct.Struct("<IIQQIIIHH")  # len, opcode, unique, nodeid, uid, gid, pid, extensions, padding
OUT_HEADER: Final = struct.Struct("<IiQ")  # len, error, unique


class Op(IntEnum):
    """``enum fuse_opcode``."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SYNCFS = 50


#: Requests that are not answered.
SILENT: Final = frozenset({Op.FORGET, Op.BATCH_FORGET})

# What INIT negotiates.
ASYNC_READ: Final = 1 << 0
ATOMIC_O_TRUNC: Final = 1 << 3
BIG_WRITES: Final = 1 << 5
AUTO_INVAL_DATA: Final = 1 << 12
DO_READDIRPLUS: Final = 1 << 13
READDIRPLUS_AUTO: Final = 1 << 14
ASYNC_DIO: Final = 1 << 15
PARALLEL_DIROPS: Final = 1 << 18
MAX_PAGES: Final = 1 << 22
HANDLE_KILLPRIV_V2: Final = 1 << 28

FOPEN_KEEP_CACHE: Final = 1 << 1

# fuse_setattr_in.valid
FATTR_MODE, FATTR_UID, FATTR_GID, FATTR_SIZE = 1 << 0, 1 << 1, 1 << 2, 1 << 3
FATTR_ATIME, FATTR_MTIME, FATTR_FH = 1 << 4, 1 << 5, 1 << 6
FATTR_ATIME_NOW, FATTR_MTIME_NOW, FATTR_KILL_SUIDGID = 1 << 7, 1 << 8, 1 << 11

GETATTR_FH: Final = 1
WRITE_KILL_SUIDGID: Final = 1 << 2
OPEN_KILL_SUIDGID: Final = 1
FSYNC_FDATASYNC: Final = 1

# What follows the header of a request.
INIT_IN: Final = struct.Struct("<IIII")  # major, minor, max_readahead, flags; newer kernels send more
FORGET_IN: Final = struct.Struct("<Q")  # nlookup
BATCH_FORGET_IN: Final = struct.Struct("<I4x")  # count, of:
FORGET_ONE: Final = struct.Struct("<QQ")  # nodeid, nlookup
GETATTR_IN: Final = struct.Struct("<I4xQ")  # flags, fh
# valid, fh, size, lock owner, atime, mtime, ctime, their nanoseconds, mode, uid, gid
SETATTR_IN: Final = struct.Struct("<I4xQQQqqqIIII4xII4x")
MKNOD_IN: Final = struct.Struct("<IIII")  # mode, rdev, umask, padding
MKDIR_IN: Final = struct.Struct("<II")  # mode, umask
RENAME_IN: Final = struct.Struct("<Q")  # new directory
RENAME2_IN: Final = struct.Struct("<QI4x")  # new directory, flags
LINK_IN: Final = struct.Struct("<Q")  # the file's nodeid
OPEN_IN: Final = struct.Struct("<II")  # flags, FUSE_OPEN_*
CREATE_IN: Final = struct.Struct("<IIII")  # flags, mode, umask, FUSE_OPEN_*
RELEASE_IN: Final = struct.Struct("<QIIQ")  # fh, flags, release flags, lock owner
READ_IN: Final = struct.Struct("<QQIIQI4x")  # fh, offset, size, read flags, lock owner, flags
WRITE_IN: Final = READ_IN  # the same, with write flags
FSYNC_IN: Final = struct.Struct("<QI4x")  # fh, flags
SETXATTR_IN: Final = struct.Struct("<II")  # size, flags: without SETXATTR_EXT
GETXATTR_IN: Final = struct.Struct("<I4x")  # size
ACCESS_IN: Final = struct.Struct("<I4x")  # mask
FALLOCATE_IN: Final = struct.Struct("<QQQI4x")  # fh, offset, length, mode
LSEEK_IN: Final = struct.Struct("<QQI4x")  # fh, offset, whence
COPY_IN: Final = struct.Struct("<7Q")  # fh, offset, nodeid of the target, its fh, offset, length, flags

# Answers.
# major, minor, max_readahead, flags, max_background, congestion threshold, max_write, time granularity, max_pages,
# map alignment, flags2
INIT_OUT: Final = struct.Struct("<IIIIHHIIHHI28x")
# ino, size, blocks, atime, mtime, ctime, their nanoseconds, mode, nlink, uid, gid, rdev, blksize, flags
_ATTR: Final = struct.Struct("<QQQqqqIIIIIIIIII")
_ATTR_OUT: Final = struct.Struct("<QI4x")  # seconds and nanoseconds that the attributes are good for
_ENTRY_OUT: Final = struct.Struct("<QQQQII")  # nodeid, generation, name good for, attributes good for, nanoseconds
OPEN_OUT: Final = struct.Struct("<QI4x")  # fh, FOPEN_*
WRITE_OUT: Final = struct.Struct("<I4x")  # bytes
# blocks, free, available, files, free, block size, longest name, fragment size
STATFS_OUT: Final = struct.Struct("<QQQQQIII4x24x")
GETXATTR_OUT: Final = struct.Struct("<I4x")  # size
LSEEK_OUT: Final = struct.Struct("<Q")
DIRENT: Final = struct.Struct("<QQII")  # ino, offset of the next, length of the name, type; the name follows
ENTRY_SIZE: Final = _ENTRY_OUT.size + _ATTR.size


@dataclass(slots=True)
class Request:
    """The header of a request and, in ``body``, what follows it, without file content. ``op`` may be none of Op's."""

    op: int
    unique: int
    nodeid: int
    uid: int
    gid: int
    body: bytes


def parse(data: bytes, length: int) -> Request:
    """A request whose first bytes are ``data``; ``length`` bytes came in all, which the header must say too.

    Raises ValueError when there is no whole header, or its length is another.
    """
    if len(data) < IN_HEADER.size:
        raise ValueError("a FUSE request without a whole header")
    size, op, unique, nodeid, uid, gid, _pid, _extensions, _padding = IN_HEADER.unpack_from(data)
    if size != length:
        raise ValueError(f"a FUSE request of {length} bytes says that it has {size}")
    return Request(op, unique, nodeid, uid, gid, data[IN_HEADER.size :])


def name_in(body: bytes, at: int = 0) -> str:
    """The NUL-terminated string at ``at``. Raises OSError (EINVAL) where there is none."""
    end = body.find(b"\0", at)
    if end < 0:
        raise OSError(errno.EINVAL, "a name without an end")
    return os.fsdecode(body[at:end])


def names_in(body: bytes, at: int = 0) -> tuple[str, str]:
    """Two such strings, one after the other."""
    end = body.find(b"\0", at)
    return name_in(body, at), name_in(body, end + 1)


def answer(unique: int, payload: bytes = b"") -> bytes:
    """A whole answer."""
    return OUT_HEADER.pack(OUT_HEADER.size + len(payload), 0, unique) + payload


def failure(unique: int, number: int) -> bytes:
    """An answer that says that it went wrong: ``number`` is an errno of Linux."""
    return OUT_HEADER.pack(OUT_HEADER.size, -number, unique)


def attributes(found: os.stat_result, ino: int, uid: int, gid: int) -> bytes:
    """``struct fuse_attr``."""
    atime, mtime, ctime = found.st_atime_ns, found.st_mtime_ns, found.st_ctime_ns
    return _ATTR.pack(
        ino, found.st_size, found.st_blocks,
        atime // 1_000_000_000, mtime // 1_000_000_000, ctime // 1_000_000_000,
        atime % 1_000_000_000, mtime % 1_000_000_000, ctime % 1_000_000_000,
        found.st_mode, found.st_nlink, uid, gid, _device(found), found.st_blksize, 0,
    )  # fmt: skip


def _device(found: os.stat_result) -> int:
    """As ``new_encode_dev`` of Linux has it."""
    if not stat.S_ISBLK(found.st_mode) and not stat.S_ISCHR(found.st_mode):
        return 0
    major, minor = os.major(found.st_rdev), os.minor(found.st_rdev)
    return minor & 0xFF | (major & 0xFFF) << 8 | (minor & 0xFFF00) << 12


def attr_out(valid_ns: int, attr: bytes) -> bytes:
    """``struct fuse_attr_out``."""
    return _ATTR_OUT.pack(*divmod(valid_ns, 1_000_000_000)) + attr


def entry_out(nodeid: int, valid_ns: int, attr: bytes) -> bytes:
    """``struct fuse_entry_out``; the name and the attributes are good for the same time."""
    seconds, rest = divmod(valid_ns, 1_000_000_000)
    return _ENTRY_OUT.pack(nodeid, 0, seconds, seconds, rest, rest) + attr


def dirent(ino: int, following: int, kind: int, name: bytes) -> bytes:
    """``struct fuse_dirent``, padded."""
    size = DIRENT.size + len(name)
    return DIRENT.pack(ino, following & 0xFFFF_FFFF_FFFF_FFFF, len(name), kind) + name + bytes(-size % 8)
