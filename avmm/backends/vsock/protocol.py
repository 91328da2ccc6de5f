"""The vsock protocol, the host's half of it (virtio 1.2, 5.10.6), sans-io: packets in, packets out.

Each side says how much it can hold for a connection (``buf_alloc``) and how much of it has been taken since the
beginning (``fwd_cnt``): what is sent is never more than there is room for, so a slow reader slows its own peer only.
A guest that sends more than that, or what makes no sense, loses the connection. There are no timers: nothing is lost.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final, Protocol

from avmm.backends.flow.endpoint import Endpoint

#: struct virtio_vsock_hdr: CIDs, ports (source, destination each), length, type, operation, flags, buf_alloc, fwd_cnt.
HEADER: Final = struct.Struct("<QQIIIHHIII")
HOST_CID: Final = 2
_STREAM: Final = 1
REQUEST, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST = 1, 2, 3, 4, 5, 6, 7
_NO_RECEIVE, _NO_SEND = 1, 2  # flags of SHUTDOWN

#: Bytes held for one connection; Linux sends no more than 64 KiB at once.
BUFFER: Final = 1 << 20
_PIECE: Final = 64 << 10
CONNECTIONS_MAX: Final = 512
_WORD: Final = 0xFFFFFFFF
_HALF: Final = 0x80000000
_EMPTY: Final = memoryview(b"")


@dataclass(slots=True)
class Packet:
    """A packet for the guest. The payload of RW may be delivered in pieces, each with this header."""

    source: int
    destination: int
    operation: int
    flags: int
    buf_alloc: int
    fwd_cnt: int
    payload: memoryview

    def header(self, cid: int, length: int) -> bytes:
        """Its header towards the guest ``cid``, with ``length`` bytes of payload."""
        return HEADER.pack(
            HOST_CID, cid, self.source, self.destination, length, _STREAM, self.operation, self.flags, self.buf_alloc,
            self.fwd_cnt,
        )  # fmt: skip


class State(Enum):
    """The life of a connection."""

    ASKED = auto()  # by the guest, not answered yet
    ASKING = auto()
    OPEN = auto()
    CLOSED = auto()


class Host(Protocol):
    """What a guest asks of the host."""

    def asked(self, connection: Connection) -> None:
        """A guest wants ``connection`` to ``connection.local``: ``accept`` or ``refuse`` it."""
        ...


class Connection:
    """A connection (:class:`avmm.backends.flow.endpoint.Flow`); ``local`` and ``remote`` are (CID, port)."""

    head = 0
    largest = _PIECE

    def __init__(self, vsock: Vsock, local: tuple[int, int], remote: tuple[int, int]) -> None:
        self.local = local
        self.remote = remote
        self.endpoint: Endpoint | None = None
        self.state = State.CLOSED
        self.wants_room = False
        self._vsock = vsock
        # Sending: what the guest can hold, what it has taken, what was sent, all modulo 2**32.
        self._peer_alloc = self._peer_taken = self._sent = 0
        self._shut = False
        # Receiving.
        self._received = self._taken = self._told = 0
        self._inbox = bytearray()
        self._peer_flags = 0
        self._ended = False
        self._orphan = False

    # Opening.

    def connect(self, endpoint: Endpoint) -> None:
        """Ask the guest."""
        self.endpoint = endpoint
        self.state = State.ASKING
        self.ask()

    def ask(self) -> None:
        """Ask, again if need be."""
        self._put(REQUEST)

    def accept(self, endpoint: Endpoint, now: float) -> None:
        """See :class:`Flow`."""
        if self.state is State.ASKED:
            self.endpoint = endpoint
            self.state = State.OPEN
            self._put(RESPONSE)
            endpoint.opened()

    def refuse(self) -> None:
        """See :class:`Flow`."""
        self.abort()

    # Sending.

    def room(self) -> int:
        """See :class:`Flow`."""
        if self.state is not State.OPEN or self._shut or self._peer_flags & _NO_RECEIVE:
            return 0
        flight = self._sent - self._peer_taken & _WORD
        room = min(self._peer_alloc - flight, _PIECE)
        # Not a little at a time, where more will come: Linux tells of what it has taken when 64 KiB are left or less.
        return 0 if room <= 0 or (flight and room < min(_PIECE, self._peer_alloc >> 2)) else room

    def want_room(self, now: float) -> None:
        """See :class:`Flow`."""
        self.wants_room = self.state is State.OPEN

    def send(self, buffer: bytearray, now: float) -> None:
        """See :class:`Flow`."""
        self._sent = self._sent + len(buffer) & _WORD
        self._put(RW, payload=memoryview(buffer))

    def shutdown(self, now: float) -> None:
        """See :class:`Flow`."""
        if self.state is State.OPEN and not self._shut:
            self._shut = True
            self.wants_room = False
            self._put(SHUTDOWN, _NO_SEND)
            self._over()

    def close(self, now: float) -> None:
        """See :class:`Flow`."""
        self.endpoint = None
        if self._inbox or self.state is not State.OPEN:
            self.abort()
            return
        self._orphan = self._shut = True
        self._put(SHUTDOWN, _NO_SEND | _NO_RECEIVE)
        self._over()

    def abort(self) -> None:
        """See :class:`Flow`."""
        if self.state is not State.CLOSED:
            self._put(RST)
            self._finish(True)

    def lost(self) -> None:
        """The guest is gone."""
        self._finish(True)

    # Receiving.

    @property
    def waiting(self) -> bytearray:
        """See :class:`Flow`."""
        return self._inbox

    def taken(self, count: int, now: float) -> None:
        """See :class:`Flow`."""
        del self._inbox[:count]
        self._took(count)
        self._end_of_input()

    def packet(self, operation: int, flags: int, alloc: int, taken: int, payload: memoryview) -> None:
        """Take in a packet of the guest's."""
        # A guest may promise the world: what it has not taken yet is held here.
        self._peer_alloc, self._peer_taken = min(alloc, BUFFER), taken
        if (self._sent - taken & _WORD) >= _HALF:  # it has taken what was never sent
            self.abort()
        elif operation == RW:
            self._data(payload)
        elif operation == CREDIT_REQUEST:
            self._put(CREDIT_UPDATE)
        elif operation == RESPONSE and self.state is State.ASKING:
            self.state = State.OPEN
            if self.endpoint is not None:
                self.endpoint.opened()
        elif operation == SHUTDOWN and self.state is State.OPEN:
            self._peer_flags |= flags & (_NO_RECEIVE | _NO_SEND)
            self._end_of_input()
            self._over()
        elif operation == RST:
            self._finish(not (self._peer_flags & _NO_SEND and self._ended) and not self._orphan)
        elif operation != CREDIT_UPDATE:
            self.abort()
        if self.wants_room and self.room() and self.endpoint is not None:
            self.wants_room = False
            self.endpoint.room()

    def _data(self, payload: memoryview) -> None:
        length = len(payload)
        self._received = self._received + length & _WORD
        if (
            self.state is not State.OPEN
            or self._peer_flags & _NO_SEND
            or (self._received - self._taken & _WORD) > BUFFER
        ):
            self.abort()
        elif self._orphan or self.endpoint is None:
            self._took(length)
        elif length:
            done = 0 if self._inbox else self.endpoint.received(payload)
            if done < length:
                self._inbox += payload[done:]
            if done and self.state is State.OPEN:
                self._took(done)

    def _took(self, count: int) -> None:
        """``count`` more bytes have gone on: say so, before the guest has to wait for it."""
        self._taken = self._taken + count & _WORD
        if (self._taken - self._told & _WORD) >= BUFFER // 4 and self.state is State.OPEN:
            self._put(CREDIT_UPDATE)

    def _end_of_input(self) -> None:
        if self._peer_flags & _NO_SEND and not self._inbox and not self._ended:
            self._ended = True
            if self.endpoint is not None:
                self.endpoint.ended()
            self._over()

    def _over(self) -> None:
        """Is everything said both ways? Then RST is a clean end (5.10.6.6)."""
        done_sending = self._shut or self._peer_flags & _NO_RECEIVE
        if self.state is State.OPEN and self._ended and done_sending:
            self._put(RST)
            self._finish(False)

    def _put(self, operation: int, flags: int = 0, payload: memoryview = _EMPTY) -> None:
        self._told = self._taken
        self._vsock.put(Packet(self.local[1], self.remote[1], operation, flags, BUFFER, self._taken, payload))

    def _finish(self, reset: bool) -> None:
        if self.state is not State.CLOSED:
            self.state = State.CLOSED
            self._vsock.forget(self)
            endpoint, self.endpoint = self.endpoint, None
            if endpoint is not None:
                endpoint.closed(reset)


