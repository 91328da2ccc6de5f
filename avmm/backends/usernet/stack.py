"""The user-mode network's protocols, sans-io: frames in, frames out, ``now`` as an argument.

::

    guest frames ──► input() ──► ARP · ICMP · DHCP · names · UDP · TCP ──► Host: what guests ask of the host
                     output  ◄──────────────────────────────────────────── dial(), send_datagram(), Connection
    deadline ── the moment to call poll() next

What a guest sends is believed in nothing: every length is checked, every table has its limit, and what makes no sense
is dropped and counted. Payloads handed on by :meth:`Stack.input` are views of the frame: whoever keeps one copies.
"""

from __future__ import annotations

import heapq
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Final, Protocol, TypeAlias

from avmm.backends.checksum import TCP_SUM_AT, UDP_SUM_AT, checksum, ones_sum
from avmm.backends.offload import summed
from avmm.backends.usernet import dhcp, dns
from avmm.backends.usernet.fragments import Fragments, cut
from avmm.backends.usernet.packet import (
    ARP,
    BROADCAST,
    ETHERNET,
    ICMP,
    IP_AT,
    IPV4,
    L4_AT,
    MORE_FRAGMENTS,
    NOBODY,
    PROTO_ICMP,
    PROTO_TCP,
    PROTO_UDP,
    TCP,
    TCP_DATA_AT,
    TYPE_ARP,
    TYPE_IPV4,
    UDP,
    Octets,
    TcpHeader,
    build_udp,
    name,
    pseudo,
    put_ipv4,
)
from avmm.backends.usernet.plan import Plan
from avmm.backends.usernet.tcp import ACK, RST, SYN, Connection, State
from avmm.link import Frame

#: (IPv4 address, port)
Address: TypeAlias = tuple[bytes, int]

#: Connections at once; a guest that asks for more is not answered until one ends.
CONNECTIONS_MAX: Final = 16384
#: Bytes in each direction that all connections hold together, and one of them.
_BUDGET: Final = 256 << 20
_WINDOW_MAX: Final = 1 << 20
_WINDOW_MIN: Final = 16 << 10
_MTU: Final = 1500
_NEIGHBOURS_MAX: Final = 1024
_UNRESOLVED_MAX: Final = 64
_ECHO_REPLY, _UNREACHABLE, _ECHO = 0, 3, 8
_PORT_UNREACHABLE, _PROHIBITED = 3, 13
_MULTICAST: Final = 224  # the first byte, from here on, of addresses that are no single host's (RFC 5771)


class Host(Protocol):
    """What guests ask of the host. Both may be answered at once or at any time."""

    def asked(self, connection: Connection) -> None:
        """A guest wants ``connection`` to ``connection.local``: ``accept`` or ``refuse`` it."""
        ...

    def datagram(self, source: Address, destination: Address, payload: memoryview) -> None:
        """A guest has sent a datagram."""
        ...


@dataclass
class Counters:
    """Plain numbers."""

    frames_in: int = 0
    frames_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    malformed: int = 0
    connections: int = 0
    resent: int = 0


@dataclass(frozen=True)
class Guests:
    """What a network knows of its guests at one moment: for the network of their copies, which nothing tells that the
    other ends of their connections are not there."""

    #: MAC addresses by IPv4 address.
    neighbours: dict[bytes, bytes]
    #: Of each connection: the guest's address, ours, the guest's port, ours.
    connections: tuple[bytes, ...]

    def __post_init__(self) -> None:
        """Raises ValueError for what no network knows: it may come out of a file."""
        sizes = {(len(each), len(mac)) for each, mac in self.neighbours.items()}
        if sizes - {(4, 6)} or {len(each) for each in self.connections} - {12}:
            raise ValueError("these are no addresses and connections")


