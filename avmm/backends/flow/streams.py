"""A guest's connection as asyncio streams: this program is the other end, with no socket between."""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeAlias

from avmm.backends.flow.endpoint import Flow
from avmm.errors import GuestGone, WaitTimeout
from avmm.log import log

Streams: TypeAlias = tuple[asyncio.StreamReader, asyncio.StreamWriter]
#: What answers guests: an asyncio streams handler.
Handler: TypeAlias = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

#: Bytes written and not sent yet at which a writer has to wait.
_HIGH_WATER: Final = 256 << 10
_PIECE: Final = 64 << 10


class GuestTransport(asyncio.Transport):
    """A transport over a connection, and the connection's endpoint (:class:`avmm.backends.flow.endpoint.Endpoint`).

    ``established`` is resolved when the guest has answered, or will not; ``names`` are the addresses of both ends, ours
    first.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        pump: Callable[[], None],
        connection: Flow,
        protocol: asyncio.Protocol,
        established: asyncio.Future[None],
        names: tuple[tuple[Any, int], tuple[Any, int]],
    ) -> None:
        super().__init__({"peername": names[1], "sockname": names[0]})
        self._loop = loop
        self._pump = pump
        self._connection = connection
        self._protocol = protocol
        self._established = established
        self._outbox = bytearray()
        self._writing_paused = False
        self._reading_paused = False
        self._eof = False
        self._closing = False
        self._gone = False

    # The connection's side.

    def opened(self) -> None:
        """See :class:`Endpoint`."""
        if not self._established.done():
            self._established.set_result(None)
        self.room()

    def received(self, data: memoryview) -> int:
        """See :class:`Endpoint`."""
        if self._closing:
            return len(data)
        if self._reading_paused:
            return 0
        self._protocol.data_received(bytes(data))
        return len(data)

    def ended(self) -> None:
        """See :class:`Endpoint`."""
        if not self._closing and not self._protocol.eof_received():
            self.close()

    def room(self) -> None:
        """See :class:`Endpoint`."""
        outbox, connection = self._outbox, self._connection
        sent = 0
        while sent < len(outbox):
            room = min(connection.room(), connection.largest)
            if not room:
                connection.want_room(self._loop.time())
                break
            connection.send(bytearray(connection.head) + outbox[sent : sent + room], self._loop.time())
            sent += room
        del outbox[:sent]
        if self._writing_paused and len(outbox) < _HIGH_WATER // 4:
            self._writing_paused = False
            self._protocol.resume_writing()
        if not outbox and not self._gone:
            if self._closing:
                self._gone = True
                connection.close(self._loop.time())
                self._loop.call_soon(self._protocol.connection_lost, None)
            elif self._eof:
                connection.shutdown(self._loop.time())

    def closed(self, reset: bool) -> None:
        """See :class:`Endpoint`."""
        if not self._gone:
            self._gone = self._closing = True
            error = ConnectionResetError("the guest has reset the connection, or is gone") if reset else None
            self._outbox.clear()
            if not self._established.done():
                self._established.set_exception(error or ConnectionResetError())
            self._loop.call_soon(self._protocol.connection_lost, error)

    # The program's side: asyncio.Transport.

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send ``data`` to the guest."""
        if self._gone or self._closing or self._eof or not data:
            return
        self._outbox += data
        if not self._connection.wants_room:
            self.room()
        if len(self._outbox) > _HIGH_WATER and not self._writing_paused:
            self._writing_paused = True
            self._protocol.pause_writing()
        self._pump()

    def can_write_eof(self) -> bool:
        """It can."""
        return True

    def write_eof(self) -> None:
        """No more will be written."""
        if not self._eof and not self._closing:
            self._eof = True
            self.room()
            self._pump()

    def is_reading(self) -> bool:
        """Whether the protocol is given what comes."""
        return not self._reading_paused and not self._closing

    def pause_reading(self) -> None:
        """Let the guest wait."""
        self._reading_paused = True

    def resume_reading(self) -> None:
        """Go on."""
        self._reading_paused = False
        connection = self._connection
        while connection.waiting and not self._reading_paused and not self._gone:
            piece = bytes(connection.waiting[:_PIECE])
            self._protocol.data_received(piece)
            connection.taken(len(piece), self._loop.time())
        self._pump()

    def get_write_buffer_size(self) -> int:
        """Bytes written and not sent yet."""
        return len(self._outbox)

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """(low, high)"""
        return _HIGH_WATER // 4, _HIGH_WATER

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """They are what they are."""

    def get_protocol(self) -> asyncio.BaseProtocol:
        """Who is told what comes."""
        return self._protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Tell somebody else."""
        assert isinstance(protocol, asyncio.Protocol)
        self._protocol = protocol

    def is_closing(self) -> bool:
        """Whether it is closed, or will be when all is sent."""
        return self._closing

    def close(self) -> None:
        """Close when all is sent."""
        if not self._closing:
            self._closing = True
            if self._connection.waiting:
                self._connection.taken(len(self._connection.waiting), self._loop.time())
            self.room()
            self._pump()

    def abort(self) -> None:
        """Close at once: the guest gets RST."""
        self._closing = True
        self._connection.abort()
        self._pump()


def open_streams(
    loop: asyncio.AbstractEventLoop,
    pump: Callable[[], None],
    connection: Flow,
    names: tuple[tuple[Any, int], tuple[Any, int]],
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, GuestTransport, asyncio.Future[None]]:
    """(reader, writer, the transport below them, what is resolved when the connection stands)."""
    reader = asyncio.StreamReader(loop=loop)
    protocol: Any = asyncio.StreamReaderProtocol(reader, loop=loop)
    established: asyncio.Future[None] = loop.create_future()
    transport = GuestTransport(loop, pump, connection, protocol, established, names)
    protocol.connection_made(transport)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop), transport, established


class Power:
    """Whether a guest's machine is on, for those who want to reach the guest."""

    def __init__(self) -> None:
        self._on = asyncio.Event()
        self._gone = False

    def on(self) -> None:
        """It is."""
        self._on.set()

    def off(self) -> None:
        """It is not; it may be again, after a reset."""
        if not self._gone:
            self._on.clear()

    def gone(self) -> None:
        """It never will be again."""
        self._gone = True
        self._on.set()

    async def wait(self, timeout: float | None) -> float | None:
        """Return when it is on; what is left of ``timeout``. Raises WaitTimeout, GuestGone."""
        began = time.monotonic()
        try:
            async with asyncio.timeout(timeout):
                await self._on.wait()
        except TimeoutError:
            raise WaitTimeout("the guest has not been started", elapsed=timeout or 0.0) from None
        if self._gone:
            raise GuestGone("the guest is gone")
        return None if timeout is None else max(0.0, timeout - (time.monotonic() - began))


