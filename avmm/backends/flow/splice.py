"""A guest's connection and a socket of the host's, joined: what comes out of one goes into the other.

Neither side is read unless the other one can take it: from the socket straight into the buffer of a frame, from a
frame straight into the socket. Nothing else is kept.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

from avmm.backends.flow.endpoint import Flow

#: Where a socket is to be connected to: an address family, and an address of it.
Place: TypeAlias = tuple[int, Any]

#: Pieces read from a socket before others have their turn.
_TURN: Final = 8
_RESET: Final = struct.pack("ii", 1, 0)  # struct linger: closing sends RST


class Splice:
    """An endpoint (:class:`avmm.backends.flow.endpoint.Endpoint`) over a socket that does not block; owns it.

    ``pump`` is called when there may be something to send that nothing from the guest has caused.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, pump: Callable[[], None], connection: Flow, sock: socket.socket
    ) -> None:
        self._loop = loop
        self._pump = pump
        self._connection = connection
        self._socket: socket.socket | None = sock
        self._fd = sock.fileno()
        self._reading = self._writing = False
        self._ended = False

    # From the guest.

    def opened(self) -> None:
        """See :class:`Endpoint`."""
        self._read()

    def received(self, data: memoryview) -> int:
        """See :class:`Endpoint`."""
        assert self._socket is not None
        try:
            sent = self._socket.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._connection.abort()
            return len(data)
        if sent < len(data) and not self._writing:
            self._writing = True
            self._loop.add_writer(self._fd, self._writable)
        return sent

    def ended(self) -> None:
        """See :class:`Endpoint`."""
        if self._socket is not None:
            try:
                self._socket.shutdown(socket.SHUT_WR)
            except OSError:
                self._connection.abort()

    def closed(self, reset: bool) -> None:
        """See :class:`Endpoint`."""
        sock, self._socket = self._socket, None
        if sock is not None:
            self._stop_reading()
            self._stop_writing()
            if reset:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            sock.close()

    # From the host.

    def room(self) -> None:
        """See :class:`Endpoint`."""
        self._read()

    def _writable(self) -> None:
        assert self._socket is not None
        waiting = self._connection.waiting
        try:
            sent = self._socket.send(waiting) if waiting else 0
        except BlockingIOError:
            return
        except OSError:
            self._connection.abort()
        else:
            if sent == len(waiting):
                self._stop_writing()
            self._connection.taken(sent, self._loop.time())
        self._pump()

    def _readable(self) -> None:
        self._read()
        self._pump()

    def _read(self) -> None:
        connection, now = self._connection, self._loop.time()
        for _ in range(_TURN):
            sock = self._socket
            if sock is None or self._ended:
                return
            room = connection.room()
            if not room:
                self._stop_reading()
                connection.want_room(now)
                return
            head = connection.head
            buffer = bytearray(head + min(room, connection.largest))
            try:
                with memoryview(buffer) as view:
                    count = sock.recv_into(view[head:])
            except BlockingIOError:
                break
            except OSError:
                connection.abort()
                return
            if not count:
                self._ended = True
                self._stop_reading()
                connection.shutdown(now)
                return
            short = head + count < len(buffer)
            del buffer[head + count :]
            connection.send(buffer, now)
            if short:
                break
        if not self._reading and self._socket is not None:
            self._reading = True
            self._loop.add_reader(self._fd, self._readable)

    def _stop_reading(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._fd)

    def _stop_writing(self) -> None:
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self._fd)


class Dialling:
    """A connection a guest has asked for, while the host connects to the first of ``places`` that answers.

    The guest hears of nothing before: it is refused what the host is refused.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        pump: Callable[[], None],
        connection: Flow,
        places: Sequence[Place],
    ) -> None:
        self._loop = loop
        self._pump = pump
        self._connection = connection
        self._places = list(places)
        self._socket: socket.socket | None = None
        connection.endpoint = self
        self._next()

    def _next(self) -> None:
        while self._places:
            family, place = self._places.pop(0)
            try:
                sock = socket.socket(family, socket.SOCK_STREAM)
            except OSError:
                break  # no more files, or no such family
            sock.setblocking(False)
            code = sock.connect_ex(place)
            if code == 0:
                self._succeed(sock)
                return
            if code == errno.EINPROGRESS:
                self._socket = sock
                self._loop.add_writer(sock.fileno(), self._decided)
                return
            sock.close()
        self._connection.endpoint = None
        self._connection.refuse()

    def _decided(self) -> None:
        sock, self._socket = self._socket, None
        assert sock is not None
        self._loop.remove_writer(sock.fileno())
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            sock.close()
            self._next()
        else:
            self._succeed(sock)
        self._pump()

    def _succeed(self, sock: socket.socket) -> None:
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection.accept(Splice(self._loop, self._pump, self._connection, sock), self._loop.time())

    def closed(self, reset: bool) -> None:
        """The guest has given up."""
        sock, self._socket = self._socket, None
        if sock is not None:
            self._loop.remove_writer(sock.fileno())
            sock.close()

    def opened(self) -> None:
        """Not before it is accepted."""

    def received(self, data: memoryview) -> int:
        """Nor this."""
        return 0

    def ended(self) -> None:
        """Nor this."""

    def room(self) -> None:
        """Nor this."""
