"""The files a guest knows of: its node IDs, and for each an O_PATH descriptor that cannot be made to mean another file.

A node lives from the LOOKUP that finds it to the FORGET that ends it, and a guest that caches a large tree keeps that
many. So descriptors are fewer than nodes: the ones longest unused are closed, and opened again by the node's parent and
name, one component at a time and never through a symbolic link; what is found there must be the same file, else the
node is stale (ESTALE). Safe to call from several threads.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections import OrderedDict
from dataclasses import dataclass
from itertools import islice
from typing import Final

from avmm.backends.share.syscalls import O_PATH

ROOT: Final = 1  # FUSE_ROOT_ID

#: Nodes at a time: a guest that never forgets gets ENFILE.
NODES_MAX: Final = 1 << 20
#: A path that is deeper is a circle, made of names that have changed since.
_DEPTH_MAX: Final = 4096

_FOUND: Final = O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(slots=True, eq=False)
class Node:
    """One file. ``fd`` is -1 while closed; ``users`` are calls at work with it, which keep it open.

    ``pinned``: its name is gone, so that the descriptor is all there is of it.
    """

    nodeid: int
    key: tuple[int, int]  # device, inode
    kind: int  # the type bits of its mode
    fd: int
    parent: int
    name: str
    lookups: int
    users: int = 0
    pinned: bool = False
    gone: bool = False


class Hold:
    """A node in use: ``with table.hold(nodeid) as fd``."""

    __slots__ = ("_table", "node")

    def __init__(self, table: Inodes, node: Node) -> None:
        self._table = table
        self.node = node

    def __enter__(self) -> int:
        return self.node.fd

    def __exit__(self, *_: object) -> None:
        self._table.let_go(self.node)


class Inodes:
    """The nodes below the folder open as ``root`` (closed with this object), with about ``limit`` descriptors open."""

    def __init__(self, root: int, limit: int) -> None:
        self._lock = threading.Lock()
        self._reopening = threading.Lock()
        self._limit = limit
        found = os.fstat(root)
        key = (found.st_dev, found.st_ino)
        # The root's descriptor is not among those that may be closed.
        self._root = Node(ROOT, key, stat.S_IFDIR, root, 0, "", 1)
        self._nodes = {ROOT: self._root}
        self._by_key = {key: self._root}
        self._open: OrderedDict[int, Node] = OrderedDict()  # those that may be closed, the longest unused first
        self._pinned = 0
        self._next = ROOT + 1
        self._devices = {found.st_dev: 0}

    def __len__(self) -> int:
        return len(self._nodes)

    @property
    def descriptors(self) -> int:
        """How many are open, the root's not counted."""
        return len(self._open) + self._pinned

    def number(self, device: int, ino: int) -> int:
        """The inode number the guest sees: the host's, made different for each file system mounted below the folder."""
        index = self._devices.get(device)
        if index is None:
            with self._lock:
                index = self._devices.setdefault(device, len(self._devices))
        return (ino ^ index << 48) & 0xFFFF_FFFF_FFFF_FFFF

    def hold(self, nodeid: int) -> Hold:
        """The node, its descriptor open. Raises OSError: ESTALE when there is none, or it is not where it was."""
        with self._lock:
            node = self._get(nodeid)
            node.users += 1
            if node.fd >= 0:
                if node.nodeid in self._open:
                    self._open.move_to_end(node.nodeid)
                return Hold(self, node)
        try:
            with self._reopening:
                self._reopen(node)
        except BaseException:
            self.let_go(node)
            raise
        return Hold(self, node)

    def hold_now(self, nodeid: int) -> Hold | None:
        """The same where that takes no look at the disk, else None."""
        with self._lock:
            node = self._get(nodeid)
            if node.fd < 0:
                return None
            node.users += 1
            if node.nodeid in self._open:
                self._open.move_to_end(node.nodeid)
            return Hold(self, node)

    def kind(self, nodeid: int) -> int:
        """The type bits of the node's mode. Raises OSError (ESTALE)."""
        with self._lock:
            return self._get(nodeid).kind

    def let_go(self, node: Node) -> None:
        """The end of :meth:`hold`."""
        close = -1
        with self._lock:
            node.users -= 1
            if node.gone and not node.users:
                close, node.fd = node.fd, -1
        if close >= 0:
            os.close(close)

    def remember(self, fd: int, found: os.stat_result, parent: int, name: str) -> int:
        """The node of what a lookup has found, ``fd`` being its descriptor, which is ours from now on: its ID."""
        key = (found.st_dev, found.st_ino)
        kind = stat.S_IFMT(found.st_mode)
        spare = [fd]
        try:
            with self._lock:
                node = self._by_key.get(key)
                if node is not None and node.kind != kind:
                    node = None  # its file is gone while it was closed, and the number is another's now
                if node is None:
                    if len(self._nodes) >= NODES_MAX:
                        raise OSError(errno.ENFILE, os.strerror(errno.ENFILE))
                    node = Node(self._next, key, kind, -1, parent, name, 0)
                    self._next += 1
                    self._nodes[node.nodeid] = node
                    self._by_key[key] = node
                node.lookups += 1
                if node is not self._root:
                    node.parent, node.name = parent, name
                    if node.fd < 0:
                        node.fd = spare.pop()
                    self._unpin(node)
                    spare += self._shrink()
                return node.nodeid
        finally:
            for each in spare:
                os.close(each)

    def forget(self, nodeid: int, count: int) -> None:
        """Undo ``count`` lookups."""
        close = -1
        with self._lock:
            node = self._nodes.get(nodeid)
            if node is None or node is self._root:
                return
            node.lookups -= min(count, node.lookups)
            if not node.lookups:
                close = self._remove(node)
        if close >= 0:
            os.close(close)

    def forgotten_at_once(self, nodeid: int) -> bool:
        """Whether :meth:`forget` frees no storage: the last descriptor of a file without a name may take a while."""
        with self._lock:
            node = self._nodes.get(nodeid)
            return node is None or not node.pinned

    def before_removal(self, directory: int, name: str) -> Node | None:
        """``name`` in ``directory`` (a descriptor) is about to go: keep the descriptor of the node that has it."""
        try:
            found = os.stat(name, dir_fd=directory, follow_symlinks=False)
        except OSError:
            return None
        with self._lock:
            node = self._by_key.get((found.st_dev, found.st_ino))
            if node is None or node is self._root or node.name != name:
                return None
        try:
            self.hold(node.nodeid).__exit__()
        except OSError:
            return None
        with self._lock:
            if node.nodeid in self._open and self._pinned < self._limit:
                del self._open[node.nodeid]
                node.pinned = True
                self._pinned += 1
        return node

    def renamed(self, node: Node | None, parent: int, name: str) -> None:
        """The node has this name now."""
        if node is None:
            return
        close = []
        with self._lock:
            node.parent, node.name = parent, name
            if node.fd >= 0 and not node.gone:
                self._unpin(node)
                close = self._shrink()
        for each in close:
            os.close(each)

    def clear(self) -> None:
        """Forget everything but the root: a guest begins anew."""
        with self._lock:
            close = [self._remove(node) for node in list(self._nodes.values()) if node is not self._root]
        for each in close:
            if each >= 0:
                os.close(each)

    def close(self) -> None:
        """Close everything; nothing may be in use."""
        self.clear()
        os.close(self._root.fd)

    def save(self) -> tuple[int, tuple[tuple[int, tuple[int, int], int, int, str, int], ...]]:
        """The next node ID, and each node but the root as plain data."""
        with self._lock:
            nodes = [node for node in self._nodes.values() if node is not self._root]
            return self._next, tuple((n.nodeid, n.key, n.kind, n.parent, n.name, n.lookups) for n in nodes)

    def restore(self, state: tuple[int, tuple[tuple[int, tuple[int, int], int, int, str, int], ...]]) -> None:
        """Back to what :meth:`save` gave: descriptors are opened when they are needed."""
        self.clear()
        with self._lock:
            self._next = state[0]
            for nodeid, key, kind, parent, name, lookups in state[1]:
                node = Node(nodeid, key, kind, -1, parent, name, lookups)
                self._nodes[nodeid] = node
                self._by_key[key] = node

    # With the lock held.

    def _get(self, nodeid: int) -> Node:
        node = self._nodes.get(nodeid)
        if node is None:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return node

    def _unpin(self, node: Node) -> None:
        if node.pinned:
            node.pinned = False
            self._pinned -= 1
        self._open[node.nodeid] = node
        self._open.move_to_end(node.nodeid)

    def _shrink(self) -> list[int]:
        """Descriptors to be closed, so that about ``limit`` stay open."""
        found = []
        for node in list(islice(self._open.values(), max(len(self._open) - self._limit, 0))):
            if not node.users:
                del self._open[node.nodeid]
                found.append(node.fd)
                node.fd = -1
        return found

    def _remove(self, node: Node) -> int:
        """Take the node out; its descriptor if it is to be closed now, else -1."""
        del self._nodes[node.nodeid]
        if self._by_key.get(node.key) is node:
            del self._by_key[node.key]
        self._open.pop(node.nodeid, None)
        if node.pinned:
            node.pinned = False
            self._pinned -= 1
        node.gone = True
        if node.users:
            return -1
        fd, node.fd = node.fd, -1
        return fd

    # Without it.

    def _reopen(self, node: Node) -> None:
        """Open the node by its parent and its name, and before it whichever of its ancestors is closed."""
        path = [node]
        with self._lock:
            while path[-1].fd < 0:
                path.append(self._get(path[-1].parent))
                if len(path) > _DEPTH_MAX:
                    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            for each in path:
                each.users += 1
        try:
            for above, each in zip(path[:0:-1], path[-2::-1], strict=True):
                self._open_below(above, each)
        finally:
            for each in path:
                self.let_go(each)

    def _open_below(self, parent: Node, node: Node) -> None:
        fd = os.open(node.name, _FOUND, dir_fd=parent.fd)
        found = os.fstat(fd)
        spare = [fd]
        try:
            if (found.st_dev, found.st_ino) != node.key or stat.S_IFMT(found.st_mode) != node.kind:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            with self._lock:
                if node.fd < 0:
                    node.fd = spare.pop()
                    if not node.gone:
                        self._unpin(node)
                        spare += self._shrink()
        finally:
            for each in spare:
                os.close(each)
