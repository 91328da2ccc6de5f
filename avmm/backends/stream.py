"""Ethernet between processes: frames over a unix stream socket, each behind its length, as QEMU's ``-netdev stream``.

Whoever comes first to a path listens there, and is the switch that the others are plugged into; when it goes, one of
the others takes its place. Frames are complete on the socket: QEMU's end takes nothing unfinished.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import socket
import stat
import struct
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from avmm.backends.offload import finished
from avmm.backends.switch import Switch
from avmm.errors import ConfigError, HostError
from avmm.link import End, Frame, join
from avmm.log import log

_LENGTH: Final = struct.Struct(">I")
#: QEMU's largest frame (NET_BUFSIZE); a peer that says more is not speaking our language.
FRAME_MAX: Final = 4096 + 65536
_RECEIVE: Final = 1 << 18
#: Bytes that wait for the socket, at most: then the sender waits.
_BACKLOG: Final = 1 << 18
_SUN_PATH_MAX: Final = 107


class Deframer:
    """Cuts a stream of bytes into frames: no I/O. Raises ValueError where there can be none."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes | memoryview) -> list[bytes]:
        """Frames that are complete with ``data``."""
        buffer = self._buffer
        buffer += data
        frames = []
        at = 0
        while len(buffer) - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(buffer, at)
            if not 14 <= length <= FRAME_MAX:
                raise ValueError(f"a frame of {length} bytes")
            end = at + _LENGTH.size + length
            if end > len(buffer):
                break
            frames.append(bytes(memoryview(buffer)[at + _LENGTH.size : end]))
            at = end
        del buffer[:at]
        return frames


class StreamPort:
    """A connected socket as one end of a link. ``gone(port)`` is called when the other side has left."""

    def __init__(self, connection: socket.socket, gone: Callable[[StreamPort], None]) -> None:
        self.end = End(self._receive, offload=True)
        self.end.on_room = self._on_room
        self._socket = connection
        self._gone = gone
        self._loop: asyncio.AbstractEventLoop | None = None
        self._deframer = Deframer()
        self._arrived: deque[Frame] = deque()  # what the other end of the link has no room for
        self._leaving = bytearray()
        self._refused = False
        connection.setblocking(False)

    def start(self) -> None:
        """Move frames from now on."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket, self._readable)
        if self._leaving:
            self._loop.add_writer(self._socket, self._writable)

    def stop(self) -> None:
        """Let frames wait."""
        if self._loop is not None:
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
            self._loop = None

    def close(self) -> None:
        """Hang up; stopped."""
        self._socket.close()

    def _receive(self, frame: Frame) -> bool:
        if len(self._leaving) >= _BACKLOG:
            self._refused = True
            return False
        pieces = [piece for each in finished(frame) for piece in (_LENGTH.pack(len(each.data)), each.data)]
        sent = 0
        if not self._leaving:
            with contextlib.suppress(OSError):  # full, or gone: which the reader will notice
                sent = self._socket.sendmsg(pieces)
        if sent < sum(map(len, pieces)):
            if not self._leaving and self._loop is not None:
                self._loop.add_writer(self._socket, self._writable)
            self._leaving += b"".join(pieces)[sent:]
        return True

    def _writable(self) -> None:
        assert self._loop is not None
        try:
            del self._leaving[: self._socket.send(self._leaving)]
        except BlockingIOError:
            return
        except OSError:
            self._leaving.clear()
        if not self._leaving:
            self._loop.remove_writer(self._socket)
        if self._refused and len(self._leaving) < _BACKLOG:
            self._refused = False
            self.end.room()

    def _readable(self) -> None:
        try:
            data = self._socket.recv(_RECEIVE)
            frames = self._deframer.feed(data)
        except BlockingIOError:
            return
        except (OSError, ValueError) as error:
            log.warning("stream.failed", error=str(error))
            data = b""
        if not data:
            self.stop()
            self._gone(self)
            return
        self._arrived.extend(map(Frame, frames))
        self._pass_on()

    def _on_room(self) -> None:
        if self._arrived:
            self._pass_on()
            if not self._arrived and self._loop is not None:
                self._loop.add_reader(self._socket, self._readable)

    def _pass_on(self) -> None:
        while self._arrived:
            if not self.end.send(self._arrived[0]):
                if self._loop is not None:
                    self._loop.remove_reader(self._socket)
                return
            self._arrived.popleft()


class Listener:
    """Plugs whoever connects to the listening socket into ``switch``."""

    def __init__(self, switch: Switch, listening: socket.socket) -> None:
        self._switch = switch
        self._socket = listening
        self._ports: set[StreamPort] = set()
        self._running = False

    def start(self) -> None:
        """Move frames from now on."""
        self._running = True
        asyncio.get_running_loop().add_reader(self._socket, self._accept)
        for port in self._ports:
            port.start()

    def stop(self) -> None:
        """Let frames, and who wants to connect, wait."""
        if self._running:
            self._running = False
            asyncio.get_running_loop().remove_reader(self._socket)
            for port in self._ports:
                port.stop()

    def close(self) -> None:
        """Hang up on everybody, and remove the socket; stopped."""
        with contextlib.suppress(OSError):
            os.unlink(self._socket.getsockname())
        self._socket.close()
        for port in list(self._ports):
            self._drop(port)

    def _accept(self) -> None:
        try:
            connection, _ = self._socket.accept()
        except OSError as error:
            log.warning("stream.failed", error=str(error))
            return
        port = StreamPort(connection, self._drop)
        self._ports.add(port)
        join(port.end, self._switch.plug(port))
        port.start()

    def _drop(self, port: StreamPort) -> None:
        self._ports.discard(port)
        port.close()
        if port.end.peer is not None:
            self._switch.unplug(port.end.peer)


class Stream:
    """``--net socket=PATH``: ``end`` is this VM's place on the network that meets at ``path``. Blocks. Raises
    HostError, ConfigError."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._switch = Switch()
        self.end = self._switch.plug(self)
        self._lost = asyncio.Event()
        self._used: Listener | StreamPort = self._open()

    async def run(self) -> None:
        """Move frames, until cancelled; meanwhile they wait, and nobody is hung up on."""
        while True:
            self._used.start()
            try:
                await self._lost.wait()
            finally:
                self._used.stop()
            self._lost.clear()
            try:
                self._used = self._open()
            except HostError as error:
                log.warning("stream.failed", error=str(error))
                await asyncio.get_running_loop().create_future()  # nobody will ever come

    def close(self) -> None:
        """Hang up: when :meth:`run` has ended."""
        self._used.close()

    def _open(self) -> Listener | StreamPort:
        made, listens = connect_or_listen(self._path)
        if listens:
            return Listener(self._switch, made)
        port = StreamPort(made, self._gone)
        join(port.end, self._switch.plug(port))
        return port

    def _gone(self, port: StreamPort) -> None:
        port.close()
        if port.end.peer is not None:
            self._switch.unplug(port.end.peer)
        self._lost.set()


