"""The user-mode network's small protocols, and what hostile frames do to any of it: nothing."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avmm.backends.checksum import checksum, ones_sum
from avmm.backends.usernet import dhcp, dns
from avmm.backends.usernet.fragments import Fragments, cut
from avmm.backends.usernet.packet import (
    ARP,
    BROADCAST,
    ETHERNET,
    IP_AT,
    L4_AT,
    PROTO_ICMP,
    PROTO_UDP,
    TCP,
    TCP_DATA_AT,
    TYPE_ARP,
    TYPE_IPV4,
    UDP_DATA_AT,
    TcpHeader,
    address,
    build_udp,
    put_ipv4,
)
from avmm.backends.usernet.plan import Plan
from avmm.backends.usernet.stack import Address, Guests, Stack
from avmm.backends.usernet.tcp import ACK, PSH, RST, SYN, Connection
from avmm.link import Frame

MAC = bytes.fromhex("525400123456")
GUEST, GATEWAY, DNS = address("10.0.2.15"), address("10.0.2.2"), address("10.0.2.3")
MACS = (Plan().mac, MAC)


class Host:
    """Takes every second connection and remembers datagrams."""

    def __init__(self) -> None:
        self.datagrams: list[tuple[Address, Address, bytes]] = []
        self.asked_for: list[Connection] = []
        self.now = 0.0

    def asked(self, connection: Connection) -> None:
        self.asked_for.append(connection)
        if len(self.asked_for) % 2:
            connection.accept(self, self.now)
        else:
            connection.refuse()

    def datagram(self, source: Address, destination: Address, payload: memoryview) -> None:
        self.datagrams.append((source, destination, bytes(payload)))

    def opened(self) -> None: ...

    def received(self, data: memoryview) -> int:
        return len(data) // 2

    def ended(self) -> None: ...

    def room(self) -> None: ...

    def closed(self, reset: bool) -> None: ...


@pytest.fixture
def stack() -> Stack:
    return Stack(Host())


def taken(stack: Stack) -> list[bytes]:
    """The frames the stack has sent, as bytes."""
    stack.flush()
    frames, stack.output = stack.output, []
    return [bytes(frame.data) for frame in frames]


def udp(to: Address, payload: bytes, port: int = 5000) -> Frame:
    return Frame(build_udp(MACS, (GUEST, port), to, payload), L4_AT, 6)


def slow_sum(data: bytes) -> int:
    """RFC 1071, as its text has it."""
    number = 0
    for at in range(0, len(data), 2):
        number += int.from_bytes(data[at : at + 2].ljust(2, b"\0"), "big")
    while number >> 16:
        number = (number & 0xFFFF) + (number >> 16)
    return number


@given(st.binary(max_size=200))
def test_sums(data: bytes) -> None:
    assert ones_sum(data) % 0xFFFF == slow_sum(data) % 0xFFFF


def test_arp_answers_for_what_is_ours(stack: Stack) -> None:
    def ask(target: str) -> list[bytes]:
        body = ARP.pack(1, TYPE_IPV4, 6, 4, 1, MAC, GUEST, bytes(6), address(target))
        stack.input(Frame(ETHERNET.pack(BROADCAST, MAC, TYPE_ARP) + body), 0.0)
        return taken(stack)

    (answer,) = ask("10.0.2.2")
    assert ETHERNET.unpack_from(answer) == (MAC, Plan().mac, TYPE_ARP)
    assert ARP.unpack_from(answer, IP_AT)[4:] == (2, Plan().mac, GATEWAY, MAC, GUEST)
    assert ask("10.0.2.15") == ask("10.0.2.100") == ask("10.9.9.9") == []
    stack.names["API.test."] = "10.0.2.100"
    assert len(ask("10.0.2.100")) == 1


def test_ping(stack: Stack) -> None:
    body = bytearray(struct.pack("!BBHHH", 8, 0, 0, 7, 1) + bytes(range(56)))
    body[2:4] = checksum(ones_sum(body)).to_bytes(2, "big")
    frame = bytearray(L4_AT) + body
    put_ipv4(frame, MACS, GUEST, GATEWAY, PROTO_ICMP)
    stack.input(Frame(frame), 0.0)
    (answer,) = taken(stack)
    assert answer[L4_AT] == 0
    assert slow_sum(answer[L4_AT:]) == 0xFFFF
    assert slow_sum(answer[IP_AT:L4_AT]) == 0xFFFF
    assert answer[L4_AT + 4 :] == bytes(body[4:])
    # Beyond the network nobody can be pinged, which is said at once (RFC 1812, 5.2.7.1); groups are not answered for.
    for where in ("192.0.2.1", "10.0.2.99", "224.0.0.1", "255.255.255.255"):
        put_ipv4(frame, MACS, GUEST, address(where), PROTO_ICMP)
        stack.input(Frame(frame), 0.0)
    (answer,) = taken(stack)
    assert answer[L4_AT : L4_AT + 2] == b"\3\x0d"
    assert answer[L4_AT + 8 + 12 : L4_AT + 8 + 20] == GUEST + address("192.0.2.1")
    assert answer[L4_AT + 28 :] == bytes(body[:8])
    assert slow_sum(answer[L4_AT:]) == 0xFFFF


def test_a_copy_of_a_guest_is_told_that_its_connections_are_gone() -> None:
    """Whatever it expects, one of two segments is beyond its window; and its answer belongs to nothing."""
    parent, stack = Stack(Host()), Stack(Host())
    header = TcpHeader(MACS, GUEST, GATEWAY, (5000, 80))
    frame = bytearray(TCP_DATA_AT)
    header.put(frame, 1000, 0, SYN, 8000)
    parent.input(Frame(frame, L4_AT, 16), 0.0)
    stack.adopt(parent.guests())
    asked = taken(stack)
    assert [TCP.unpack_from(each, L4_AT)[:6] for each in asked] == [
        (80, 5000, sequence, 0, 0x50, ACK) for sequence in (0, 1 << 31)
    ]
    assert {bytes(each[:6]) for each in asked} == {MAC}
    header.put(frame, 1001, 7777, ACK, 8000)
    stack.input(Frame(frame, L4_AT, 16), 0.0)
    (answer,) = taken(stack)
    assert TCP.unpack_from(answer, L4_AT)[:6] == (80, 5000, 7777, 0, 0x50, RST)
    stack.adopt(Guests({}, (bytes(12),)))  # of a guest that has never been heard of
    assert taken(stack) == []


@pytest.mark.parametrize("bad", [({GUEST: b"long enough"}, ()), ({}, (bytes(11),)), ({b"": MAC}, ())])
def test_guests_that_cannot_be(bad: tuple[dict[bytes, bytes], tuple[bytes, ...]]) -> None:
    with pytest.raises(ValueError, match="no addresses"):
        Guests(*bad)


def test_dhcp_gives_each_card_its_own_address() -> None:
    leases = dhcp.Leases(Plan(hostname="guest"))

    def ask(mac: bytes, kind: int, wanted: str = "") -> tuple[bytes, dict[int, bytes]]:
        head = struct.pack("!BBBBIHH16x16s192x4s", 1, 1, 6, 0, 0x1234, 0, 0, mac, b"\x63\x82\x53\x63")
        options = bytes((53, 1, kind)) + (bytes((50, 4)) + address(wanted) if wanted else b"") + b"\xff"
        answer = leases.answer(head + options, mac)
        assert answer is not None
        assert answer[0][4:8] == head[4:8]
        return answer[0][16:20], dhcp.options(answer[0][240:])

    offered, options = ask(MAC, 1)
    assert (offered, options[53], options[54]) == (GUEST, b"\x02", GATEWAY)
    assert (options[1], options[3], options[6]) == (address("255.255.255.0"), GATEWAY, DNS)
    assert options[12] == b"guest"
    assert ask(MAC, 3, "10.0.2.15")[1][53] == b"\x05"
    assert ask(MAC, 3, "10.0.2.77")[1][53] == b"\x06"
    assert ask(MAC[:5] + b"\x01", 1)[0] == address("10.0.2.16")
    for number in range(400):
        leases.of(number.to_bytes(6, "big"))
    assert leases.of(b"\xee" * 6) is None  # there are no more
    assert leases.answer(b"", MAC) is None


def query(name: str, kind: int = 1) -> bytes:
    labels = b"".join(bytes((len(label),)) + label.encode() for label in name.split("."))
    return struct.pack("!HHHHHH", 77, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack("!HH", kind, 1)


def test_own_names_and_the_rest() -> None:
    host = Host()
    stack = Stack(host)
    stack.names["api.test"] = "10.0.2.100"
    introduce(stack)
    stack.input(udp((DNS, 53), query("API.Test")), 0.0)
    (answer,) = taken(stack)
    message = answer[UDP_DATA_AT:]
    assert message[:4] == struct.pack("!HH", 77, 0x8580)
    assert message.endswith(address("10.0.2.100"))
    stack.input(udp((DNS, 53), query("api.test", 28)), 0.0)  # AAAA: there is such a name, and no such address
    (answer,) = taken(stack)
    assert answer[UDP_DATA_AT + 6 : UDP_DATA_AT + 8] == b"\0\0"
    stack.input(udp((DNS, 53), query("example.org")), 0.0)
    assert taken(stack) == []
    assert host.datagrams == [((GUEST, 5000), (DNS, 53), query("example.org"))]
    with pytest.raises(ValueError, match="not an IPv4 address"):
        stack.names["x"] = "somewhere"


def test_an_isolated_network_resolves_nothing_else() -> None:
    host = Host()
    stack = Stack(host, Plan(isolated=True))
    introduce(stack)
    stack.input(udp((DNS, 53), query("example.org")), 0.0)
    (answer,) = taken(stack)
    assert answer[UDP_DATA_AT + 3] & 15 == 5
    assert not host.datagrams


def introduce(stack: Stack) -> None:
    """Let the stack learn where the guest is."""
    stack.input(udp((address("10.0.2.200"), 9), b""), 0.0)
    taken(stack)
    host = stack._host
    assert isinstance(host, Host)
    host.datagrams.clear()


@given(st.integers(0, 65507), st.integers(576, 1500))
@settings(max_examples=30, deadline=None)
def test_fragments_there_and_back(size: int, mtu: int) -> None:
    payload = random.Random(size).randbytes(size)
    whole = build_udp(MACS, (GUEST, 1), (GATEWAY, 2), payload)
    pieces = cut(whole, MACS, PROTO_UDP, 9, mtu)
    random.Random(size).shuffle(pieces)
    fragments = Fragments()
    for number, piece in enumerate(pieces, 1):
        assert len(piece) <= IP_AT + mtu
        (fragment,) = struct.unpack_from("!H", piece, IP_AT + 6)
        more = bool(fragment & 0x2000)
        found = fragments.add(b"k", (fragment & 0x1FFF) * 8, more, memoryview(piece)[L4_AT:], 0.0)
        assert (found is not None) is (number == len(pieces))
    assert found == whole[L4_AT:]


def test_large_datagrams_both_ways() -> None:
    host = Host()
    stack = Stack(host)
    introduce(stack)
    payload = random.Random(1).randbytes(9000)
    stack.send_datagram((GATEWAY, 7), (GUEST, 5000), payload)
    frames = taken(stack)
    assert len(frames) == 7
    # The same, sent back by a guest.
    frame = build_udp(MACS, (GUEST, 5000), (GATEWAY, 7), payload)
    frame[L4_AT + 6 : L4_AT + 8] = checksum(ones_sum(memoryview(frame)[L4_AT:])).to_bytes(2, "big")
    for piece in cut(frame, MACS, PROTO_UDP, 3, 1500):
        stack.input(Frame(piece), 0.0)
    assert host.datagrams == [((GUEST, 5000), (GATEWAY, 7), payload)]


def test_bad_checksums_are_dropped(stack: Stack) -> None:
    introduce(stack)
    frame = build_udp(MACS, (GUEST, 5000), (GATEWAY, 7), b"hello")
    stack.input(Frame(frame), 0.0)  # says that its checksum is complete, and it is not
    assert stack.counters.malformed == 1
    frame[IP_AT + 8] ^= 1
    stack.input(Frame(frame, L4_AT, 6), 0.0)
    assert stack.counters.malformed == 2


def samples() -> list[bytes]:
    """A frame of each kind."""
    found = [bytes(udp(to, b"x" * 20).data) for to in ((GATEWAY, 67), (DNS, 53), (GATEWAY, 7), (b"\xff" * 4, 67))]
    found.append(bytes(udp((DNS, 53), query("example.org")).data))
    found.append(ETHERNET.pack(BROADCAST, MAC, TYPE_ARP) + ARP.pack(1, TYPE_IPV4, 6, 4, 1, MAC, GUEST, MAC, GATEWAY))
    for flags, options, size in ((SYN, b"\x02\x04\x05\xb4\x01\x03\x03\x07", 0), (ACK, b"", 0), (ACK | PSH, b"", 3000)):
        buffer = bytearray(L4_AT + 20 + len(options) + size)
        TcpHeader(MACS, GUEST, GATEWAY, (6000, 80)).put(buffer, 1000, 0, flags, 65535, options)
        found.append(bytes(buffer))
    return found


SAMPLES = samples()


@given(
    st.lists(
        st.one_of(
            st.binary(max_size=100).map(lambda data: (data, 0)),
            st.tuples(
                st.sampled_from(SAMPLES),
                st.lists(st.tuples(st.integers(0, 120), st.integers(0, 255)), max_size=4),
                st.integers(0, 120),
                st.sampled_from([0, L4_AT]),
            ).map(lambda mix: (mutate(mix[0], mix[1], mix[2]), mix[3])),
        ),
        max_size=40,
    )
)
@settings(max_examples=300, deadline=None)
def test_fuzz(frames: list[tuple[bytes, int]]) -> None:
    """No frame or row of frames raises anything, or leaves more behind than its limit."""
    host = Host()
    stack = Stack(host, entropy=bytes)
    for data, start in frames:
        stack.input(Frame(data, start, 16 if start else 0), host.now)
        host.now += 0.01
        stack.poll(host.now)
    assert len(stack.output) <= 4 * len(frames)
    while stack.deadline is not None:
        host.now = max(host.now, stack.deadline)
        stack.poll(host.now)
        assert host.now < 10_000
    assert stack.connections == len([each for each in stack._connections.values() if each.state.name == "OPEN"])


def mutate(data: bytes, changes: list[tuple[int, int]], cut_off: int) -> bytes:
    """``data`` with some bytes changed, and some fewer; the IPv4 checksum made right, or nobody would look further."""
    changed = bytearray(data[: len(data) - cut_off] if cut_off < 40 else data)
    for at, value in changes:
        if at < len(changed):
            changed[at] = value
    if len(changed) >= L4_AT and changed[12:14] == b"\x08\x00":
        changed[IP_AT + 10 : IP_AT + 12] = b"\0\0"
        header = memoryview(changed)[IP_AT : IP_AT + (changed[IP_AT] & 15) * 4]
        changed[IP_AT + 10 : IP_AT + 12] = checksum(ones_sum(bytes(header))).to_bytes(2, "big")
    return bytes(changed)


@given(st.binary(max_size=600), st.integers(0, 3))
def test_fuzz_parsers(data: bytes, front: int) -> None:
    dns.question(data)
    dns.answer(data, {"": "1.2.3.4"})
    dhcp.options(data)
    head = struct.pack("!BBBBIHH16x16s192x4s", 1, 1, 6, 0, 1, 0, 0, MAC, b"\x63\x82\x53\x63")
    dhcp.Leases(Plan()).answer(head + bytes((53, 1, front)) + data, MAC)


def test_tables_are_bounded() -> None:
    host = Host()
    stack = Stack(host)
    introduce(stack)
    for number in range(70_000):
        buffer = bytearray(L4_AT + 20)
        header = TcpHeader(MACS, GUEST, GATEWAY, (number & 0xFFFF, 80 + (number >> 16)))
        header.put(buffer, 1, 0, SYN, 65535)
        if number & 1:
            host.asked_for.append(host.asked_for[0])  # refuse nothing
        stack.input(Frame(buffer, L4_AT, 16), 0.0)
        stack.output.clear()
        host.asked_for = host.asked_for[:2]
    assert stack.connections == 16384
    assert stack.window_limit * stack.connections <= 256 << 20
    for number in range(5000):
        stack.send_datagram((GATEWAY, 1), (address("10.0.2.0")[:2] + number.to_bytes(2, "big"), 1), b"x")
    assert len(stack._unresolved) <= 64
