"""A FUSE server over a folder: what a request asks for, done, and put into the driver's buffers.

What the guest may cache is chosen so that nobody sees stale data: file data from one open to the next (as NFS does),
names and attributes not at all, unless ``cache`` says for how many seconds; and writes go to the host at once, so
that a guest that dies has lost nothing and the host sees what it has written. Locks are the guest's own affair.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from avmm.backends.share import fuse, syscalls
from avmm.backends.share.folder import Change, Folder, FolderState, open_folder
from avmm.backends.share.fuse import Op, Request
from avmm.backends.threads import Brief, Threads, is_slow
from avmm.memory import split

#: Bytes of one read that the event loop does itself where the page cache has them: see avmm.devices.virtio.blk.
INLINE_MAX: Final = 1 << 20

#: Requests that a local file system answers from memory in some tens of microseconds, less than two wakes of a thread
#: take: the event loop does them, but for a while not those of a kind of which one has had to wait.
_BRIEF: Final = frozenset({
    Op.LOOKUP, Op.GETATTR, Op.SETATTR, Op.READLINK, Op.SYMLINK, Op.MKNOD, Op.MKDIR, Op.UNLINK, Op.RMDIR, Op.RENAME,
    Op.RENAME2, Op.LINK, Op.OPEN, Op.CREATE, Op.WRITE, Op.STATFS, Op.RELEASE, Op.GETXATTR, Op.LISTXATTR, Op.OPENDIR,
    Op.READDIR, Op.RELEASEDIR, Op.ACCESS, Op.FORGET, Op.LSEEK,
})  # fmt: skip
_BRIEF_WRITE: Final = 64 << 10  # bytes

#: Of a read or a write, at most.
_DATA_MAX: Final = 1 << 20
_PAGES_MAX: Final = 256
_BACKGROUND: Final = 64  # requests nobody waits for (readahead) that the guest sends at a time

_FEATURES: Final = (
    fuse.ASYNC_READ | fuse.ATOMIC_O_TRUNC | fuse.BIG_WRITES | fuse.ASYNC_DIO | fuse.PARALLEL_DIROPS | fuse.MAX_PAGES
    | fuse.HANDLE_KILLPRIV_V2
)  # fmt: skip
_CACHING: Final = fuse.AUTO_INVAL_DATA | fuse.DO_READDIRPLUS | fuse.READDIRPLUS_AUTO

#: Numbers of the guest's Linux for what may go wrong without an OSError.
_BROKEN: Final = errno.EINVAL

#: An answer on its way: bytes written into the driver's buffers, now or by a call that blocks.
Work = Callable[[], int]


@dataclass(frozen=True, slots=True)
class ShareState:
    """Of a share, for a snapshot."""

    started: bool
    flags: int
    folder: FolderState


class Share:
    """``folder`` for one virtio-fs device; ``name`` is what its threads are called. Made on the event loop.

    ``cache``: seconds for which the guest may believe names and attributes it has seen.
    """

    def __init__(self, folder: Folder, name: str, cache: float = 0.0, slow: bool = False) -> None:
        self._folder: Final = folder
        self._threads = Threads(f"avmm-{name}")
        self._valid = round(cache * 1e9)
        self._slow = slow
        self._started = False
        self._flags = 0
        self._brief = {op: Brief() for op in _BRIEF}
        #: Since the start: requests, bytes, and requests answered with an error.
        self.counters = {"requests": 0, "read_bytes": 0, "written_bytes": 0, "errors": 0}
        self._now: Final[dict[int, Callable[[Request, list[memoryview]], bytes | int | None]]] = {
            Op.LOOKUP: self._lookup_now, Op.GETATTR: self._getattr_now, Op.OPEN: self._open_now,
            Op.READ: self._read_now, Op.RELEASE: self._release_now, Op.RELEASEDIR: self._release,
            Op.FORGET: self._forget_now,
        }  # fmt: skip
        self._ops: Final[dict[int, Callable[[Request], bytes]]] = {
            Op.LOOKUP: self._lookup, Op.GETATTR: self._getattr, Op.SETATTR: self._setattr, Op.READLINK: self._readlink,
            Op.SYMLINK: self._symlink, Op.MKNOD: self._mknod, Op.MKDIR: self._mkdir, Op.UNLINK: self._unlink,
            Op.RMDIR: self._rmdir, Op.RENAME: self._rename, Op.RENAME2: self._rename2, Op.LINK: self._link,
            Op.OPEN: self._open, Op.CREATE: self._create, Op.RELEASE: self._release, Op.FSYNC: self._fsync,
            Op.STATFS: self._statfs, Op.SETXATTR: self._setxattr, Op.GETXATTR: self._getxattr,
            Op.LISTXATTR: self._listxattr, Op.REMOVEXATTR: self._removexattr, Op.INIT: self._init,
            Op.DESTROY: self._destroy, Op.OPENDIR: self._opendir, Op.RELEASEDIR: self._release,
            Op.FSYNCDIR: self._fsync, Op.ACCESS: self._access, Op.FORGET: self._forget,
            Op.BATCH_FORGET: self._batch_forget, Op.FALLOCATE: self._fallocate, Op.LSEEK: self._lseek,
            Op.COPY_FILE_RANGE: self._copy, Op.SYNCFS: self._syncfs, Op.READDIR: self._readdir,
            Op.READDIRPLUS: self._readdirplus,
        }  # fmt: skip

    # What a virtio-fs device needs (avmm.devices.virtio.fs.FsBackend).

    def serve(self, readable: list[memoryview], writable: list[memoryview]) -> int | Work:
        """Answer a request into ``writable``: how many bytes, or, where it may take a while, the call that does it, for
        :meth:`finish`. Raises ValueError for what is no FUSE request, or leaves no room for an answer."""
        self.counters["requests"] += 1
        length = sum(map(len, readable))
        head = readable[0] if readable and len(readable[0]) >= fuse.IN_HEADER.size else b"".join(readable)
        op = head[4] if len(head) >= 8 and not any(head[5:8]) else 0
        limit = fuse.IN_HEADER.size + (fuse.WRITE_IN.size if op == Op.WRITE else fuse.REQUEST_MAX)
        data = b"".join(split(readable, limit)[0]) if length > limit else b"".join(readable)
        request = fuse.parse(data, length)
        room = sum(map(len, writable))
        if room < fuse.OUT_HEADER.size and request.op not in fuse.SILENT and request.op != Op.INTERRUPT:
            raise ValueError("no room for the answer to a FUSE request")
        quick = None if self._slow else self._now.get(request.op)
        if quick is not None:
            try:
                if self._started:
                    answer = quick(request, writable)
                    if answer is not None:
                        return answer if isinstance(answer, int) else self._reply(request, writable, answer)
            except (OSError, ValueError, OverflowError, struct.error) as error:
                return self._fail(request, writable, error)
        operation: Callable[[], bytes | int]
        if request.op == Op.WRITE:
            views = split(readable, limit)[1] if length > limit else []
            operation = partial(self._write, request, views)
        elif request.op == Op.READ:
            operation = partial(self._read, request, writable)
        elif request.op in self._ops and (self._started or request.op == Op.INIT):
            operation = partial(self._ops[request.op], request)
        else:
            return self._fail(request, writable, OSError(errno.ENOSYS if self._started else errno.EIO, ""))
        work = partial(self._do, operation, request, writable)
        if request.op in _BRIEF and not self._slow and (request.op != Op.WRITE or length <= _BRIEF_WRITE):
            brief = self._brief[Op(request.op)]
            if brief.allowed():
                return brief.run(work)
        return work

    async def finish(self, work: Work) -> int:
        """Do the blocking part of :meth:`serve` on a thread."""
        return await self._threads.run(work)

    def save(self) -> ShareState:
        """For a snapshot, while nothing is in work."""
        return ShareState(self._started, self._flags, self._folder.save())

    def restore(self, state: ShareState) -> None:
        """Back to what :meth:`save` gave."""
        self._started, self._flags = state.started, state.flags
        self._folder.restore(state.folder)

    def close(self) -> None:
        """Close the folder. Blocks; nothing may be in work."""
        self._threads.close()
        self._folder.close()

    def _do(self, operation: Callable[[], bytes | int], request: Request, writable: list[memoryview]) -> int:
        try:
            if not self._started and request.op != Op.INIT:
                raise OSError(errno.EIO, "")
            answer = operation()
        except (OSError, ValueError, OverflowError, struct.error) as error:
            return self._fail(request, writable, error)
        return answer if isinstance(answer, int) else self._reply(request, writable, answer)

    def _reply(self, request: Request, writable: list[memoryview], payload: bytes) -> int:
        if request.op in fuse.SILENT:
            return 0
        whole = fuse.answer(request.unique, payload)
        if len(whole) > sum(map(len, writable)):
            whole = fuse.failure(request.unique, errno.EIO)
        return _put(writable, whole)

    def _fail(self, request: Request, writable: list[memoryview], error: Exception) -> int:
        """What struct, int and str refuse is a number or a text that no request may have."""
        if request.op in fuse.SILENT or not writable:
            return 0
        self.counters["errors"] += 1
        number = (error.errno or errno.EIO) if isinstance(error, OSError) else _BROKEN
        whole = fuse.failure(request.unique, number)
        return _put(writable, whole) if sum(map(len, writable)) >= len(whole) else 0

    # On the event loop, where nothing has to be waited for; None where it may have to be.

    def _lookup_now(self, request: Request, writable: list[memoryview]) -> bytes | None:
        found = self._folder.lookup_now(request.nodeid, fuse.name_in(request.body))
        return None if found is None else self._entry(*found)

    def _getattr_now(self, request: Request, writable: list[memoryview]) -> bytes | None:
        flags, _ = fuse.GETATTR_IN.unpack_from(request.body)
        if flags & fuse.GETATTR_FH:
            return None
        found = self._folder.getattr_now(request.nodeid)
        return None if found is None else fuse.attr_out(self._valid, self._attributes(found))

    def _open_now(self, request: Request, writable: list[memoryview]) -> bytes | None:
        flags, _ = fuse.OPEN_IN.unpack_from(request.body)
        handle = self._folder.open_now(request.nodeid, _flags(flags))
        return None if handle is None else self._opened(handle)

    def _read_now(self, request: Request, writable: list[memoryview]) -> int | None:
        handle, offset, size = fuse.READ_IN.unpack_from(request.body)[:3]
        if size > INLINE_MAX:
            return None
        head, views = split(writable, fuse.OUT_HEADER.size)
        done = self._folder.read_now(handle, offset, _at_most(views, size))
        return None if done is None else self._read_done(request, head, done)

    def _release_now(self, request: Request, writable: list[memoryview]) -> bytes | None:
        # Closing what has been written may take a while: some file systems allocate then.
        if fuse.RELEASE_IN.unpack_from(request.body)[1] & os.O_ACCMODE:
            return None
        return self._release(request)

    def _forget_now(self, request: Request, writable: list[memoryview]) -> bytes | None:
        return self._forget(request) if self._folder.inodes.forgotten_at_once(request.nodeid) else None

    # On a thread.

    def _init(self, request: Request) -> bytes:
        major, minor, _, flags = fuse.INIT_IN.unpack_from(request.body)
        if major > fuse.MAJOR:  # it will ask again, for this one
            return fuse.INIT_OUT.pack(fuse.MAJOR, fuse.MINOR, 0, 0, 0, 0, 0, 0, 0, 0, 0)
        if (major, minor) < (fuse.MAJOR, fuse.MINOR_MIN):
            raise OSError(errno.EPROTO, "")
        self._folder.clear()
        self._flags = flags & (_FEATURES | (_CACHING if self._valid else 0))
        self._started = True
        # How far to read ahead at most: Linux takes the smaller of this and of what it has been told to by then, which
        # is more than what it asks for here if our initrd was sooner than this answer.
        return fuse.INIT_OUT.pack(
            fuse.MAJOR, fuse.MINOR, _DATA_MAX, self._flags, _BACKGROUND, _BACKGROUND * 3 // 4, _DATA_MAX, 1,
            _PAGES_MAX, 0, 0,
        )  # fmt: skip

    def _destroy(self, request: Request) -> bytes:
        self._started = False
        self._folder.clear()
        return b""

    def _lookup(self, request: Request) -> bytes:
        return self._entry(*self._folder.lookup(request.nodeid, fuse.name_in(request.body)))

    def _forget(self, request: Request) -> bytes:
        (count,) = fuse.FORGET_IN.unpack_from(request.body)
        self._folder.inodes.forget(request.nodeid, count)
        return b""

    def _batch_forget(self, request: Request) -> bytes:
        (count,) = fuse.BATCH_FORGET_IN.unpack_from(request.body)
        ones = request.body[fuse.BATCH_FORGET_IN.size :]
        ones = ones[: min(count, len(ones) // fuse.FORGET_ONE.size) * fuse.FORGET_ONE.size]
        for nodeid, lookups in fuse.FORGET_ONE.iter_unpack(ones):
            self._folder.inodes.forget(nodeid, lookups)
        return b""

    def _getattr(self, request: Request) -> bytes:
        flags, handle = fuse.GETATTR_IN.unpack_from(request.body)
        found = self._folder.getattr(request.nodeid, handle if flags & fuse.GETATTR_FH else None)
        return fuse.attr_out(self._valid, self._attributes(found))

    def _setattr(self, request: Request) -> bytes:
        valid, handle, size, _, atime, mtime, _, atime_ns, mtime_ns, _, mode, uid, gid = fuse.SETATTR_IN.unpack_from(
            request.body
        )
        now = (0, syscalls.UTIME_NOW)
        if max(atime_ns, mtime_ns) >= 10**9:
            raise OSError(errno.EINVAL, "")
        change = Change(
            mode=mode if valid & fuse.FATTR_MODE else None,
            uid=uid if valid & fuse.FATTR_UID else None,
            gid=gid if valid & fuse.FATTR_GID else None,
            size=size if valid & fuse.FATTR_SIZE else None,
            atime=now if valid & fuse.FATTR_ATIME_NOW else (atime, atime_ns) if valid & fuse.FATTR_ATIME else None,
            mtime=now if valid & fuse.FATTR_MTIME_NOW else (mtime, mtime_ns) if valid & fuse.FATTR_MTIME else None,
            drop_suid=bool(valid & fuse.FATTR_KILL_SUIDGID),
        )
        found = self._folder.setattr(request.nodeid, change, handle if valid & fuse.FATTR_FH else None)
        return fuse.attr_out(self._valid, self._attributes(found))

    def _readlink(self, request: Request) -> bytes:
        return self._folder.readlink(request.nodeid)

    def _symlink(self, request: Request) -> bytes:
        name, target = fuse.names_in(request.body)
        return self._entry(*self._folder.symlink(request.nodeid, name, target, request.uid, request.gid))

    def _mknod(self, request: Request) -> bytes:
        mode = fuse.MKNOD_IN.unpack_from(request.body)[0]
        name = fuse.name_in(request.body, fuse.MKNOD_IN.size)
        return self._entry(*self._folder.mknod(request.nodeid, name, mode, request.uid, request.gid))

    def _mkdir(self, request: Request) -> bytes:
        mode, _ = fuse.MKDIR_IN.unpack_from(request.body)
        name = fuse.name_in(request.body, fuse.MKDIR_IN.size)
        return self._entry(*self._folder.mkdir(request.nodeid, name, mode, request.uid, request.gid))

    def _unlink(self, request: Request) -> bytes:
        self._folder.unlink(request.nodeid, fuse.name_in(request.body))
        return b""

    def _rmdir(self, request: Request) -> bytes:
        self._folder.rmdir(request.nodeid, fuse.name_in(request.body))
        return b""

    def _rename(self, request: Request) -> bytes:
        (target,) = fuse.RENAME_IN.unpack_from(request.body)
        name, new_name = fuse.names_in(request.body, fuse.RENAME_IN.size)
        self._folder.rename(request.nodeid, name, target, new_name, 0)
        return b""

    def _rename2(self, request: Request) -> bytes:
        target, flags = fuse.RENAME2_IN.unpack_from(request.body)
        name, new_name = fuse.names_in(request.body, fuse.RENAME2_IN.size)
        self._folder.rename(request.nodeid, name, target, new_name, flags)
        return b""

    def _link(self, request: Request) -> bytes:
        (nodeid,) = fuse.LINK_IN.unpack_from(request.body)
        return self._entry(*self._folder.link(nodeid, request.nodeid, fuse.name_in(request.body, fuse.LINK_IN.size)))

    def _open(self, request: Request) -> bytes:
        flags, how = fuse.OPEN_IN.unpack_from(request.body)
        return self._opened(self._folder.open(request.nodeid, _flags(flags), bool(how & fuse.OPEN_KILL_SUIDGID)))

    def _opendir(self, request: Request) -> bytes:
        return fuse.OPEN_OUT.pack(self._folder.opendir(request.nodeid), 0)

    def _create(self, request: Request) -> bytes:
        flags, mode, _, how = fuse.CREATE_IN.unpack_from(request.body)
        name = fuse.name_in(request.body, fuse.CREATE_IN.size)
        nodeid, found, handle = self._folder.create(
            request.nodeid, name, _flags(flags), mode, request.uid, request.gid, bool(how & fuse.OPEN_KILL_SUIDGID)
        )
        return self._entry(nodeid, found) + self._opened(handle)

    def _release(self, request: Request, _: object = None) -> bytes:
        self._folder.release(fuse.RELEASE_IN.unpack_from(request.body)[0])
        return b""

    def _read(self, request: Request, writable: list[memoryview]) -> int:
        handle, offset, size = fuse.READ_IN.unpack_from(request.body)[:3]
        head, views = split(writable, fuse.OUT_HEADER.size)
        done = self._folder.read(handle, offset, _at_most(views, min(size, _DATA_MAX)))
        return self._read_done(request, head, done)

    def _read_done(self, request: Request, head: list[memoryview], done: int) -> int:
        self.counters["read_bytes"] += done
        _put(head, fuse.OUT_HEADER.pack(fuse.OUT_HEADER.size + done, 0, request.unique))
        return fuse.OUT_HEADER.size + done

    def _write(self, request: Request, views: list[memoryview]) -> bytes:
        handle, offset, size, how = fuse.WRITE_IN.unpack_from(request.body)[:4]
        views = _at_most(views, min(size, _DATA_MAX))
        done = self._folder.write(handle, offset, views, bool(how & fuse.WRITE_KILL_SUIDGID))
        self.counters["written_bytes"] += done
        return fuse.WRITE_OUT.pack(done)

    def _statfs(self, request: Request) -> bytes:
        s = self._folder.statvfs(request.nodeid)
        return fuse.STATFS_OUT.pack(
            s.f_blocks, s.f_bfree, s.f_bavail, s.f_files, s.f_ffree, s.f_bsize, s.f_namemax, s.f_frsize
        )

    def _readdir(self, request: Request) -> bytes:
        handle, offset, size = fuse.READ_IN.unpack_from(request.body)[:3]
        found = bytearray()
        for ino, following, kind, name in self._folder.entries(handle, offset, size):
            entry = fuse.dirent(ino, following, kind, os.fsencode(name))
            if len(found) + len(entry) > size:
                break
            found += entry
        return bytes(found)

    def _readdirplus(self, request: Request) -> bytes:
        handle, offset, size = fuse.READ_IN.unpack_from(request.body)[:3]
        found = bytearray()
        for ino, following, kind, name in self._folder.entries(handle, offset, size // 4):
            entry = fuse.dirent(ino, following, kind, os.fsencode(name))
            if len(found) + fuse.ENTRY_SIZE + len(entry) > size:
                break
            head = bytes(fuse.ENTRY_SIZE)  # node ID 0: nothing is known of it
            if name not in (".", ".."):
                with contextlib.suppress(OSError):
                    head = self._entry(*self._folder.lookup(request.nodeid, name))
            found += head + entry
        return bytes(found)

    def _fsync(self, request: Request) -> bytes:
        handle, flags = fuse.FSYNC_IN.unpack_from(request.body)
        self._folder.fsync(handle, bool(flags & fuse.FSYNC_FDATASYNC))
        return b""

    def _syncfs(self, request: Request) -> bytes:
        self._folder.sync()
        return b""

    def _access(self, request: Request) -> bytes:
        self._folder.access(request.nodeid, fuse.ACCESS_IN.unpack_from(request.body)[0])
        return b""

    def _fallocate(self, request: Request) -> bytes:
        handle, offset, length, mode = fuse.FALLOCATE_IN.unpack_from(request.body)
        self._folder.allocate(handle, mode, offset, length)
        return b""

    def _lseek(self, request: Request) -> bytes:
        return fuse.LSEEK_OUT.pack(self._folder.lseek(*fuse.LSEEK_IN.unpack_from(request.body)))

    def _copy(self, request: Request) -> bytes:
        handle, offset, _, target, target_offset, length, _ = fuse.COPY_IN.unpack_from(request.body)
        return fuse.WRITE_OUT.pack(self._folder.copy(handle, offset, target, target_offset, length))

    def _setxattr(self, request: Request) -> bytes:
        size, flags = fuse.SETXATTR_IN.unpack_from(request.body)
        name = fuse.name_in(request.body, fuse.SETXATTR_IN.size)
        value = request.body[fuse.SETXATTR_IN.size + len(os.fsencode(name)) + 1 :]
        if len(value) < size:
            raise OSError(errno.EINVAL, "")
        self._folder.setxattr(request.nodeid, name, value[:size], flags)
        return b""

    def _getxattr(self, request: Request) -> bytes:
        (size,) = fuse.GETXATTR_IN.unpack_from(request.body)
        return _sized(self._folder.getxattr(request.nodeid, fuse.name_in(request.body, fuse.GETXATTR_IN.size)), size)

    def _listxattr(self, request: Request) -> bytes:
        (size,) = fuse.GETXATTR_IN.unpack_from(request.body)
        return _sized(b"".join(os.fsencode(name) + b"\0" for name in self._folder.listxattr(request.nodeid)), size)

    def _removexattr(self, request: Request) -> bytes:
        self._folder.removexattr(request.nodeid, fuse.name_in(request.body))
        return b""

    # Answers.

    def _attributes(self, found: os.stat_result) -> bytes:
        ino = self._folder.inodes.number(found.st_dev, found.st_ino)
        return fuse.attributes(found, ino, *self._folder.owner(found))

    def _entry(self, nodeid: int, found: os.stat_result) -> bytes:
        return fuse.entry_out(nodeid, self._valid, self._attributes(found))

    def _opened(self, handle: int) -> bytes:
        return fuse.OPEN_OUT.pack(handle, fuse.FOPEN_KEEP_CACHE if self._valid else 0)


def open_share(path: Path, name: str, *, read_only: bool, cache: float, descriptors: int) -> Share:
    """The folder at ``path`` for a guest, see :class:`Share`. Raises ConfigError."""
    folder = open_folder(path, read_only, descriptors)
    return Share(folder, name, cache, is_slow(path))


def _flags(flags: int) -> int:
    """Open flags of the guest as the host has them: arm64 and x86-64 differ in some that do not pass anyway."""
    return flags & (os.O_ACCMODE | os.O_APPEND | os.O_TRUNC | os.O_EXCL | os.O_DSYNC | os.O_SYNC)


def _put(views: list[memoryview], data: bytes) -> int:
    at = 0
    for view in views:
        piece = data[at : at + len(view)]
        view[: len(piece)] = piece
        at += len(piece)
        if at == len(data):
            break
    return at


def _at_most(views: list[memoryview], size: int) -> list[memoryview]:
    return split(views, size)[0] if size < sum(map(len, views)) else views


def _sized(data: bytes, size: int) -> bytes:
    """An extended attribute's answer: how long it is, if the guest asks for that, else what it is."""
    if not size:
        return fuse.GETXATTR_OUT.pack(len(data))
    if len(data) > size:
        raise OSError(errno.ERANGE, "")
    return data
