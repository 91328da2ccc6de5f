"""The user-mode network on an event loop: the stack's frames, the host's sockets, and streams for this program.

::

    network = UserNetwork(publish=[Forward(8080, 80)])
    join(network.end, card)
    network.dns["api.test"] = "10.0.2.100"
    network.serve(80, handler, address="10.0.2.100")
    reader, writer = await network.connect(22)
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import random
import socket
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from avmm.backends.flow.splice import Dialling, Place, Splice
from avmm.backends.flow.streams import Handler, Power, Streams, answer, open_streams, reached
from avmm.backends.usernet import dns
from avmm.backends.usernet.datagrams import Datagrams
from avmm.backends.usernet.packet import address, name
from avmm.backends.usernet.plan import Plan
from avmm.backends.usernet.stack import Address, Guests, Stack
from avmm.backends.usernet.tcp import Connection
from avmm.errors import ConfigError, GuestGone, HostError
from avmm.link import End, Frame

#: Frames that wait for room in the guest: so many, and datagrams are lost; so many, and anything is.
_WAITING_MAX: Final = 4096
_WAITING_DATAGRAMS: Final = 512
_EPHEMERAL: Final = range(49152, 65536)
_TURN: Final = 64


@dataclass(frozen=True, slots=True)
class Forward:
    """A port that the host offers: what connects to ``host`` at ``address`` (0: any free port) reaches the guest's
    ``guest``."""

    host: int
    guest: int
    udp: bool = False
    address: str = "127.0.0.1"


class UserNetwork:
    """A network with this host as its gateway. ``restrict``: guests reach only what :meth:`serve` offers them, and are
    reached through what is published. Made and closed on any thread; everything else on the event loop."""

    def __init__(self, *, restrict: bool = False, publish: Sequence[Forward] = ()) -> None:
        self._plan = Plan(isolated=restrict)
        self.stack = Stack(self, self._plan)
        #: Names of one's own, before the host's resolver is asked: ``dns["api.test"] = "10.0.2.100"``.
        self.dns = self.stack.names
        self.end = End(self._receive, offload=True)
        self.end.on_room = self._send
        self._served: dict[Address, Handler] = {}
        self._waiting: deque[Frame] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: asyncio.TaskGroup | None = None
        self._pumping = False
        self._timer: asyncio.TimerHandle | None = None
        # From anywhere: a twin's guest still has the connections of its parent's.
        self._ports = itertools.count(random.SystemRandom().choice(_EPHEMERAL))
        self._datagrams = Datagrams(self.stack, self._plan, self._pump, self._congested)
        self._nameserver: str | None = None
        self._power = Power()
        self._adopted: Guests | None = None
        #: The published ports with the sockets they are published by.
        self._listening: list[tuple[Forward, socket.socket]] = []
        #: Frames for guests that were lost because they took none.
        self.dropped = 0
        try:
            for forward in publish:
                self._listening.append((forward, _listen(forward)))
        except BaseException:
            self.close()
            raise

    # Life.

    async def run(self) -> None:
        """Move frames and bytes, until cancelled; then every connection is over."""
        loop = asyncio.get_running_loop()
        self._nameserver = await asyncio.to_thread(_nameserver)
        async with asyncio.TaskGroup() as tasks:
            self._loop, self._tasks = loop, tasks
            self._datagrams.start(loop)
            self._power.on()
            if self._adopted is not None:
                self.stack.adopt(self._adopted)
                self._adopted = None
                self._pump()
            for forward, sock in self._listening:
                if forward.udp:
                    self._datagrams.publish(sock, forward.guest)
                else:
                    loop.add_reader(sock.fileno(), self._called, sock, forward.guest)
            try:
                await loop.create_future()
            finally:
                for _, sock in self._listening:
                    loop.remove_reader(sock.fileno())
                self._datagrams.stop()
                self.stack.reset()
                self._waiting.clear()
                if self._timer is not None:
                    self._timer.cancel()
                    self._timer = None
                self._loop = self._tasks = None
                self._power.off()

    def gone(self) -> None:
        """The guests' machine has ended: nobody waits for it any more."""
        self._power.gone()

    def close(self) -> None:
        """Let go of published ports."""
        for _, sock in self._listening:
            sock.close()
        self._listening.clear()

    # What the program asks.

    def serve(self, port: int, handler: Handler, *, address: str = "10.0.2.2") -> None:
        """``handler(reader, writer)`` answers guests that connect to ``port`` of ``address``, an address of the
        network, by default the gateway's. No port of the host's is used; before the host's own it comes first."""
        self._served[self._own(address), port] = handler

    def stop_serving(self, port: int, *, address: str = "10.0.2.2") -> None:
        """Take no more connections to ``port``; those there are go on."""
        del self._served[self._own(address), port]

    def serve_as(self, other: UserNetwork) -> None:
        """Serve what ``other`` does, under the same names: for the twin of its guest."""
        self._served.update(other._served)
        self.stack.aliases |= other.stack.aliases
        self.dns.update(other.dns)

    def adopt(self, guests: Guests) -> None:
        """The first guests will be copies of these: end the connections that they bring, by RST."""
        self._adopted = guests

    async def connect(self, port: int, *, timeout: float | None = None) -> Streams:
        """(reader, writer) of a connection to ``port`` of the guest, as from the gateway.

        Raises ConnectionRefusedError when nobody listens, WaitTimeout, GuestGone when the guest is gone.
        """
        timeout = await self._power.wait(timeout)
        loop = asyncio.get_running_loop()
        connection = self._dial(port)
        reader, writer, transport, established = open_streams(loop, self._pump, connection, _names(connection))
        connection.connect(transport, loop.time())
        self._pump()
        await reached(established, transport, port, timeout, lambda: self._loop is not None)
        return reader, writer

    @property
    def published(self) -> list[tuple[str, int]]:
        """(address, port) on the host of each published port, in order: what a port of 0 has become."""
        return [sock.getsockname()[:2] for _, sock in self._listening]

    # What guests ask (avmm.backends.usernet.stack.Host).

    def asked(self, connection: Connection) -> None:
        """A guest wants a connection."""
        loop, tasks = self._loop, self._tasks
        assert loop is not None
        assert tasks is not None
        handler = self._served.get(connection.local)
        if handler is not None:
            reader, writer, transport, established = open_streams(loop, self._pump, connection, _names(connection))
            connection.accept(transport, loop.time())
            tasks.create_task(answer(established, handler, reader, writer))
        else:
            places = self._places(connection.local, udp=False)
            if places:
                Dialling(loop, self._pump, connection, [_place(each) for each in places])
            else:
                connection.refuse()

    def datagram(self, source: Address, destination: Address, payload: memoryview) -> None:
        """A guest has sent a datagram."""
        places = self._places(destination, udp=True)
        if self._datagrams.answer(source, destination, payload):
            return
        if not places or not self._datagrams.send(source, destination, places[0], payload):
            self.stack.unreachable(source, destination, payload, prohibited=self._plan.isolated)

    def _places(self, where: Address, *, udp: bool) -> list[tuple[str, int]]:
        """Where on the host's network a guest's destination is; nowhere where it may not go."""
        host, port = where
        if self._plan.isolated or not port:
            return []
        if host == self._plan.gateway:
            return [("127.0.0.1", port)] if udp else [("127.0.0.1", port), ("::1", port)]
        if host == self._plan.dns:
            return [(self._nameserver, port)] if self._nameserver is not None and port == dns.PORT else []
        # This host is reached through the gateway, and nothing through what is no address of a host.
        if self._plan.inside(host) or host[0] in (0, 127) or host[0] >= 224:
            return []
        return [(name(host), port)]

    # Published ports.

    def _called(self, listener: socket.socket, port: int) -> None:
        loop = self._running()
        for _ in range(_TURN):
            try:
                sock, _ = listener.accept()
            except OSError:
                break
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                connection = self._dial(port)
            except OSError:
                sock.close()
                continue
            connection.connect(Splice(loop, self._pump, connection, sock), loop.time())
        self._pump()

    def _dial(self, port: int) -> Connection:
        for number in itertools.islice(self._ports, len(_EPHEMERAL)):
            local = (self._plan.gateway, _EPHEMERAL[number % len(_EPHEMERAL)])
            with contextlib.suppress(OSError):
                return self.stack.dial(local, (self.stack.guest, port))
        raise OSError(errno.EADDRNOTAVAIL, "no more connections to the guest can be made")

    # Frames.

    def _receive(self, frame: Frame) -> bool:
        if self._loop is not None:
            self.stack.input(frame, self._loop.time())
            self._pump()
        return True

    def _pump(self) -> None:
        """See to what the stack has to say, soon: once for a batch of frames."""
        if not self._pumping and self._loop is not None:
            self._pumping = True
            self._loop.call_soon(self._work)

    def _work(self) -> None:
        self._pumping = False
        if self._loop is None:
            return
        self.stack.poll(self._loop.time())
        self._send()
        deadline = self.stack.deadline
        if deadline is not None and (self._timer is None or deadline < self._timer.when()):
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_at(deadline, self._alarm)

    def _alarm(self) -> None:
        self._timer = None
        self._pump()

    def _send(self) -> None:
        waiting, output, end = self._waiting, self.stack.output, self.end
        while waiting:
            if not end.send(waiting[0]):
                break
            waiting.popleft()
        if output:
            self.stack.output = []
            for index, frame in enumerate(output):
                if waiting or not end.send(frame):
                    rest = output[index : index + _WAITING_MAX - len(waiting)]
                    self.dropped += len(output) - index - len(rest)
                    waiting.extend(rest)
                    break

    def _congested(self) -> bool:
        return len(self._waiting) + len(self.stack.output) > _WAITING_DATAGRAMS

    def _running(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            raise GuestGone("the VM of this network is not running")
        return self._loop

    def _own(self, where: str) -> bytes:
        try:
            packed = address(where)
        except OSError:
            packed = b""
        if packed != self._plan.gateway and not (packed and self._plan.is_guest(packed)):
            raise ConfigError(f"{where!r} is not an address of the network {name(self._plan.network)}/24 to serve at")
        if packed != self._plan.gateway:
            self.stack.aliases.add(packed)
        return packed


def _names(connection: Connection) -> tuple[tuple[str, int], tuple[str, int]]:
    """Both ends in words, ours first."""
    local, remote = connection.local, connection.remote
    return (name(local[0]), local[1]), (name(remote[0]), remote[1])


def _place(where: tuple[str, int]) -> Place:
    return (socket.AF_INET6 if ":" in where[0] else socket.AF_INET, where)


def _listen(forward: Forward) -> socket.socket:
    """Raises HostError."""
    kind = socket.SOCK_DGRAM if forward.udp else socket.SOCK_STREAM
    sock = socket.socket(socket.AF_INET6 if ":" in forward.address else socket.AF_INET, kind)
    try:
        sock.setblocking(False)
        if not forward.udp:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((forward.address, forward.host))
        if not forward.udp:
            sock.listen(1024)
    except OSError as error:
        sock.close()
        advice = "publish another one" if error.errno == errno.EADDRINUSE else "choose one that you may use"
        where = f"{forward.address}:{forward.host}{'/udp' if forward.udp else ''}"
        raise HostError(f"cannot publish {where}: {os.strerror(error.errno or 0)}; {advice}") from error
    return sock


def _nameserver() -> str | None:
    """The first name server of the host's resolver."""
    with contextlib.suppress(OSError), open("/etc/resolv.conf", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            words = line.split()
            if len(words) > 1 and words[0] == "nameserver":
                return words[1].partition("%")[0]
    return None