async def reached(
    established: asyncio.Future[None],
    transport: GuestTransport,
    port: int,
    timeout: float | None,
    running: Callable[[], bool],
) -> None:
    """Wait until the guest has accepted the connection to its ``port``; whatever else comes, it is over then.

    Raises WaitTimeout, ConnectionRefusedError, GuestGone.
    """
    try:
        async with asyncio.timeout(timeout):
            await established
    except TimeoutError:
        raise WaitTimeout(f"the guest has not answered at port {port}", elapsed=timeout or 0.0) from None
    except ConnectionError as error:
        if not running():
            raise GuestGone(f"the guest is gone; its port {port} was not reached") from None
        raise ConnectionRefusedError(errno.ECONNREFUSED, f"the guest refuses port {port}") from error
    finally:
        if not established.done() or established.cancelled() or established.exception() is not None:
            transport.abort()


async def answer(
    established: asyncio.Future[None], handler: Handler, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """Let ``handler`` answer a guest that has connected; the connection is closed when it returns, or broken when it
    fails."""
    try:
        await established
        await handler(reader, writer)
    except ConnectionError:
        writer.transport.abort()
    except Exception as error:
        log.warning("guest.handler_failed", error=repr(error))
        writer.transport.abort()
    except BaseException:
        writer.transport.abort()
        raise
    finally:
        writer.close()
