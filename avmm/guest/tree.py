"""Files and trees as a stream, sans-io: what the agent's ``put`` reads and its ``get`` writes (firmware/agent/tree.c).

An entry is a header, a name relative to the top (empty for the top itself) and, for a file or a link, its content in
chunks, the last of which is empty. What comes from a guest is believed in nothing: a name leads nowhere but down,
nothing comes twice, and links are made last, so that nothing is written through one.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from avmm.errors import GuestError, HostError

_ENTRY: Final = struct.Struct("<B3xIqI")  # type, permissions, time of change in ns, length of the name
_CHUNK: Final = struct.Struct("<I")
_FILE, _DIRECTORY, _LINK, _END = b"fdle"
_PIECE: Final = 128 * 1024
_NAME_MAX: Final = 4095
_CHUNK_MAX: Final = 1 << 20


def pack_bytes(content: bytes, mode: int) -> Iterator[bytes]:
    """A stream of one file with this content."""
    yield _ENTRY.pack(_FILE, mode, 0, 0)
    for at in range(0, len(content), _PIECE):
        piece = content[at : at + _PIECE]
        yield _CHUNK.pack(len(piece)) + piece
    yield _CHUNK.pack(0) + _ENTRY.pack(_END, 0, 0, 0)


def pack(source: Path) -> Iterator[bytes]:
    """A stream of the file or tree ``source``; blocks. Links stay links; devices, sockets and pipes are left out."""
    for path, name in _walk(source):
        info = path.stat() if not name else path.lstat()
        head = stat.S_IMODE(info.st_mode), info.st_mtime_ns, len(name)
        if stat.S_ISDIR(info.st_mode):
            yield _ENTRY.pack(_DIRECTORY, *head) + name
        elif stat.S_ISLNK(info.st_mode):
            target = os.fsencode(os.readlink(path))
            yield _ENTRY.pack(_LINK, *head) + name + _CHUNK.pack(len(target)) + target + _CHUNK.pack(0)
        elif stat.S_ISREG(info.st_mode) or not name:
            with path.open("rb") as stream:
                yield _ENTRY.pack(_FILE, *head) + name
                while piece := stream.read(_PIECE):
                    yield _CHUNK.pack(len(piece)) + piece
                yield _CHUNK.pack(0)
    yield _ENTRY.pack(_END, 0, 0, 0)


def _walk(source: Path) -> Iterator[tuple[Path, bytes]]:
    yield source, b""
    if not source.is_dir():
        return
    for folder, folders, names in os.walk(source):
        folders.sort()
        for each in sorted([*folders, *names]):
            path = Path(folder, each)
            yield path, os.fsencode(path.relative_to(source))


class Unpacker:
    """Writes a stream that comes in pieces to ``target``, which must not exist, or be a file where a file comes.

    ``feed`` blocks on the file system; it raises GuestError for a stream that cannot be and HostError for what the
    host's file system refuses. ``target`` None: the content of a single file is kept in ``content`` instead.
    """

    def __init__(self, target: Path | None) -> None:
        self._target = target
        self.content = bytearray()
        self.ended = False
        self._buffer = bytearray()
        self._seen: dict[bytes, int] = {}  # names and types
        self._stream: BinaryIO | None = None
        self._entry: tuple[int, Path, int, int] | None = None  # type, path, permissions, time
        self._link = bytearray()
        self._links: list[tuple[Path, bytes]] = []
        self._folders: list[tuple[Path, int, int]] = []

    def feed(self, data: bytes) -> None:
        """More of the stream."""
        self._buffer += data
        try:
            while self._step():
                pass
        except OSError as error:
            raise HostError(f"cannot write {error.filename or self._target}: {error.strerror}") from error

    def close(self) -> None:
        """Let go of what is open; before the end of the stream too."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _step(self) -> bool:
        if self.ended:
            if self._buffer:
                raise GuestError("the guest sent more than the end of a tree")
            return False
        return self._chunk() if self._entry is not None else self._head()

    def _head(self) -> bool:
        if len(self._buffer) < _ENTRY.size:
            return False
        type, mode, time, length = _ENTRY.unpack_from(self._buffer)
        if type not in (_FILE, _DIRECTORY, _LINK, _END) or length > _NAME_MAX:
            raise GuestError("the guest sent what is no file, directory or link")
        if len(self._buffer) < _ENTRY.size + length:
            return False
        name = bytes(self._buffer[_ENTRY.size : _ENTRY.size + length])
        del self._buffer[: _ENTRY.size + length]
        if type == _END:
            self._finish()
            return True
        path = self._place(type, name)
        mode &= 0o777  # no set-user-ID from a guest
        if type == _DIRECTORY:
            path.mkdir()
            self._folders.append((path, mode, time))
            return True
        if type == _FILE and self._target is not None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | (os.O_EXCL if name else 0)
            self._stream = open(os.open(path, flags, 0o600), "wb")  # noqa: SIM115 # it is closed in the course of time
        self._link.clear()
        self._entry = type, path, mode, time
        return True

    def _place(self, type: int, name: bytes) -> Path:
        """Where an entry goes: each name once, and inside a directory that came before it."""
        parts = name.split(b"/") if name else []
        bad = any(part in (b"", b".", b"..") or b"\0" in part for part in parts)
        homeless = bool(parts) and self._seen.get(b"/".join(parts[:-1])) != _DIRECTORY
        if bad or homeless or name in self._seen or (not name and type == _LINK):
            raise GuestError(f"the guest sent a name that cannot be: {name[:200]!r}")
        if self._target is None and type != _FILE:
            raise GuestError("the guest has a directory where a file was asked for")
        self._seen[name] = type
        return Path(os.fsdecode(b"/".join([os.fsencode(self._target or ""), *parts])))

    def _chunk(self) -> bool:
        if len(self._buffer) < _CHUNK.size:
            return False
        (length,) = _CHUNK.unpack_from(self._buffer)
        if length > _CHUNK_MAX:
            raise GuestError("the guest sent a piece of a file that is too large")
        if len(self._buffer) < _CHUNK.size + length:
            return False
        piece = memoryview(self._buffer)[_CHUNK.size : _CHUNK.size + length]
        assert self._entry is not None
        type, path, mode, time = self._entry
        if not length:
            self._entry = None
            if type == _LINK:
                if b"\0" in self._link:
                    raise GuestError("the guest sent a link that cannot be")
                self._links.append((path, bytes(self._link)))
            elif self._stream is not None:
                os.fchmod(self._stream.fileno(), mode)
                self.close()
                os.utime(path, ns=(time, time))
        elif type == _LINK:
            self._link += piece
            if len(self._link) > _NAME_MAX:
                raise GuestError("the guest sent a link that is too long")
        elif self._stream is not None:
            self._stream.write(piece)
        else:
            self.content += piece
        piece.release()
        del self._buffer[: _CHUNK.size + length]
        return True

    def _finish(self) -> None:
        self.ended = True
        for path, target in self._links:
            os.symlink(target, os.fsencode(path))
        for path, mode, time in reversed(self._folders):
            path.chmod(mode)
            os.utime(path, ns=(time, time))
