"""A folder of the host as a file system for a guest: files by node ID and handle, never by path.

Nothing leaves the folder. A name is one component, never ``..``, and is looked up in a directory that is held open;
symbolic links are shown to the guest, which follows them in its own tree, and are never followed here. A file is opened
through its O_PATH descriptor, once that has been seen to be a regular file: no device, FIFO or socket of the host is.

All calls block, are safe from several threads, and raise OSError with the numbers the guest is to see. With
``read_only`` whatever would change something raises EROFS.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from avmm.backends.share import syscalls
from avmm.backends.share.inodes import Inodes
from avmm.backends.share.syscalls import O_PATH
from avmm.errors import ConfigError
from avmm.memory import split

NAME_MAX: Final = 255
_LINK_MAX: Final = 4096
_XATTR_MAX: Final = 64 << 10
#: Bytes copied between two files, or allocated, in one call: a thread is not to be away for minutes.
_COPY_MAX: Final = 16 << 20
_OFFSET_MAX: Final = (1 << 63) - 1

#: Of what a guest opens a file with, what the host's open is given. O_DIRECT is between the guest and its own cache.
_OPEN_FLAGS: Final = os.O_ACCMODE | os.O_APPEND | os.O_TRUNC | os.O_DSYNC | os.O_SYNC
_OPEN_ALWAYS: Final = os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
_LOOK: Final = O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_NOWAIT: Final = getattr(os, "RWF_NOWAIT", 0)

#: Who the guest sees as owner of a file that is not ours, where we are not root: Linux's overflow ID.
_NOBODY: Final = 65534


@dataclass(slots=True, eq=False)
class Handle:
    """An open file or directory."""

    fd: int
    nodeid: int
    flags: int
    directory: bool
    lock: threading.Lock  # a directory's position is its descriptor's
    users: int = 0
    gone: bool = False


@dataclass(slots=True)
class Change:
    """What ``setattr`` is to set; None is left alone. Times are (seconds, nanoseconds or UTIME_NOW)."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime: tuple[int, int] | None = None
    mtime: tuple[int, int] | None = None
    drop_suid: bool = False


@dataclass(frozen=True, slots=True)
class FolderState:
    """Of a folder, for a snapshot: its nodes and handles, by name."""

    nodes: tuple[int, tuple[tuple[int, tuple[int, int], int, int, str, int], ...]]
    handles: tuple[tuple[int, int, int, bool], ...]  # handle, nodeid, flags, directory