class Stack:
    """One user-mode network. ``output`` collects the frames for the guests; whoever owns the stack empties it."""

    def __init__(self, host: Host, plan: Plan | None = None, *, entropy: Callable[[int], bytes] = os.urandom) -> None:
        self.plan = plan or Plan()
        self.names = dns.Names()
        #: More addresses of the network that are ours.
        self.aliases: set[bytes] = set()
        self.output: list[Frame] = []
        self.counters = Counters()
        self.window_limit = _WINDOW_MAX
        self._host = host
        self._entropy = entropy
        self._leases = dhcp.Leases(self.plan)
        self._neighbours: dict[bytes, bytes] = {}
        self._unresolved: dict[bytes, deque[tuple[Address, Address, bytes]]] = {}
        self._fragments = Fragments()
        self._idents = count(1)
        self._connections: dict[bytes, Connection] = {}
        self._due: list[Connection] = []
        self._heap: list[tuple[float, int, Connection]] = []
        self._order = count()
        self._now = 0.0

    @property
    def connections(self) -> int:
        """How many connections there are."""
        return len(self._connections)

    @property
    def guest(self) -> bytes:
        """The address of the first guest that has been heard of; before that, of the first there will be."""
        return next((each for each in self._neighbours if self.plan.is_guest(each)), self.plan.guest)

    def guests(self) -> Guests:
        """What is known of the guests now."""
        return Guests(dict(self._neighbours), tuple(self._connections))

    def adopt(self, guests: Guests) -> None:
        """These are our guests now. Each of their connections is asked how far it is, by a segment that is far from
        what it expects (RFC 9293, 3.10.7.4); the answer belongs to nothing here, and so to it comes a RST."""
        self._neighbours.update(guests.neighbours)
        for key in guests.connections:
            remote, local, ports = (
                key[:4],
                key[4:8],
                (int.from_bytes(key[10:], "big"), int.from_bytes(key[8:10], "big")),
            )
            if remote in self._neighbours and key not in self._connections:
                header = TcpHeader((self._neighbours[remote], self.plan.mac), local, remote, ports)
                for sequence in (0, 1 << 31):  # a window, 1 GiB at most, holds one of them only
                    buffer = bytearray(TCP_DATA_AT)
                    header.put(buffer, sequence, 0, ACK, 0)
                    self._emit(buffer, TCP_SUM_AT)

    # Time.

    @property
    def deadline(self) -> float | None:
        """When :meth:`poll` is to be called; None: not before the next frame."""
        return self._heap[0][0] if self._heap else None

    def poll(self, now: float) -> None:
        """Do what time has come for."""
        self._now = now
        while self._heap and self._heap[0][0] <= now:
            at, _, connection = heapq.heappop(self._heap)
            if connection.scheduled != at:
                continue  # it was moved forward
            connection.scheduled = 0.0
            if connection.alarm > now:
                self.schedule(connection, connection.alarm)
            else:
                connection.expire(now)
        self.flush()

    def flush(self) -> None:
        """Send the acknowledgements that are due: after a batch of frames, before ``output`` is looked at."""
        if self._due:
            due, self._due = self._due, []
            for connection in due:
                connection.flush()

    def reset(self) -> None:
        """The guests are gone: so are their connections. Leases stay."""
        for connection in list(self._connections.values()):
            connection.lost()
        self.output.clear()
        self._neighbours.clear()
        self._unresolved.clear()
        self._fragments = Fragments()
        self._due.clear()
        self._heap.clear()

    # What the host asks of guests.

    def dial(self, local: Address, remote: Address) -> Connection:
        """A connection to a guest's port, as from ``local``, still to be ``connect``-ed. Raises OSError when that pair
        is in use, or there are too many."""
        key = remote[0] + local[0] + remote[1].to_bytes(2, "big") + local[1].to_bytes(2, "big")
        if key in self._connections or len(self._connections) >= CONNECTIONS_MAX:
            raise OSError(f"port {local[1]} is in use towards the guest")
        return self._new(key, self._neighbours.get(remote[0], b""), local, remote)

    def send_datagram(self, source: Address, destination: Address, payload: Octets) -> None:
        """A datagram for a guest, at most 65507 bytes."""
        mac = BROADCAST if destination[0] == b"\xff" * 4 else self._neighbours.get(destination[0])
        if mac is None:
            if len(self._unresolved) < _UNRESOLVED_MAX or destination[0] in self._unresolved:
                waiting = self._unresolved.setdefault(destination[0], deque(maxlen=8))
                waiting.append((source, destination, bytes(payload)))
            self._who_has(destination[0])
            return
        macs = (mac, self.plan.mac)
        frame = build_udp(macs, source, destination, payload)
        if len(frame) - IP_AT <= _MTU:
            self._emit(frame, UDP_SUM_AT)
            return
        for piece in cut(summed(Frame(frame, L4_AT, UDP_SUM_AT)), macs, PROTO_UDP, next(self._idents) & 0xFFFF, _MTU):
            self._emit(piece, None)

    # What guests send.

    def input(self, frame: Frame, now: float) -> None:
        """Take in a frame from a guest."""
        self._now = now
        data = memoryview(frame.data)
        counters = self.counters
        counters.frames_in += 1
        counters.bytes_in += len(data)
        if len(data) < IP_AT:
            counters.malformed += 1
            return
        kind = data[12] << 8 | data[13]
        if kind == TYPE_IPV4:
            if not self._ipv4(data, frame.csum_start != 0, now):
                counters.malformed += 1
        elif kind == TYPE_ARP and not self._arp(data[IP_AT:]):
            counters.malformed += 1

    def _ipv4(self, data: memoryview, partial: bool, now: float) -> bool:
        """An IPv4 packet; whether it was well formed. ``partial``: its sender has left the checksum to others."""
        if len(data) < L4_AT:
            return False
        first, _, length, ident, fragment, _, protocol, _, source, destination = IPV4.unpack_from(data, IP_AT)
        header = (first & 15) << 2
        if first >> 4 != 4 or header < IPV4.size or not header <= length <= len(data) - IP_AT:
            return False
        if ones_sum(data[IP_AT : IP_AT + header]):
            return False
        if source != NOBODY:
            if not self.plan.inside(source) or self.claims(source):
                return False
            self._learn(source, data)
        payload = data[IP_AT + header : IP_AT + length]
        if fragment & 0x3FFF:
            key = ident.to_bytes(2, "big") + source + destination + bytes((protocol,))
            whole = self._fragments.add(key, (fragment & 0x1FFF) << 3, bool(fragment & MORE_FRAGMENTS), payload, now)
            if whole is None:
                return True
            payload, partial = memoryview(whole), False
        if protocol == PROTO_TCP:
            return self._tcp(source, destination, payload, partial, now)
        if protocol == PROTO_UDP:
            return self._udp(source, destination, payload, partial, bytes(data[6:12]))
        if protocol == PROTO_ICMP:
            return self._icmp(source, destination, payload, data[IP_AT : IP_AT + header])
        return True

    def _learn(self, source: bytes, data: memoryview) -> None:
        if source in self._neighbours and self._neighbours[source] == data[6:12]:
            return
        mac = bytes(data[6:12])
        if mac[0] & 1 or (source not in self._neighbours and len(self._neighbours) >= _NEIGHBOURS_MAX):
            return
        self._neighbours[source] = mac
        for datagram in self._unresolved.pop(source, ()):
            self.send_datagram(*datagram)
        for connection in list(self._connections.values()):
            if connection.state is State.SYN_SENT and connection.remote[0] == source:
                connection.alarm = self._now
                connection.expire(self._now)

    def claims(self, where: bytes) -> bool:
        """Whether an address of the network is ours."""
        plan = self.plan
        if where in (plan.gateway, plan.dns) or where in self.aliases:
            return True
        return plan.is_guest(where) and name(where) in self.names.values()

    def _arp(self, data: memoryview) -> bool:
        if len(data) < ARP.size:
            return False
        hardware, protocol, sizes, size, operation, sender, source, _, target = ARP.unpack_from(data)
        if (hardware, protocol, sizes, size) != (1, TYPE_IPV4, 6, 4) or operation not in (1, 2):
            return False
        if source != NOBODY and self.plan.inside(source) and not self.claims(source):
            self._learn(source, memoryview(bytes(6) + sender))
        if operation == 1 and self.claims(target):
            self._send_arp(2, sender, sender, target, source)
        return True

    def _who_has(self, where: bytes) -> None:
        self._send_arp(1, BROADCAST, bytes(6), self.plan.gateway, where)

    def _send_arp(self, operation: int, to: bytes, mac: bytes, source: bytes, target: bytes) -> None:
        ours = self.plan.mac
        frame = bytearray(ETHERNET.pack(to, ours, TYPE_ARP))
        self._emit(frame + ARP.pack(1, TYPE_IPV4, 6, 4, operation, ours, source, mac, target), None)

    def _icmp(self, source: bytes, destination: bytes, data: memoryview, header: memoryview) -> bool:
        if len(data) < ICMP.size or ones_sum(data):
            return False
        if data[0] == _ECHO and data[1] == 0 and source in self._neighbours:
            if self.claims(destination):
                self._send_icmp(_ECHO_REPLY, 0, data[4:], destination, source)
            elif not self.plan.inside(destination) and destination[0] < _MULTICAST:
                # Nobody may ping from a socket without a privilege: say so, rather than let the guest wait.
                quoted = bytes(4) + bytes(header) + bytes(data[:8])
                self._send_icmp(_UNREACHABLE, _PROHIBITED, quoted, self.plan.gateway, source)
        return True

    def _send_icmp(self, kind: int, code: int, rest: Octets, source: bytes, destination: bytes) -> None:
        body = bytearray((kind, code, 0, 0)) + rest
        body[2:4] = checksum(ones_sum(body)).to_bytes(2, "big")
        macs = (self._neighbours[destination], self.plan.mac)
        frame = bytearray(L4_AT) + body
        if len(frame) - IP_AT <= _MTU:
            put_ipv4(frame, macs, source, destination, PROTO_ICMP)
            self._emit(frame, None)
            return
        put_ipv4(frame, macs, source, destination, PROTO_ICMP)
        for piece in cut(frame, macs, PROTO_ICMP, next(self._idents) & 0xFFFF, _MTU):
            self._emit(piece, None)

    def unreachable(self, source: Address, destination: Address, payload: Octets, *, prohibited: bool = False) -> None:
        """Tell a guest that its datagram has reached nobody (RFC 792)."""
        if source[0] not in self._neighbours:
            return
        quoted = build_udp((bytes(6), bytes(6)), source, destination, memoryview(payload)[:8])
        code = _PROHIBITED if prohibited else _PORT_UNREACHABLE
        self._send_icmp(_UNREACHABLE, code, bytes(4) + quoted[IP_AT:], destination[0], source[0])

    def _udp(self, source: bytes, destination: bytes, data: memoryview, partial: bool, mac: bytes) -> bool:
        if len(data) < UDP.size:
            return False
        from_port, to_port, length, given = UDP.unpack_from(data)
        if not UDP.size <= length <= len(data):
            return False
        data = data[:length]
        if given and not partial and (ones_sum(data) + pseudo(source, destination, PROTO_UDP, length)) % 0xFFFF:
            return False
        payload = data[UDP.size :]
        plan = self.plan
        if to_port == dhcp.SERVER_PORT and destination in (b"\xff" * 4, plan.gateway):
            self._dhcp(bytes(payload[:1024]), mac)
        elif source == NOBODY or destination in (b"\xff" * 4, plan.broadcast) or destination[0] >= 224:
            pass  # for the neighbours
        else:
            if destination == plan.dns and to_port == dns.PORT:
                query = bytes(payload)
                answer = dns.answer(query, self.names) or (dns.refusal(query) if plan.isolated else None)
                if answer is not None:
                    self.send_datagram((destination, to_port), (source, from_port), answer)
                    return True
            self._host.datagram((source, from_port), (destination, to_port), payload)
        return True

    def _dhcp(self, message: bytes, mac: bytes) -> None:
        answer = self._leases.answer(message, mac)
        if answer is not None:
            # To the broadcast address: the client need not be able to take anything else yet (RFC 2131, 4.1).
            source = (self.plan.gateway, dhcp.SERVER_PORT)
            frame = build_udp((mac, self.plan.mac), source, (b"\xff" * 4, dhcp.CLIENT_PORT), answer[0])
            self._emit(frame, UDP_SUM_AT)

    def _tcp(self, source: bytes, destination: bytes, data: memoryview, partial: bool, now: float) -> bool:
        if len(data) < TCP.size:
            return False
        from_port, to_port, sequence, acknowledgement, offset, flags, window, _, _ = TCP.unpack_from(data)
        header = offset >> 4 << 2
        if not TCP.size <= header <= len(data):
            return False
        if not partial and (ones_sum(data) + pseudo(source, destination, PROTO_TCP, len(data))) % 0xFFFF:
            return False
        key = source + destination + data[:4]
        connection = self._connections.get(key)
        if connection is not None and flags & (SYN | ACK | RST) == SYN and connection.makes_way(sequence):
            connection.lost()
            connection = None
        if connection is None:
            if flags & (SYN | ACK | RST) == SYN:
                if len(self._connections) < CONNECTIONS_MAX and source in self._neighbours:
                    remote, local = (source, from_port), (destination, to_port)
                    connection = self._new(key, self._neighbours[source], local, remote)
                    connection.asked(sequence, window, data[TCP.size : header])
                    self._host.asked(connection)
            elif not flags & RST and source in self._neighbours:
                self._reset_stray(
                    source, destination, (to_port, from_port), sequence, acknowledgement, flags, len(data) - header
                )
            return True
        connection.segment(sequence, acknowledgement, flags, window, data[TCP.size : header], data[header:], now)
        return True

    def _reset_stray(
        self,
        source: bytes,
        destination: bytes,
        ports: tuple[int, int],
        sequence: int,
        acknowledgement: int,
        flags: int,
        length: int,
    ) -> None:
        """RST to a segment that belongs to nothing (RFC 9293, 3.10.7.1)."""
        header = TcpHeader((self._neighbours[source], self.plan.mac), destination, source, ports)
        buffer = bytearray(TCP_DATA_AT)
        if flags & ACK:
            header.put(buffer, acknowledgement, 0, RST, 0)
        else:
            length += (flags & 1) + (flags >> 1 & 1)
            header.put(buffer, 0, sequence + length & 0xFFFFFFFF, RST | ACK, 0)
        self._emit(buffer, TCP_SUM_AT)

    # What connections need (avmm.backends.usernet.tcp.Wire).

    def transmit(self, connection: Connection, buffer: bytearray, payload: int) -> None:
        """Send the frame in ``buffer``."""
        if not connection.header.macs[0]:
            mac = self._neighbours.get(connection.remote[0])
            if mac is None:
                self._who_has(connection.remote[0])
                return
            connection.header.macs = (mac, self.plan.mac)
            buffer[:6] = mac
        self._emit(buffer, TCP_SUM_AT, connection.mss if payload > connection.mss else 0)

    def acknowledge(self, connection: Connection) -> None:
        """An acknowledgement is due at the next :meth:`flush`."""
        self._due.append(connection)

    def schedule(self, connection: Connection, at: float) -> None:
        """Wake the connection at ``at``."""
        connection.scheduled = at
        heapq.heappush(self._heap, (at, next(self._order), connection))

    def forget(self, connection: Connection) -> None:
        """The connection has ended."""
        if self._connections.get(connection.key) is connection:
            del self._connections[connection.key]
            self._share()

    def _new(self, key: bytes, mac: bytes, local: Address, remote: Address) -> Connection:
        header = TcpHeader((mac, self.plan.mac), local[0], remote[0], (local[1], remote[1]))
        connection = Connection(self, key, header, local, remote, int.from_bytes(self._entropy(4), "big"))
        self._connections[key] = connection
        self.counters.connections += 1
        self._share()
        return connection

    def _share(self) -> None:
        share = _BUDGET // max(1, len(self._connections))
        self.window_limit = max(_WINDOW_MIN, min(_WINDOW_MAX, share))

    def _emit(self, buffer: bytearray, checksum_at: int | None, mss: int = 0) -> None:
        """A frame for the guests; the checksum at ``checksum_at`` in its TCP or UDP header is still to be made."""
        self.counters.frames_out += 1
        self.counters.bytes_out += len(buffer)
        if checksum_at is None:
            self.output.append(Frame(buffer))
        else:
            self.output.append(Frame(buffer, L4_AT, checksum_at, mss))