class Vsock:
    """All connections with one guest. ``output`` collects what is for it; ``on_output`` says that there is some."""

    def __init__(self, host: Host, cid: int) -> None:
        self.cid = cid
        self.output: deque[Packet] = deque()
        self.on_output: Callable[[], None] = lambda: None
        #: Packets each way, and those that made no sense.
        self.counters = {"packets_in": 0, "packets_out": 0, "refused": 0}
        self._host = host
        self._connections: dict[tuple[int, int], Connection] = {}  # by our port and the guest's

    @property
    def connections(self) -> int:
        """How many there are."""
        return len(self._connections)

    def dial(self, local: int, port: int) -> Connection:
        """A connection from our port to the guest's, still to be ``connect``-ed. Raises OSError when that is in use."""
        if (local, port) in self._connections or len(self._connections) >= CONNECTIONS_MAX:
            raise OSError(f"vsock port {local} is in use towards the guest")
        return self._new(local, port)

    def packet(self, header: bytes, payload: memoryview) -> None:
        """Take in a packet of the guest's: 44 bytes of header, and as much payload as it says."""
        source, target, port, local, _, kind, operation, flags, alloc, taken = HEADER.unpack(header)
        self.counters["packets_in"] += 1
        if source != self.cid:
            self.counters["refused"] += 1  # nobody to answer
            return
        connection = self._connections.get((local, port)) if target == HOST_CID and kind == _STREAM else None
        if connection is not None:
            connection.packet(operation, flags, alloc, taken, payload)
        elif operation == REQUEST and target == HOST_CID and kind == _STREAM and self.connections < CONNECTIONS_MAX:
            connection = self._new(local, port)
            connection.state = State.ASKED
            connection._peer_alloc, connection._peer_taken = min(alloc, BUFFER), taken
            self._host.asked(connection)
        elif operation != RST:
            self.counters["refused"] += 1
            self.put(Packet(local, port, RST, 0, 0, 0, _EMPTY))

    def reset(self, *, gone: bool = False) -> None:
        """The guest has forgotten everything: who still waits for its answer asks again. Or it is gone altogether."""
        self.output.clear()
        for connection in list(self._connections.values()):
            if connection.state is State.ASKING and not gone:
                connection.ask()
            else:
                connection.lost()

    def put(self, packet: Packet) -> None:
        """Something for the guest."""
        self.counters["packets_out"] += 1
        self.output.append(packet)
        self.on_output()

    def forget(self, connection: Connection) -> None:
        """The connection has ended."""
        key = (connection.local[1], connection.remote[1])
        if self._connections.get(key) is connection:
            del self._connections[key]

    def _new(self, local: int, port: int) -> Connection:
        connection = self._connections[local, port] = Connection(self, (HOST_CID, local), (self.cid, port))
        return connection
