"""Guests' datagrams and UDP sockets of the host's: a socket for each port a guest sends from, while it is used."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from avmm.backends.usernet.packet import address
from avmm.backends.usernet.plan import Plan
from avmm.backends.usernet.stack import Address, Stack

#: Sockets at once; the one unused for longest makes way.
FLOWS_MAX: Final = 512
_PEERS_MAX: Final = 256
_IDLE: Final = 60.0  # seconds
_TURN: Final = 32
_LONGEST: Final = 65507


class _Flow:
    """A guest's port: a socket, who has been sent to through it, and when last."""

    def __init__(self, guest: Address, sock: socket.socket) -> None:
        self.guest = guest
        self.socket = sock
        self.used = 0.0
        self.seen_as: OrderedDict[tuple[str, int], Address] = OrderedDict()


class Datagrams:
    """All of them. ``congested()`` says that guests have no room: then what arrives for them is lost, as UDP may be."""

    def __init__(self, stack: Stack, plan: Plan, pump: Callable[[], None], congested: Callable[[], bool]) -> None:
        self._stack = stack
        self._plan = plan
        self._pump = pump
        self._congested = congested
        self._loop: asyncio.AbstractEventLoop | None = None
        self._flows: OrderedDict[Address, _Flow] = OrderedDict()
        #: Who has sent to a published port: (guest's port, whom it thinks to answer) → the socket and the real peer.
        self._callers: OrderedDict[tuple[Address, Address], tuple[socket.socket, tuple[str, int]]] = OrderedDict()
        self._sweeper: asyncio.TimerHandle | None = None
        self.dropped = 0

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """From now on, on this loop."""
        self._loop = loop

    def stop(self) -> None:
        """Close every socket."""
        for flow in list(self._flows.values()):
            self._close(flow)
        self._callers.clear()
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        self._loop = None

    def send(self, guest: Address, seen: Address, to: tuple[str, int], payload: memoryview) -> bool:
        """A guest's datagram for ``seen``, which is ``to``; whether that could be."""
        assert self._loop is not None
        flow = self._flows.get(guest)
        if flow is None or flow.socket.family != _family(to[0]):
            if flow is not None:
                self._close(flow)
            flow = self._open(guest, _family(to[0]))
            if flow is None:
                return False
        self._flows.move_to_end(guest)
        flow.used = self._loop.time()
        flow.seen_as[to] = seen
        if len(flow.seen_as) > _PEERS_MAX:
            flow.seen_as.popitem(last=False)
        try:
            flow.socket.sendto(payload, to)
        except BlockingIOError:
            self.dropped += 1
        except OSError:
            return False
        return True

    def answer(self, guest: Address, seen: Address, payload: memoryview) -> bool:
        """A guest's datagram, if it answers one that came through a published port; whether it does."""
        caller = self._callers.get((guest, seen))
        if caller is not None:
            with contextlib.suppress(OSError):
                caller[0].sendto(payload, caller[1])
        return caller is not None

    def publish(self, sock: socket.socket, port: int) -> None:
        """What arrives at ``sock`` is for the guest's ``port``."""
        assert self._loop is not None
        self._loop.add_reader(sock.fileno(), self._called, sock, port)

    def _open(self, guest: Address, family: int) -> _Flow | None:
        assert self._loop is not None
        while len(self._flows) >= FLOWS_MAX:
            self._close(next(iter(self._flows.values())))
        try:
            sock = socket.socket(family, socket.SOCK_DGRAM)
        except OSError:
            return None
        sock.setblocking(False)
        flow = self._flows[guest] = _Flow(guest, sock)
        self._loop.add_reader(sock.fileno(), self._readable, flow)
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(_IDLE, self._sweep)
        return flow

    def _close(self, flow: _Flow) -> None:
        assert self._loop is not None
        del self._flows[flow.guest]
        self._loop.remove_reader(flow.socket.fileno())
        flow.socket.close()

    def _sweep(self) -> None:
        assert self._loop is not None
        self._sweeper = None
        before = self._loop.time() - _IDLE
        for flow in list(self._flows.values()):
            if flow.used <= before:
                self._close(flow)
        if self._flows:
            self._sweeper = self._loop.call_later(_IDLE, self._sweep)

    def _readable(self, flow: _Flow) -> None:
        for payload, peer in self._arrived(flow.socket):
            seen = flow.seen_as.get(peer)
            if seen is None:  # somebody else has found the port: let it through, as a router would
                seen = self._appearance(peer)
            if seen is not None:
                self._stack.send_datagram(seen, flow.guest, payload)
        self._pump()

    def _called(self, sock: socket.socket, port: int) -> None:
        for payload, peer in self._arrived(sock):
            seen = self._appearance(peer)
            if seen is None:
                continue
            guest = (self._stack.guest, port)
            self._callers[guest, seen] = (sock, peer)
            self._callers.move_to_end((guest, seen))
            if len(self._callers) > FLOWS_MAX:
                self._callers.popitem(last=False)
            self._stack.send_datagram(seen, guest, payload)
        self._pump()

    def _appearance(self, peer: tuple[str, int]) -> Address | None:
        """As whom a guest sees a peer on the host's network: the host itself is the gateway."""
        if ":" in peer[0]:
            return None
        where = address(peer[0])
        return (self._plan.gateway if where[0] == 127 else where, peer[1])

    def _arrived(self, sock: socket.socket) -> list[tuple[bytes, tuple[str, int]]]:
        found = []
        for _ in range(_TURN):
            try:
                payload, peer = sock.recvfrom(_LONGEST)
            except OSError:  # nothing more, or a complaint about something sent before
                break
            if self._congested():
                self.dropped += 1
            else:
                found.append((payload, (peer[0], peer[1])))
        return found


def _family(host: str) -> int:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
