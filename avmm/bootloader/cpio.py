"""The cpio "newc" format: what the kernel unpacks as its initramfs.

Reproducible: entries are sorted by name, times are zero, inode numbers count from one, so the same files give
the same bytes. Linux accepts archives one after another in one initrd (Documentation/driver-api/early-userspace/
buffer-format.rst): :func:`append` joins two, later files win.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from avmm.errors import ImageError

_MAGIC = b"070701"
_HEADER = 110  # the magic and thirteen fields of eight hexadecimal digits
_TRAILER = "TRAILER!!!"


@dataclass(frozen=True, slots=True)
class Entry:
    """One file: ``mode`` holds the type and permission bits, ``device`` (major, minor) of a device node."""

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def directory(name: str, mode: int = 0o755) -> Entry:
    """A directory."""
    return Entry(name, stat.S_IFDIR | mode)


def file(name: str, data: bytes, mode: int = 0o644) -> Entry:
    """A regular file."""
    return Entry(name, stat.S_IFREG | mode, data)


def symlink(name: str, target: str) -> Entry:
    """A symbolic link."""
    return Entry(name, stat.S_IFLNK | 0o777, target.encode())


def character_device(name: str, major: int, minor: int, mode: int = 0o600) -> Entry:
    """A character device node."""
    return Entry(name, stat.S_IFCHR | mode, device=(major, minor))


def pack(entries: Iterable[Entry]) -> bytes:
    """A newc archive of ``entries``; missing parent directories are added. A name given twice keeps the last."""
    files: dict[str, Entry] = {}
    for entry in entries:
        name = entry.name.strip("/")
        if not name or "\0" in name:
            raise ValueError(f"not a file name for an archive: {entry.name!r}")
        files[name] = entry
    for name in list(files):
        for parent in PurePosixPath(name).parents[:-1]:  # the last one is "."
            files.setdefault(str(parent), directory(str(parent)))
    out = bytearray()
    for inode, name in enumerate(sorted(files), 1):
        _put(out, inode, name, files[name])
    _put(out, 0, _TRAILER, Entry(_TRAILER, 0))
    return bytes(out)


def append(first: bytes, second: bytes) -> bytes:
    """``first`` (compressed or not) followed by ``second``, which must start on a multiple of four bytes."""
    return first + bytes(-len(first) % 4) + second


def unpack(archive: bytes) -> Iterator[Entry]:
    """The entries of an uncompressed archive, or of several one after another.

    Raises ImageError when it is not a whole newc archive.
    """
    at = 0
    while at < len(archive):
        if archive[at] == 0:  # padding between archives
            at += 1
            continue
        try:
            if archive[at : at + 6] != _MAGIC or len(archive) < at + _HEADER:
                raise ValueError
            fields = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        except ValueError:
            raise ImageError(f"not a newc cpio archive: no header at byte {at}") from None
        size, name_size = fields[6], fields[11]
        name_end = at + _HEADER + name_size
        start = name_end + (-name_end % 4)
        if start + size > len(archive) or not name_size:
            raise ImageError(f"the cpio archive is cut short: the file at byte {at} does not end in it")
        name = archive[at + _HEADER : name_end - 1].decode("utf-8", "surrogateescape")
        if name != _TRAILER:
            yield Entry(name, fields[1], archive[start : start + size], (fields[9], fields[10]))
        at = start + size
        at += -at % 4


def _put(out: bytearray, inode: int, name: str, entry: Entry) -> None:
    encoded = name.encode("utf-8", "surrogateescape") + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    major, minor = entry.device
    # inode, mode, uid, gid, nlink, mtime, size, device of the file system (2), rdev (2), length of the name, checksum
    fields = (inode, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, major, minor, len(encoded), 0)
    out += _MAGIC + b"".join(b"%08X" % field for field in fields) + encoded
    out += bytes(-len(out) % 4)
    out += entry.data
    out += bytes(-len(out) % 4)