def connect_or_listen(path: Path) -> tuple[socket.socket, bool]:
    """A socket connected to whoever listens at ``path``, or one that listens there; whether it listens. Raises
    HostError."""
    if len(os.fsencode(path)) > _SUN_PATH_MAX:
        raise ConfigError(f"{path} is too long for a socket: {_SUN_PATH_MAX} bytes at most")
    with _alone(path.parent):
        for _ in range(10):
            for attempt in (_connect, _listen):
                made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                try:
                    attempt(made, path)
                except OSError as error:
                    made.close()
                    if error.errno not in (errno.ENOENT, errno.ECONNREFUSED, errno.EADDRINUSE):
                        raise HostError(f"cannot use {path} as a socket: {error.strerror}") from error
                    if error.errno == errno.ENOENT and attempt is _listen:
                        raise HostError(f"cannot make the socket {path}: {error.strerror}") from error
                    if error.errno == errno.ECONNREFUSED:
                        _remove_stale(path)
                else:
                    return made, attempt is _listen
    raise HostError(f"cannot use {path} as a socket: others make and remove it all the time")


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One at a time in ``folder``: of two that find a stale socket, the second would remove what the first has made in
    its place; and a socket that is bound and does not listen yet looks stale."""
    fd = -1
    with contextlib.suppress(OSError):  # what is wrong with the folder is said by who uses it
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if fd >= 0:
            os.close(fd)


def _connect(made: socket.socket, path: Path) -> None:
    made.connect(os.fspath(path))


def _listen(made: socket.socket, path: Path) -> None:
    made.bind(os.fspath(path))
    made.listen()


def _remove_stale(path: Path) -> None:
    """Of a process that was killed."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise HostError(f"{path} is not a socket")
        path.unlink()
    except FileNotFoundError:
        pass
