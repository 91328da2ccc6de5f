"""TCP of the user-mode network: two stacks against each other over a link that loses, doubles and reorders."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avmm.backends.usernet.packet import TCP_DATA_AT, address
from avmm.backends.usernet.plan import Plan
from avmm.backends.usernet.stack import Address, Stack
from avmm.backends.usernet.tcp import ACK, SEGMENT_MAX, SYN, Connection, State
from avmm.link import Frame

GATEWAY, GUEST = address("10.0.2.2"), address("10.0.2.15")


class Peer:
    """One end of a connection: sends ``data`` as there is room, takes what comes at most ``appetite`` at a time."""

    def __init__(self, side: Side, data: bytes, *, appetite: int | None = None, piece: int = SEGMENT_MAX) -> None:
        self.side = side
        self.data = memoryview(data)
        self.sent = 0
        self.appetite = appetite
        self.piece = piece
        self.got = bytearray()
        self.ended_ = False
        self.over: bool | None = None
        self.connection: Connection | None = None

    def opened(self) -> None:
        self.room()

    def received(self, data: memoryview) -> int:
        taken = len(data) if self.appetite is None else min(self.appetite, len(data))
        self.got += data[:taken]
        return taken

    @property
    def hungry(self) -> bool:
        """Whether :meth:`digest` has something to eat."""
        return bool(self.appetite and self.connection is not None and self.connection.waiting)

    def digest(self) -> None:
        """Eat some of what has been kept back."""
        if self.hungry:
            assert self.connection is not None
            piece = bytes(self.connection.waiting[: self.appetite])
            self.got += piece
            self.connection.taken(len(piece), self.side.world.now)

    def ended(self) -> None:
        self.ended_ = True

    def room(self) -> None:
        connection = self.connection
        assert connection is not None
        while self.sent < len(self.data):
            room = min(connection.room(), self.piece, SEGMENT_MAX)
            if not room:
                connection.want_room(self.side.world.now)
                return
            piece = self.data[self.sent : self.sent + room]
            self.sent += len(piece)
            connection.send(bytearray(TCP_DATA_AT) + piece, self.side.world.now)
        connection.shutdown(self.side.world.now)

    def closed(self, reset: bool) -> None:
        assert self.over is None
        self.over = reset


class Side:
    """A stack with what a test does on its host."""

    def __init__(self, world: World, plan: Plan) -> None:
        self.world = world
        self.stack = Stack(self, plan)
        self.serve: Callable[[Connection], Peer | None] = lambda connection: None
        self.datagrams: list[tuple[Address, Address, bytes]] = []

    def asked(self, connection: Connection) -> None:
        peer = self.serve(connection)
        if peer is None:
            connection.refuse()
        else:
            peer.connection = connection
            connection.accept(peer, self.world.now)

    def datagram(self, source: Address, destination: Address, payload: memoryview) -> None:
        self.datagrams.append((source, destination, bytes(payload)))


@dataclass
class World:
    """Two sides, a link of 1 ms between them, and time that passes only when nothing else is to be done."""

    seed: int = 0
    loss: float = 0.0
    twice: float = 0.0
    jitter: float = 0.0
    now: float = 0.0
    flying: list[tuple[float, int, Side, Frame]] = field(default_factory=list)
    frames: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.host = Side(self, Plan())
        self.guest = Side(self, Plan(gateway=GUEST, dns=address("10.0.2.77"), mac=bytes.fromhex("525400123456")))
        self.peers: list[Peer] = []

    def connect(self, peer: Peer, port: int = 80, local: int = 40000) -> Connection:
        """The guest connects to the gateway."""
        peer.connection = self.guest.stack.dial((GUEST, local), (GATEWAY, port))
        peer.connection.connect(peer, self.now)
        self.peers.append(peer)
        return peer.connection

    def _launch(self) -> None:
        for side, other in ((self.host, self.guest), (self.guest, self.host)):
            side.stack.flush()
            frames, side.stack.output = side.stack.output, []
            for frame in frames:
                copy = Frame(bytes(frame.data), frame.csum_start, frame.csum_offset, frame.gso_size)
                for _ in range(2 if self.random.random() < self.twice else 1):
                    if self.random.random() >= self.loss:
                        self.frames += 1
                        at = self.now + 0.001 + self.random.random() * self.jitter
                        heapq.heappush(self.flying, (at, self.frames, other, copy))

    def run(self, until: Callable[[], bool], limit: float = 3600.0) -> None:
        """Let time pass until something holds."""
        self._launch()
        while not until():
            for peer in self.peers:
                peer.digest()
            self._launch()
            times = [side.stack.deadline for side in (self.host, self.guest) if side.stack.deadline is not None]
            times += [self.flying[0][0]] if self.flying else []
            times += [self.now + 0.001] if any(peer.hungry for peer in self.peers) else []
            assert times, "nothing will ever happen again"
            self.now = max(self.now, min(times))
            assert self.now < limit, "it takes too long"
            while self.flying and self.flying[0][0] <= self.now:
                _, _, side, frame = heapq.heappop(self.flying)
                side.stack.input(frame, self.now)
            for side in (self.host, self.guest):
                side.stack.poll(self.now)
            self._launch()


def exchange(world: World, up: bytes, down: bytes, **peer: int | None) -> tuple[Peer, Peer]:
    """``up`` from the guest and ``down`` to it, both closed at their end."""
    server = Peer(world.host, down, **peer)  # type: ignore[arg-type]  # the tests give what it takes
    world.peers.append(server)
    world.host.serve = lambda connection: server
    client = Peer(world.guest, up, **peer)  # type: ignore[arg-type]  # as above
    world.connect(client)
    world.run(lambda: client.over is not None and server.over is not None)
    assert bytes(server.got) == up
    assert bytes(client.got) == down
    assert client.ended_
    assert server.ended_
    assert (client.over, server.over) == (False, False)
    return client, server


def test_both_ways_and_time_wait() -> None:
    world = World()
    exchange(world, random.Random(1).randbytes(3_000_000), random.Random(2).randbytes(5_000_000))
    assert world.now < 1  # no timer had to help
    assert {each.state for each in world.host.stack._connections.values()} == {State.TIME_WAIT}
    world.run(lambda: not world.host.stack.connections and not world.guest.stack.connections)
    assert world.host.stack.deadline is None


@given(
    seed=st.integers(0, 2**32),
    loss=st.sampled_from([0.0, 0.01, 0.1, 0.3]),
    twice=st.sampled_from([0.0, 0.2]),
    jitter=st.sampled_from([0.0, 0.002, 0.02]),
    up=st.integers(0, 400_000),
    down=st.integers(0, 400_000),
    piece=st.sampled_from([100, 1460, SEGMENT_MAX]),
    appetite=st.sampled_from([None, 1000, 30_000]),
)
@settings(max_examples=60, deadline=None)
def test_survives_a_bad_link(
    seed: int, loss: float, twice: float, jitter: float, up: int, down: int, piece: int, appetite: int | None
) -> None:
    if piece == 100:
        up, down = up // 20, down // 20
    world = World(seed, loss, twice, jitter)
    dice = random.Random(seed)
    contents = dice.randbytes(up), dice.randbytes(down)
    try:
        exchange(world, *contents, piece=piece, appetite=appetite)
    except AssertionError:
        # Nobody can do anything about a dozen losses in a row; nor about a few at the very end, when all is there and
        # whoever would say so has waited long enough. Nothing else is an excuse.
        arrived = tuple(bytes(peer.got) for peer in world.peers) == contents
        if loss < (0.1 if arrived else 0.3) or not any(peer.over for peer in world.peers):
            raise


def test_zero_window_and_its_lost_opening() -> None:
    world = World()
    server = Peer(world.host, b"", appetite=0)
    world.host.serve = lambda connection: server
    client = Peer(world.guest, bytes(4_000_000))
    world.connect(client)
    world.run(lambda: world.now > 30)
    assert client.sent < 2_000_000
    held = server.connection
    assert held is not None
    assert len(held.waiting) <= world.host.stack.window_limit
    # The window opens, and the segment that says so is lost: a probe finds out.
    server.appetite = None
    server.got += held.waiting
    held.taken(len(held.waiting), world.now)
    world.host.stack.output.clear()
    world.run(lambda: server.ended_)
    assert len(server.got) == 4_000_000


def test_half_close() -> None:
    world = World()
    server = Peer(world.host, b"answer" * 1000)
    hold, server.room = server.room, lambda: None  # type: ignore[method-assign]  # deaf for a while
    world.host.serve = lambda connection: server
    client = Peer(world.guest, b"question")
    world.connect(client)
    world.run(lambda: server.ended_)
    assert bytes(server.got) == b"question"
    assert client.over is None
    hold()
    world.run(lambda: client.over is not None)
    assert bytes(client.got) == b"answer" * 1000


def test_refused_and_reset() -> None:
    world = World()
    client = Peer(world.guest, b"x")
    world.connect(client)
    world.run(lambda: client.over is not None)
    assert client.over is True
    server = Peer(world.host, b"")
    server.room = lambda: None  # type: ignore[method-assign]  # deaf
    world.host.serve = lambda connection: server
    second = Peer(world.guest, b"y")
    world.connect(second, local=40001)
    world.run(lambda: bytes(server.got) == b"y")
    assert server.connection is not None
    server.connection.abort()
    world.run(lambda: second.over is not None)
    assert second.over is True
    assert world.host.stack.connections == world.guest.stack.connections == 0


def test_what_a_peer_remembers_of_an_older_connection_is_swept_away() -> None:
    """As after a fork or a crash: our SYN meets an established connection of the same ports (RFC 9293, 3.5.1)."""
    world = World()
    servers: list[Peer] = []

    def serve(connection: Connection) -> Peer:
        servers.append(Peer(world.host, b"hello"))
        servers[-1].room = lambda: None  # type: ignore[method-assign]  # says nothing yet
        return servers[-1]

    world.host.serve = serve
    first = world.connect(Peer(world.guest, b"x" * 10))
    world.run(lambda: bool(servers) and len(servers[0].got) == 10)
    first.lost()
    second = Peer(world.guest, b"y")
    world.connect(second)
    world.run(lambda: len(servers) == 2 and bytes(servers[1].got) == b"y")
    assert servers[0].over is True


def test_a_repeated_syn_is_answered_after_other_answers() -> None:
    """The window of a SYN is never scaled, whatever was offered since."""
    world = World()
    world.host.serve = lambda connection: Peer(world.host, b"")
    client = world.connect(Peer(world.guest, b""))
    world.run(lambda: world.host.stack.connections == 1)
    (server,) = world.host.stack._connections.values()
    assert server.state is State.SYN_RECEIVED
    server.segment(client._una + 100_000 & 0xFFFFFFFF, 0, ACK, 100, b"", memoryview(b""), world.now)
    server.segment(client._una, 0, SYN, 100, b"", memoryview(b""), world.now)


def test_pieces_that_overlap_are_not_hoarded() -> None:
    world = World()
    server = Peer(world.host, b"")
    server.room = lambda: None  # type: ignore[method-assign]  # deaf
    world.host.serve = lambda connection: server
    client = Peer(world.guest, b"x")
    client.room = lambda: None  # type: ignore[method-assign]  # deaf
    world.connect(client)
    world.run(lambda: server.connection is not None and server.connection.state is State.OPEN)
    connection = server.connection
    assert connection is not None
    world.host.stack.window_limit = 100_000
    for number in range(100):
        data = memoryview(bytes(30_000))
        connection.segment(connection._rcv + 1 + number, connection._next, ACK, 100, b"", data, world.now)
    assert sum(len(kept) for _, kept in connection._early) <= 100_000


def test_a_peer_that_is_gone_is_given_up() -> None:
    world = World()
    server = Peer(world.host, bytes(10))
    world.host.serve = lambda connection: server
    client = Peer(world.guest, b"")
    client.room = lambda: None  # type: ignore[method-assign]  # deaf
    world.connect(client)
    world.run(lambda: client.connection is not None and client.connection.state is State.OPEN)
    world.loss = 1.0
    world.run(lambda: server.over is not None)
    assert server.over is True


@pytest.mark.parametrize("connections", [2000])
def test_thousands_at_once(connections: int) -> None:
    world = World()
    servers: list[Peer] = []

    def serve(connection: Connection) -> Peer:
        servers.append(Peer(world.host, b"pong"))
        return servers[-1]

    world.host.serve = serve
    clients = [Peer(world.guest, b"ping") for _ in range(connections)]
    for index, client in enumerate(clients):
        world.connect(client, local=2000 + index)
    world.run(lambda: all(client.over is False for client in clients))
    assert all(bytes(server.got) == b"ping" for server in servers)
    assert all(bytes(client.got) == b"pong" for client in clients)
    world.run(lambda: not world.host.stack.connections and not world.guest.stack.connections)