class Folder:
    """The folder at ``path``, with at most ``descriptors`` open files of the host's (about)."""

    def __init__(self, path: Path, read_only: bool, descriptors: int) -> None:
        try:
            root = os.open(path, os.O_DIRECTORY | os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ConfigError(f"cannot share the folder {path}: {error.strerror}") from error
        self.read_only = read_only
        self._handles_max = max(descriptors // 2, 16)
        self.inodes = Inodes(root, max(descriptors // 4, 8))
        self._root = root
        self._handles: dict[int, Handle] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._uid, self._gid = os.geteuid(), os.getegid()

    def close(self) -> None:
        """Close everything; nothing may be in work."""
        self.clear()
        self.inodes.close()

    def clear(self) -> None:
        """A guest begins anew: what the one before had open is closed."""
        for number in list(self._handles):
            self.release(number)
        self.inodes.clear()

    # Owners: root shows what there is; anybody else is root to the guest, as in a user namespace of one's own.

    def owner(self, found: os.stat_result) -> tuple[int, int]:
        """The user and group the guest sees."""
        if not self._uid:
            return found.st_uid, found.st_gid
        return (0 if found.st_uid == self._uid else _NOBODY), (0 if found.st_gid == self._gid else _NOBODY)

    def _host_ids(self, uid: int | None, gid: int | None) -> tuple[int, int]:
        """For chown; -1 leaves as it is. Raises OSError (EPERM) for who does not exist here."""
        if not self._uid:
            return -1 if uid is None else uid, -1 if gid is None else gid
        if uid not in (None, 0) or gid not in (None, 0):
            raise _error(errno.EPERM)
        return -1 if uid is None else self._uid, -1 if gid is None else self._gid

    # Looking.

    def lookup(self, parent: int, name: str) -> tuple[int, os.stat_result]:
        """The node called ``name``, remembered once more, and what it is."""
        _check_name(name)
        with self.inodes.hold(parent) as directory:
            return self._found(os.open(name, _LOOK, dir_fd=directory), parent, name)

    def lookup_now(self, parent: int, name: str) -> tuple[int, os.stat_result] | None:
        """The same if it takes no look at the disk, else None."""
        _check_name(name)
        held = self.inodes.hold_now(parent)
        if held is None:
            return None
        with held as directory:
            try:
                fd = syscalls.open_cached(directory, name)
            except BlockingIOError:
                return None
            return self._found(fd, parent, name)

    def _found(self, fd: int, parent: int, name: str) -> tuple[int, os.stat_result]:
        try:
            found = os.fstat(fd)
        except BaseException:
            os.close(fd)
            raise
        return self.inodes.remember(fd, found, parent, name), found

    def getattr(self, nodeid: int, handle: int | None = None) -> os.stat_result:
        """What the node, or the file open as ``handle``, is."""
        if handle is not None:
            with self._use(handle) as file:
                return os.fstat(file.fd)
        with self.inodes.hold(nodeid) as fd:
            return os.fstat(fd)

    def getattr_now(self, nodeid: int) -> os.stat_result | None:
        """The same if it takes no look at the disk, else None."""
        held = self.inodes.hold_now(nodeid)
        if held is None:
            return None
        with held as fd:
            return os.fstat(fd)

    def readlink(self, nodeid: int) -> bytes:
        """Where a symbolic link points."""
        with self.inodes.hold(nodeid) as fd:
            return os.fsencode(os.readlink("", dir_fd=fd))

    def statvfs(self, nodeid: int) -> os.statvfs_result:
        """What there is of room."""
        with self.inodes.hold(nodeid) as fd:
            return os.statvfs(fd)

    def access(self, nodeid: int, mask: int) -> None:
        """Whether we may read (4), write (2), execute (1)."""
        if mask & os.W_OK and self.read_only:
            raise _error(errno.EROFS)
        with self.inodes.hold(nodeid) as fd:
            if not os.access(_through(fd), mask & 7, effective_ids=os.access in os.supports_effective_ids):
                raise _error(errno.EACCES)

    # Open files.

    def open(self, nodeid: int, flags: int, drop_suid: bool = False) -> int:
        """A handle for a regular file."""
        self._check_open(flags)
        if self.inodes.kind(nodeid) != stat.S_IFREG:
            raise _error(errno.ENXIO if self.inodes.kind(nodeid) != stat.S_IFDIR else errno.EISDIR)
        with self.inodes.hold(nodeid) as fd:
            file = os.open(_through(fd), flags & _OPEN_FLAGS | _OPEN_ALWAYS)
        if drop_suid and flags & os.O_TRUNC:
            _drop_suid(file)
        return self._add(file, nodeid, flags & _OPEN_FLAGS, False)

    def open_now(self, nodeid: int, flags: int) -> int | None:
        """The same if it takes no look at the disk, else None: to be read, and known."""
        if flags & (os.O_ACCMODE | os.O_TRUNC) or self.inodes.kind(nodeid) != stat.S_IFREG:
            return None
        held = self.inodes.hold_now(nodeid)
        if held is None:
            return None
        with held as fd:
            return self._add(os.open(_through(fd), _OPEN_ALWAYS), nodeid, 0, False)

    def opendir(self, nodeid: int) -> int:
        """A handle for a directory."""
        with self.inodes.hold(nodeid) as fd:
            return self._add(os.open(".", os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd), nodeid, 0, True)

    def create(
        self, parent: int, name: str, flags: int, mode: int, uid: int, gid: int, drop_suid: bool
    ) -> tuple[int, os.stat_result, int]:
        """Make a regular file unless there is one (which is an error if ``flags`` has O_EXCL), and open it."""
        self._check_open(flags)
        self._check_change(name)
        with self.inodes.hold(parent) as directory:
            how = flags & _OPEN_FLAGS | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | _OPEN_ALWAYS
            try:
                file = os.open(name, how, mode & 0o7777, dir_fd=directory)
            except FileExistsError:
                if flags & os.O_EXCL:
                    raise
                nodeid, found = self.lookup(parent, name)
                try:
                    return nodeid, found, self.open(nodeid, flags, drop_suid)
                except BaseException:
                    self.inodes.forget(nodeid, 1)
                    raise
            try:
                found = self._own(directory, file, mode, uid, gid)
                nodeid = self.inodes.remember(os.open(_through(file), O_PATH | os.O_CLOEXEC), found, parent, name)
            except BaseException:
                os.close(file)
                raise
        try:
            return nodeid, found, self._add(file, nodeid, flags & _OPEN_FLAGS, False)
        except BaseException:
            self.inodes.forget(nodeid, 1)
            raise

    def release(self, handle: int) -> None:
        """Close a handle; no error where there is none."""
        close = -1
        with self._lock:
            file = self._handles.pop(handle, None)
            if file is not None:
                file.gone = True
                if not file.users:
                    close, file.fd = file.fd, -1
        if close >= 0:
            os.close(close)

    def read(self, handle: int, offset: int, views: list[memoryview]) -> int:
        """Fill ``views`` from ``offset``; how many bytes there were."""
        done = 0
        with self._use(handle) as file:
            while views:
                got = os.preadv(file.fd, views, _offset(offset + done))
                done += got
                if not got:
                    break
                views = split(views, got)[1]
        return done

    def read_now(self, handle: int, offset: int, views: list[memoryview]) -> int | None:
        """The same of what is in the page cache; None where that is not all."""
        if not _NOWAIT:
            return None
        with self._use(handle) as file:
            try:
                got = os.preadv(file.fd, views, _offset(offset), _NOWAIT)
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EOPNOTSUPP):
                    return None
                raise
            if got < sum(map(len, views)) and offset + got < os.fstat(file.fd).st_size:
                return None
            return got

    def write(self, handle: int, offset: int, views: list[memoryview], drop_suid: bool = False) -> int:
        """Store ``views`` at ``offset`` (at the end, if opened so); how many bytes it took."""
        done = 0
        with self._use(handle, changing=True) as file:
            if drop_suid:
                _drop_suid(file.fd)
            while views:
                try:
                    put = os.pwritev(file.fd, views, _offset(offset + done))
                except OSError:
                    if done:
                        break
                    raise
                done += put
                views = split(views, put)[1]
        return done

    def entries(self, handle: int, offset: int, size: int) -> Iterator[tuple[int, int, int, str]]:
        """A directory's entries from ``offset`` on, some: inode number, next offset, type, name."""
        with self._use(handle) as file:
            if not file.directory:
                raise _error(errno.ENOTDIR)
            with file.lock:
                found = list(syscalls.read_directory(file.fd, _offset(offset), max(min(size, 1 << 16), 512)))
            device = os.fstat(file.fd).st_dev
        return ((self.inodes.number(device, ino), following, kind, name) for ino, following, kind, name in found)

    def fsync(self, handle: int, data_only: bool) -> None:
        """Onto the disk with it."""
        with self._use(handle) as file:
            (os.fdatasync if data_only else os.fsync)(file.fd)

    def sync(self) -> None:
        """Everything of the file system onto the disk."""
        if not self.read_only:
            syscalls.sync_file_system(self._root)

    def lseek(self, handle: int, offset: int, whence: int) -> int:
        """The next data (SEEK_DATA) or hole (SEEK_HOLE)."""
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise _error(errno.EINVAL)
        with self._use(handle) as file:
            if file.directory:
                raise _error(errno.EINVAL)
            return os.lseek(file.fd, _offset(offset), whence)

    def allocate(self, handle: int, mode: int, offset: int, length: int) -> None:
        """fallocate(2)."""
        with self._use(handle, changing=True) as file:
            syscalls.allocate(file.fd, mode & 0x7FFF_FFFF, _offset(offset), _offset(length))

    def copy(self, source: int, offset: int, target: int, target_offset: int, length: int) -> int:
        """Copy between two open files, on the host; how many bytes, which may be fewer."""
        length = min(length, _COPY_MAX)
        with self._use(source) as file, self._use(target, changing=True) as into:
            return os.copy_file_range(file.fd, into.fd, length, _offset(offset), _offset(target_offset))

    # Changing.

    def setattr(self, nodeid: int, change: Change, handle: int | None = None) -> os.stat_result:
        """Set what ``change`` says, in an order in which nothing undoes another."""
        if self.read_only:
            raise _error(errno.EROFS)
        with self.inodes.hold(nodeid) as fd:
            path = _through(fd)
            if change.uid is not None or change.gid is not None:
                os.chown(path, *self._host_ids(change.uid, change.gid))
            if change.mode is not None:
                if self.inodes.kind(nodeid) == stat.S_IFLNK:
                    raise _error(errno.EOPNOTSUPP)
                os.chmod(path, change.mode & 0o7777)
            if change.size is not None:
                self._truncate(nodeid, path, _offset(change.size), handle, change.drop_suid)
            if change.atime is not None or change.mtime is not None:
                omit = (0, syscalls.UTIME_OMIT)
                syscalls.set_times(path, change.atime or omit, change.mtime or omit)
            return os.fstat(fd)

    def _truncate(self, nodeid: int, path: str, size: int, handle: int | None, drop_suid: bool) -> None:
        if self.inodes.kind(nodeid) != stat.S_IFREG:
            raise _error(errno.EINVAL)
        if handle is not None:
            with self._use(handle, changing=True) as file:
                os.ftruncate(file.fd, size)
        else:
            os.truncate(path, size)
        if drop_suid:
            _drop_suid(path)

    def mkdir(self, parent: int, name: str, mode: int, uid: int, gid: int) -> tuple[int, os.stat_result]:
        """A directory."""
        return self._make(parent, name, mode, uid, gid, lambda at: os.mkdir(name, mode & 0o7777, dir_fd=at))

    def mknod(self, parent: int, name: str, mode: int, uid: int, gid: int) -> tuple[int, os.stat_result]:
        """A regular file, a FIFO or a socket; a device would be one of the host's."""
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK):
            raise _error(errno.EPERM)
        return self._make(parent, name, mode, uid, gid, lambda at: os.mknod(name, mode, 0, dir_fd=at))

    def symlink(self, parent: int, name: str, target: str, uid: int, gid: int) -> tuple[int, os.stat_result]:
        """A symbolic link to ``target``, which means something in the guest only."""
        if len(os.fsencode(target)) >= _LINK_MAX:
            raise _error(errno.ENAMETOOLONG)
        return self._make(parent, name, None, uid, gid, lambda at: os.symlink(target, name, dir_fd=at))

    def link(self, nodeid: int, parent: int, name: str) -> tuple[int, os.stat_result]:
        """One more name for the node."""
        self._check_change(name)
        with self.inodes.hold(nodeid) as fd, self.inodes.hold(parent) as directory:
            os.link(_through(fd), name, dst_dir_fd=directory, follow_symlinks=True)
            return self._found(os.open(name, _LOOK, dir_fd=directory), parent, name)

    def unlink(self, parent: int, name: str) -> None:
        """Remove a name that is no directory's."""
        self._remove(parent, name, lambda at: os.unlink(name, dir_fd=at))

    def rmdir(self, parent: int, name: str) -> None:
        """Remove an empty directory."""
        self._remove(parent, name, lambda at: os.rmdir(name, dir_fd=at))

    def rename(self, parent: int, name: str, new_parent: int, new_name: str, flags: int) -> None:
        """Give another name, in place of what has it, by ``flags`` NOREPLACE or EXCHANGE."""
        self._check_change(name)
        self._check_change(new_name)
        if flags & ~(syscalls.RENAME_NOREPLACE | syscalls.RENAME_EXCHANGE):
            raise _error(errno.EINVAL)
        with self.inodes.hold(parent) as source, self.inodes.hold(new_parent) as target:
            moved = self.inodes.before_removal(source, name)
            replaced = self.inodes.before_removal(target, new_name)
            try:
                syscalls.rename(source, name, target, new_name, flags)
            except BaseException:
                self.inodes.renamed(moved, parent, name)
                self.inodes.renamed(replaced, new_parent, new_name)
                raise
            if replaced is not moved:
                self.inodes.renamed(moved, new_parent, new_name)
                if flags & syscalls.RENAME_EXCHANGE:
                    self.inodes.renamed(replaced, parent, name)
            else:  # two names of one file: nothing has happened (rename(2))
                self.inodes.renamed(moved, parent, name)

    # Extended attributes: the user's own. Those of other namespaces are the host's business.

    def getxattr(self, nodeid: int, name: str) -> bytes:
        """The value of an attribute."""
        if not name.startswith("user."):
            raise _error(errno.EOPNOTSUPP)
        with self.inodes.hold(nodeid) as fd:
            return os.getxattr(_through(fd), name)

    def setxattr(self, nodeid: int, name: str, value: bytes, flags: int) -> None:
        """Set one; ``flags`` as of setxattr(2)."""
        self._check_xattr(name)
        if len(value) > _XATTR_MAX:
            raise _error(errno.E2BIG)
        with self.inodes.hold(nodeid) as fd:
            os.setxattr(_through(fd), name, value, flags & 3)

    def listxattr(self, nodeid: int) -> list[str]:
        """The names."""
        with self.inodes.hold(nodeid) as fd:
            return [name for name in os.listxattr(_through(fd)) if name.startswith("user.")]

    def removexattr(self, nodeid: int, name: str) -> None:
        """Remove one."""
        self._check_xattr(name)
        with self.inodes.hold(nodeid) as fd:
            os.removexattr(_through(fd), name)

    # For a snapshot.

    def save(self) -> FolderState:
        """What the guest knows of the folder."""
        with self._lock:
            handles = tuple((n, h.nodeid, h.flags, h.directory) for n, h in self._handles.items())
        return FolderState(self.inodes.save(), handles)

    def restore(self, state: FolderState) -> None:
        """Back to what :meth:`save` gave. Files are opened when they are used: one whose name is gone is stale."""
        self.clear()
        self.inodes.restore(state.nodes)
        with self._lock:
            for number, nodeid, flags, directory in state.handles:
                self._handles[number] = Handle(-1, nodeid, flags & ~os.O_TRUNC, directory, threading.Lock())
            self._numbers = itertools.count(max(self._handles, default=0) + 1)

    # Inside.

    @contextmanager
    def _use(self, handle: int, changing: bool = False) -> Iterator[Handle]:
        if changing and self.read_only:
            raise _error(errno.EROFS)
        with self._lock:
            file = self._handles.get(handle)
            if file is None:
                raise _error(errno.EBADF)
            file.users += 1
        try:
            if file.fd < 0:
                self._open_again(file)
            yield file
        finally:
            close = -1
            with self._lock:
                file.users -= 1
                if file.gone and not file.users:
                    close, file.fd = file.fd, -1
            if close >= 0:
                os.close(close)

    def _open_again(self, file: Handle) -> None:
        """A handle of a snapshot."""
        with file.lock, self.inodes.hold(file.nodeid) as fd:
            if file.fd < 0:
                if not file.directory and self.inodes.kind(file.nodeid) != stat.S_IFREG:
                    raise _error(errno.ESTALE)
                how = os.O_DIRECTORY if file.directory else file.flags
                file.fd = os.open(_through(fd), how | _OPEN_ALWAYS)

    def _add(self, fd: int, nodeid: int, flags: int, directory: bool) -> int:
        with self._lock:
            full = len(self._handles) >= self._handles_max
            if not full:
                number = next(self._numbers)
                self._handles[number] = Handle(fd, nodeid, flags, directory, threading.Lock())
        if full:
            os.close(fd)
            raise _error(errno.ENFILE)
        return number

    def _check_open(self, flags: int) -> None:
        if self.read_only and flags & (os.O_ACCMODE | os.O_TRUNC):
            raise _error(errno.EROFS)

    def _check_change(self, name: str) -> None:
        if self.read_only:
            raise _error(errno.EROFS)
        _check_name(name)

    def _check_xattr(self, name: str) -> None:
        if self.read_only:
            raise _error(errno.EROFS)
        if not name.startswith("user."):
            raise _error(errno.EOPNOTSUPP)

    def _make(
        self, parent: int, name: str, mode: int | None, uid: int, gid: int, make: Callable[[int], None]
    ) -> tuple[int, os.stat_result]:
        self._check_change(name)
        with self.inodes.hold(parent) as directory:
            make(directory)
            fd = os.open(name, _LOOK, dir_fd=directory)
            try:
                found = self._own(directory, fd, mode, uid, gid)
            except BaseException:
                os.close(fd)
                raise
            return self.inodes.remember(fd, found, parent, name), found

    def _own(self, directory: int, fd: int, mode: int | None, uid: int, gid: int) -> os.stat_result:
        """Give what has just been made to who asked for it, and the mode bits that the host's umask took."""
        found = before = os.fstat(fd)
        if not self._uid and not found.st_uid and (uid, gid) != (found.st_uid, found.st_gid):
            inherited = os.fstat(directory).st_mode & stat.S_ISGID
            os.chown(_through(fd), uid, -1 if inherited else gid)
            found = os.fstat(fd)
        missing = 0 if mode is None else mode & 0o7777 & ~found.st_mode
        if missing:
            os.chmod(_through(fd), stat.S_IMODE(found.st_mode) | missing)
        return os.fstat(fd) if missing or found is not before else before

    def _remove(self, parent: int, name: str, remove: Callable[[int], None]) -> None:
        self._check_change(name)
        with self.inodes.hold(parent) as directory:
            node = self.inodes.before_removal(directory, name)
            try:
                remove(directory)
            except BaseException:
                self.inodes.renamed(node, parent, name)
                raise


def open_folder(path: Path, read_only: bool, descriptors: int) -> Folder:
    """The folder at ``path``. Raises ConfigError, also where the host cannot share any."""
    if not syscalls.is_supported():
        raise ConfigError("folders can be shared from Linux on x86-64 and arm64 only, with /proc mounted")
    return Folder(path, read_only, descriptors)


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def _through(fd: int) -> str:
    """A path for the file behind a descriptor, which nobody can redirect."""
    return f"/proc/self/fd/{fd}"


def _offset(value: int) -> int:
    if value > _OFFSET_MAX:
        raise _error(errno.EINVAL)
    return value


def _check_name(name: str) -> None:
    """One component, and not one that leads up. Raises OSError."""
    if not name or name in (".", "..") or "/" in name or "\0" in name:
        raise _error(errno.EINVAL)
    if len(os.fsencode(name)) > NAME_MAX:
        raise _error(errno.ENAMETOOLONG)


def _drop_suid(file: int | str) -> None:
    """What a write by somebody else does to a program's set-user-ID bit, and to its set-group-ID bit."""
    mode = stat.S_IMODE(os.stat(file).st_mode)
    kept = mode & ~stat.S_ISUID
    if mode & stat.S_IXGRP:
        kept &= ~stat.S_ISGID
    if kept != mode:
        os.chmod(file, kept)
