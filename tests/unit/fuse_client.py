"""The guest's side of FUSE, for tests of a share without a guest: requests as bytes, in buffers of odd sizes."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field

from avmm.backends.share import fuse
from avmm.backends.share.fuse import Op
from avmm.backends.share.server import Share

ATTR = struct.Struct("<QQQqqqIIIIIIIIII")
ENTRY = struct.Struct("<QQQQII")


@dataclass(frozen=True, slots=True)
class Found:
    """What an entry or attribute answer says."""

    nodeid: int
    ino: int
    size: int
    mode: int
    nlink: int
    uid: int
    gid: int
    mtime: int

    @classmethod
    def of(cls, nodeid: int, attr: bytes) -> Found:
        a = ATTR.unpack_from(attr)
        return cls(nodeid, a[0], a[1], a[9], a[10], a[11], a[12], a[4] * 10**9 + a[7])


def pieces(data: bytes | bytearray, cut: int) -> list[memoryview]:
    """Views of ``data`` in two parts, cut anywhere."""
    view = memoryview(data)
    return [part for part in (view[:cut], view[cut:]) if part]


@dataclass(slots=True)
class Client:
    """Speaks to ``share`` as whoever ``uid`` and ``gid`` are; done at once, on this thread. Raises OSError."""

    share: Share
    uid: int = 0
    gid: int = 0
    cut: int = 50
    _unique: int = field(default=0)

    def __post_init__(self) -> None:
        self.call(Op.INIT, 0, fuse.INIT_IN.pack(7, 38, 1 << 17, 0xFFFFFFFF))

    def raw(self, op: int, nodeid: int, body: bytes = b"", room: int = 1 << 16) -> bytearray:
        """The whole answer."""
        self._unique += 1
        size = fuse.IN_HEADER.size + len(body)
        request = fuse.IN_HEADER.pack(size, op, self._unique, nodeid, self.uid, self.gid, 1, 0, 0) + body
        answer = bytearray(room)
        done = self.share.serve(pieces(request, self.cut % size), pieces(answer, self.cut % max(room, 1)))
        length = done if isinstance(done, int) else done()
        return answer[:length]

    def call(self, op: int, nodeid: int, body: bytes = b"", room: int = 1 << 16) -> bytes:
        """The payload of the answer; its error is raised."""
        answer = bytes(self.raw(op, nodeid, body, room))
        if op in fuse.SILENT:
            assert not answer
            return b""
        size, error, unique = fuse.OUT_HEADER.unpack_from(answer)
        assert size == len(answer)
        assert unique == self._unique
        if error:
            assert size == fuse.OUT_HEADER.size
            raise OSError(-error, os.strerror(-error))
        return answer[fuse.OUT_HEADER.size :]

    def entry(self, op: int, nodeid: int, body: bytes) -> Found:
        answer = self.call(op, nodeid, body)
        return Found.of(ENTRY.unpack_from(answer)[0], answer[ENTRY.size :])

    def lookup(self, parent: int, name: str) -> Found:
        return self.entry(Op.LOOKUP, parent, os.fsencode(name) + b"\0")

    def walk(self, path: str) -> int:
        """The node ID of ``path`` below the root."""
        nodeid = fuse.ROOT_ID
        for name in filter(None, path.split("/")):
            nodeid = self.lookup(nodeid, name).nodeid
        return nodeid

    def getattr(self, nodeid: int) -> Found:
        return Found.of(nodeid, self.call(Op.GETATTR, nodeid, fuse.GETATTR_IN.pack(0, 0))[16:])

    def open(self, nodeid: int, flags: int = os.O_RDONLY, op: int = Op.OPEN) -> int:
        return int(fuse.OPEN_OUT.unpack(self.call(op, nodeid, fuse.OPEN_IN.pack(flags, 0)))[0])

    def create(self, parent: int, name: str, mode: int = 0o644, flags: int = os.O_RDWR) -> tuple[Found, int]:
        body = fuse.CREATE_IN.pack(flags, mode, 0, 0) + os.fsencode(name) + b"\0"
        answer = self.call(Op.CREATE, parent, body)
        found = Found.of(ENTRY.unpack_from(answer)[0], answer[ENTRY.size :])
        return found, fuse.OPEN_OUT.unpack(answer[-fuse.OPEN_OUT.size :])[0]

    def read(self, handle: int, offset: int, size: int) -> bytes:
        return self.call(Op.READ, 0, fuse.READ_IN.pack(handle, offset, size, 0, 0, 0), 16 + size)

    def write(self, handle: int, offset: int, data: bytes, flags: int = 0) -> int:
        body = fuse.WRITE_IN.pack(handle, offset, len(data), flags, 0, 0) + data
        return int(fuse.WRITE_OUT.unpack(self.call(Op.WRITE, 0, body))[0])

    def release(self, handle: int) -> None:
        self.call(Op.RELEASE, 0, fuse.RELEASE_IN.pack(handle, 0, 0, 0))

    def mkdir(self, parent: int, name: str, mode: int = 0o755) -> Found:
        return self.entry(Op.MKDIR, parent, fuse.MKDIR_IN.pack(mode, 0) + os.fsencode(name) + b"\0")

    def named(self, op: int, parent: int, name: str) -> None:
        """UNLINK, RMDIR."""
        self.call(op, parent, os.fsencode(name) + b"\0")

    def rename(self, parent: int, name: str, target: int, new_name: str, flags: int = 0) -> None:
        names = os.fsencode(name) + b"\0" + os.fsencode(new_name) + b"\0"
        self.call(Op.RENAME2, parent, fuse.RENAME2_IN.pack(target, flags) + names)

    def symlink(self, parent: int, name: str, target: str) -> Found:
        return self.entry(Op.SYMLINK, parent, os.fsencode(name) + b"\0" + os.fsencode(target) + b"\0")

    def link(self, nodeid: int, parent: int, name: str) -> Found:
        return self.entry(Op.LINK, parent, fuse.LINK_IN.pack(nodeid) + os.fsencode(name) + b"\0")

    def setattr(self, nodeid: int, valid: int, **values: int) -> Found:
        fields = "fh size owner atime mtime ctime atime_ns mtime_ns ctime_ns mode uid gid"
        v = dict.fromkeys(fields.split(), 0) | values
        return Found.of(nodeid, self.call(Op.SETATTR, nodeid, fuse.SETATTR_IN.pack(valid, *v.values()))[16:])

    def names(self, nodeid: int, size: int = 4096, op: int = Op.READDIR) -> list[str]:
        """All names in a directory, read in pieces of ``size`` bytes."""
        handle = self.open(nodeid, op=Op.OPENDIR)
        found: list[str] = []
        offset = 0
        while data := self.call(op, nodeid, fuse.READ_IN.pack(handle, offset, size, 0, 0, 0), 16 + size):
            while data:
                head = 0 if op == Op.READDIR else fuse.ENTRY_SIZE
                _, offset, length, _ = fuse.DIRENT.unpack_from(data, head)
                at = head + fuse.DIRENT.size
                found.append(os.fsdecode(data[at : at + length]))
                data = data[(at + length + 7) & ~7 :]
        self.release(handle)
        return found

    def forget(self, nodeid: int, count: int = 1) -> None:
        self.call(Op.FORGET, nodeid, fuse.FORGET_IN.pack(count), 0)
