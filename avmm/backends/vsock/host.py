"""vsock on an event loop: Unix sockets of the host's, and asyncio streams of this program's, for a guest to talk to.

::

    vm.vsock.listen(1234, handler)                 # handler(reader, writer): the guest connects to CID 2, port 1234
    reader, writer = await vm.vsock.connect(5000)  # into the guest
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import random
import socket
from collections.abc import Mapping
from typing import Final

from avmm.backends.flow.splice import Dialling
from avmm.backends.flow.streams import Handler, Power, Streams, answer, open_streams, reached
from avmm.backends.vsock.protocol import Connection, Vsock
from avmm.errors import ConfigError

_EPHEMERAL: Final = range(1 << 30, 1 << 31)
_TRIES: Final = 1000


class VsockHost:
    """The host's end of a guest's vsock device. ``sockets``: which Unix socket a port of ours reaches.

    Made on any thread; everything else on the event loop.
    """

    def __init__(self, cid: int, sockets: Mapping[int, str] | None = None) -> None:
        self.core = Vsock(self, cid)
        self._sockets = dict(sockets or {})
        self._handlers: dict[int, Handler] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: asyncio.TaskGroup | None = None
        # From anywhere: a twin's guest still has the connections of its parent's.
        self._ports = itertools.count(random.SystemRandom().choice(_EPHEMERAL))
        self._power = Power()

    async def run(self) -> None:
        """Move bytes, until cancelled; then every connection is over."""
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as tasks:
            self._loop, self._tasks = loop, tasks
            self._power.on()
            try:
                await loop.create_future()
            finally:
                self._loop = self._tasks = None
                self._power.off()
                self.core.reset(gone=True)

    def gone(self) -> None:
        """The guest's machine has ended: nobody waits for it any more."""
        self._power.gone()

    def listen(self, port: int, handler: Handler) -> None:
        """``handler(reader, writer)``, as for :func:`asyncio.start_server`, answers guests that connect to CID 2,
        ``port``."""
        if not 0 <= port < 0xFFFFFFFF:
            raise ConfigError(f"a vsock port lies between 0 and {0xFFFFFFFE}, not at {port}")
        self._handlers[port] = handler

    def stop_listening(self, port: int) -> None:
        """Take no more connections to ``port``; those there are go on."""
        del self._handlers[port]

    async def connect(self, port: int, *, timeout: float | None = None) -> Streams:
        """(reader, writer) of a connection to the guest's ``port``.

        Raises ConnectionRefusedError when nobody listens there, WaitTimeout, GuestGone.
        """
        timeout = await self._power.wait(timeout)
        loop = asyncio.get_running_loop()
        connection = self._dial(port)
        reader, writer, transport, established = open_streams(
            loop, _nothing, connection, (connection.local, connection.remote)
        )
        connection.connect(transport)
        await reached(established, transport, port, timeout, lambda: self._loop is not None)
        return reader, writer

    def listen_as(self, other: VsockHost) -> None:
        """Answer as ``other`` does: for the twin of its guest."""
        self._handlers.update(other._handlers)

    def _dial(self, port: int) -> Connection:
        for number in itertools.islice(self._ports, _TRIES):
            with contextlib.suppress(OSError):
                return self.core.dial(_EPHEMERAL[number % len(_EPHEMERAL)], port)
        raise OSError(errno.EADDRNOTAVAIL, "no more connections to the guest can be made")

    def asked(self, connection: Connection) -> None:
        """See :class:`avmm.backends.vsock.protocol.Host`."""
        loop, tasks, port = self._loop, self._tasks, connection.local[1]
        handler = self._handlers.get(port)
        if loop is None or tasks is None:
            connection.refuse()
        elif handler is not None:
            reader, writer, transport, established = open_streams(
                loop, _nothing, connection, (connection.local, connection.remote)
            )
            connection.accept(transport, loop.time())
            tasks.create_task(answer(established, handler, reader, writer))
        elif port in self._sockets:
            Dialling(loop, _nothing, connection, [(socket.AF_UNIX, os.fsencode(self._sockets[port]))])
        else:
            connection.refuse()


def _nothing() -> None:
    """The core says itself when it has something to send."""
