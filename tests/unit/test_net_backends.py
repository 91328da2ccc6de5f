"""Cable, switch, sockets, software offload and recordings: the host's half of a network, without a guest."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from avmm.backends.cable import Cable
from avmm.backends.offload import finished
from avmm.backends.pcap import Pcap
from avmm.backends.stream import FRAME_MAX, Deframer, Stream, connect_or_listen
from avmm.backends.switch import Switch
from avmm.backends.usernet.packet import IP_AT, L4_AT, build_udp, put_ipv4
from avmm.config import NetConfig, PublishConfig, VmConfig, net_configs
from avmm.errors import ConfigError, HostError
from avmm.link import End, Frame, join, part

needs_tshark = pytest.mark.skipif(shutil.which("tshark") is None, reason="checks with tshark")

A, B, C = (bytes.fromhex(f"02000000000{n}") for n in range(1, 4))
EVERYBODY = b"\xff" * 6


def tcp(version: int, payload: bytes, gso_size: int = 0, vlan: bool = False, sender: bytes = A) -> Frame:
    """A segment as a guest sends it: no checksum but the pseudo header's."""
    header = struct.pack(">HHIIBBHHH", 1234, 80, 0xFFFFFE00, 7, 0x80, 0x99, 500, 0, 0) + b"\1" * 12
    length = len(header) + len(payload)
    if version == 4:
        addresses = bytes([10, 0, 0, 1, 10, 0, 0, 2])
        ip = struct.pack(">BBHHHBBH", 0x45, 0, 20 + length, 0xFFFF, 0x4000, 64, 6, 0) + addresses
        words = sum(struct.unpack(">10H", ip))
        words = (words & 0xFFFF) + (words >> 16)
        ip = ip[:10] + struct.pack(">H", ~((words & 0xFFFF) + (words >> 16)) & 0xFFFF) + ip[12:]
    else:
        addresses = bytes(range(1, 33))
        ip = struct.pack(">IHBB", 6 << 28, length, 6, 64) + addresses
    pseudo = sum(struct.unpack(f">{len(addresses) // 2}H", addresses)) + 6 + length
    pseudo = (pseudo & 0xFFFF) + (pseudo >> 16)
    kind = (b"\x81\0\0\x05" if vlan else b"") + (b"\x08\0" if version == 4 else b"\x86\xdd")
    front = B + sender + kind + ip
    at = len(front)
    header = header[:16] + struct.pack(">H", (pseudo & 0xFFFF) + (pseudo >> 16)) + header[18:]
    return Frame(front + header + payload, at, 16, gso_size)


def fields(path: Path, *names: str) -> list[list[str]]:
    """What tshark makes of a recording, checksums checked."""
    argv = ["tshark", "-r", str(path), "-T", "fields", "-o", "tcp.check_checksum:TRUE", "-o", "ip.check_checksum:TRUE",
            "-o", "udp.check_checksum:TRUE",
            "-o", "tcp.relative_sequence_numbers:FALSE", "-o", "tcp.analyze_sequence_numbers:FALSE"]  # fmt: skip
    for name in names:
        argv += ["-e", name]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    return [line.split("\t") for line in done.stdout.splitlines()]


@needs_tshark
@pytest.mark.parametrize("vlan", [False, True])
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("size", [1000, 999, 4096, 5001])
def test_segments_are_what_tshark_expects(version: int, vlan: bool, size: int, tmp_path: Path) -> None:
    payload = bytes(itertools.islice(itertools.cycle(range(251)), 5001))
    frame = tcp(version, payload, size, vlan)
    pcap = Pcap(tmp_path / "cap")
    for each in finished(frame):
        assert not each.csum_start
        pcap.record(each)
    pcap.record(frame)  # in one piece, with a checksum all the same
    pcap.record(Frame(frame.data, frame.csum_start, frame.csum_offset))
    pcap.close()
    *rows, whole, same = fields(
        tmp_path / "cap", "tcp.checksum.status", "ip.checksum.status", "tcp.seq_raw", "tcp.len", "tcp.flags.fin",
        "tcp.flags.push", "tcp.flags.cwr", "ip.id", "tcp.payload",
    )  # fmt: skip
    assert len(rows) == -(-len(payload) // size)
    assert whole == same
    assert whole[0] == "1"
    assert bytes.fromhex(whole[8]) == payload
    for number, row in enumerate(rows):
        good, good_ip, sequence, length, fin, push, cwr, identity, data = row
        last = number == len(rows) - 1
        assert good == "1"
        assert good_ip == ("1" if version == 4 else "")
        assert int(sequence) == 0xFFFFFE00 + number * size & 0xFFFFFFFF
        assert bytes.fromhex(data) == payload[number * size :][:size]
        assert int(length) == len(payload[number * size :][:size])
        assert (fin, push) == (("1", "1") if last else ("0", "0"))
        assert cwr == ("1" if number == 0 else "0")
        assert identity == (f"0x{0xFFFF + number & 0xFFFF:04x}" if version == 4 else "")


@needs_tshark
def test_a_checksum_of_nothing(tmp_path: Path) -> None:
    """Where all words add up to 0xFFFF the checksum is 0 (RFC 1624, 3), but UDP's is 0xFFFF (RFC 768)."""
    macs = (B, A)
    pcap = Pcap(tmp_path / "cap")
    for size in (0, 1000):  # whole, and cut into segments: the first is to be like that
        frame = tcp(4, bytes(1000) + b"more", size)
        first = bytes(finished(frame)[0].data)
        (left,) = struct.unpack_from(">H", first, frame.csum_start + 16)
        data = bytearray(frame.data)
        struct.pack_into(">H", data, frame.header_size, left)
        for each in finished(Frame(data, frame.csum_start, 16, size)):
            pcap.record(each)
    header = bytearray(L4_AT)
    put_ipv4(header, macs, bytes(4), bytes(4), 17)
    (left,) = struct.unpack_from(">H", header, IP_AT + 10)
    put_ipv4(header, macs, bytes(4), bytes(4), 17, ident=left)
    pcap.record(Frame(header))
    datagram = build_udp(macs, (bytes(4), 1000), (bytes(4), 2000), bytes(2))
    (left,) = struct.unpack_from(">H", finished(Frame(datagram, L4_AT, 6))[0].data, L4_AT + 6)
    datagram[-2:] = left.to_bytes(2, "big")
    pcap.record(Frame(datagram, L4_AT, 6))
    pcap.close()
    whole, cut, rest, header_alone, udp = fields(
        tmp_path / "cap", "tcp.checksum.status", "tcp.checksum", "ip.checksum.status", "ip.checksum",
        "udp.checksum.status", "udp.checksum",
    )  # fmt: skip
    assert whole[:2] == cut[:2] == ["1", "0x0000"]
    assert rest[0] == "1"
    assert header_alone[2:4] == ["1", "0x0000"]
    assert udp[4:] == ["1", "0xffff"]


@given(
    data=st.binary(min_size=14, max_size=200),
    start=st.integers(1, 300),
    offset=st.integers(0, 300),
    size=st.integers(0, 70000),
)
def test_nonsense_is_dropped_or_left(data: bytes, start: int, offset: int, size: int) -> None:
    for kind in (b"\x08\0", b"\x86\xdd"):
        for frame in finished(Frame(data[:12] + kind + data[14:], start, offset, size)):
            assert len(frame.data) <= len(data)


@needs_tshark
def test_a_recording_has_nanoseconds_and_survives_a_full_disk(tmp_path: Path) -> None:
    pcap = Pcap(tmp_path / "cap")
    for _ in range(3):
        pcap.record(Frame(A + B + b"\x08\0" + bytes(46)))
    assert len({row[0] for row in fields(tmp_path / "cap", "frame.time_epoch")}) == 3  # not closed yet
    pcap.close()
    done = subprocess.run(["capinfos", "-t", tmp_path / "cap"], capture_output=True, text=True)
    assert "nanosecond" in done.stdout
    full = Pcap(tmp_path / "cap")
    with open("/dev/full", "wb") as device:
        os.dup2(device.fileno(), full._fd)
    for _ in range(3):
        full.record(Frame(bytes(60)))
    full.close()
    with pytest.raises(ConfigError, match="No space"):
        Pcap(Path("/dev/full"))
    with pytest.raises(ConfigError, match="No such file"):
        Pcap(tmp_path / "nowhere" / "cap")


# The cable.


class Owner:
    """Whoever is at an end of a link, and keeps what it is sent."""

    def __init__(self, *, offload: bool = True) -> None:
        self.end = End(self._receive, offload=offload)
        self.frames: list[Frame] = []
        self.full = False
        self.room: int = 0
        self.end.on_room = self._room
        self._some = asyncio.Event()

    def _receive(self, frame: Frame) -> bool:
        if not self.full:
            self.frames.append(frame)
            self._some.set()
        return not self.full

    def _room(self) -> None:
        self.room += 1

    @property
    def heard(self) -> list[bytes]:
        return [bytes(frame.data) for frame in self.frames]

    async def hears(self, count: int) -> list[bytes]:
        async with asyncio.timeout(30):
            while len(self.frames) < count:
                self._some.clear()
                await self._some.wait()
        return self.heard

    def say(self, data: bytes, to: bytes = EVERYBODY, sender: bytes = A) -> bool:
        return self.end.send(Frame(to + sender + b"\x88\xb5" + data))


def cabled(*, offload: bool = True) -> tuple[Cable, Owner, Owner]:
    cable, card, network = Cable(), Owner(offload=offload), Owner(offload=offload)
    join(card.end, cable.card)
    join(network.end, cable.network)
    return cable, card, network


def numbered(count: int) -> list[Frame]:
    return [Frame(bytes(14) + number.to_bytes(2, "big")) for number in range(count)]


def numbers(frames: list[bytes]) -> list[int]:
    return [int.from_bytes(frame[14:16], "big") for frame in frames]


async def test_a_cable_passes_everything_on() -> None:
    cable, card, network = cabled()
    for frame in numbered(3):
        assert card.end.send(frame)
        assert network.end.send(frame)
    assert numbers(card.heard) == numbers(network.heard) == [0, 1, 2]
    assert cable.counters["out_frames"] == 3
    assert cable.counters["in_bytes"] == 48


async def test_a_cable_finishes_what_the_far_end_cannot() -> None:
    cable, card, network = cabled(offload=False)
    frame = tcp(4, bytes(3000), 1000)
    network.full = True
    assert card.end.send(frame)  # cut up, and waiting
    assert not card.end.send(frame)
    assert card.room == 0
    network.full = False
    network.end.room()
    assert len(network.frames) == 3
    assert all(not each.csum_start for each in network.frames)
    assert card.room == 1
    assert cable.counters["out_frames"] == 1


async def test_a_cable_refuses_when_the_far_end_does() -> None:
    _, card, network = cabled()
    network.full = True
    first, second = numbered(2)
    assert not card.end.send(first)
    network.full = False
    network.end.room()
    assert card.room == 1
    assert card.end.send(first)
    assert card.end.send(second)
    assert numbers(network.heard) == [0, 1]


async def test_whoever_was_refused_hears_when_a_cable_is_emptied() -> None:
    """As when a guest resets that had no room: its next card is another one."""
    switch = Switch()
    sender, far = switched(switch, "sender", "far")
    cable, card, _ = cabled()
    part(cable.network)
    join(cable.network, switch.plug(cable))
    card.full = True
    for _ in range(3):
        sender.say(b"to a guest without room")
    part(card.end)
    another = Owner()
    join(another.end, cable.card)
    cable.clear()
    sender.say(b"and one more")
    assert len(another.frames) == 4
    assert len(far.frames) == 4


async def test_loss_is_reproducible() -> None:
    def lost(seed: int) -> list[int]:
        cable, card, network = cabled()
        cable.drop(0.2, seed=seed, way="out")
        for frame in numbered(1000):
            assert card.end.send(frame)
            network.end.send(frame)
        assert len(card.frames) == 1000  # the other way is as it was
        assert cable.counters["out_dropped"] == 1000 - len(network.frames)
        cable.heal()
        card.end.send(Frame(bytes(14) + b"\xff\xff"))
        assert numbers(network.heard)[-1] == 0xFFFF
        return numbers(network.heard)

    assert lost(1) == lost(1) != lost(2)
    assert 700 < len(lost(1)) < 900


@pytest.mark.parametrize("fault", ["reorder", "duplicate"])
async def test_other_faults_are_reproducible(fault: str) -> None:
    def heard(seed: int) -> list[int]:
        cable, card, network = cabled()
        getattr(cable, fault)(0.2, seed=seed, way="out")
        for frame in numbered(500):
            assert card.end.send(frame)
        cable.clear()
        return numbers(network.heard)

    found = heard(1)
    assert found == heard(1) != heard(2)
    assert {*found} >= {*range(499)}  # the last may have waited to be overtaken
    assert found != sorted({*found})


async def test_frames_come_twice_late_and_out_of_order() -> None:
    cable, card, network = cabled()
    cable.duplicate(1.0)
    for frame in numbered(3):
        card.end.send(frame)
    assert numbers(network.heard) == [0, 0, 1, 1, 2, 2]
    cable.heal()
    network.frames.clear()
    cable.reorder(0.5, seed=3)
    for frame in numbered(100):
        card.end.send(frame)
    found = numbers(await network.hears(100))
    assert found != sorted(found)
    assert sorted(found) == list(range(100))
    cable.heal()
    network.frames.clear()
    cable.delay(0.02)
    began = asyncio.get_running_loop().time()
    for frame in numbered(50):
        card.end.send(frame)
    assert not network.frames
    assert numbers(await network.hears(50)) == list(range(50))
    assert asyncio.get_running_loop().time() - began >= 0.018
    cable.heal()
    network.frames.clear()
    cable.delay(0.01, jitter=0.01, seed=1)
    for frame in numbered(50):
        card.end.send(frame)
    found = numbers(await network.hears(50))
    assert sorted(found) == list(range(50)) != found


async def test_a_fault_meets_each_segment() -> None:
    cable, card, network = cabled()
    cable.drop(0.5, seed=5)
    for _ in range(20):
        card.end.send(tcp(4, bytes(10000), 1000))
    assert 50 < len(network.frames) < 150


def test_faults_that_cannot_be() -> None:
    cable = Cable()
    wrong: list[Callable[[], None]] = [
        lambda: cable.drop(2.0),
        lambda: cable.delay(-1),
        lambda: cable.reorder(0.5, way="up"),  # type: ignore[arg-type]  # that is the point
    ]
    for each in wrong:
        with pytest.raises(ConfigError):
            each()


# The switch.


def switched(switch: Switch, *names: str) -> list[Owner]:
    owners = [Owner() for _ in names]
    for owner in owners:
        join(owner.end, switch.plug(owner))
    return owners


def test_a_switch_learns() -> None:
    a, b, c = switched(Switch(), "a", "b", "c")
    a.say(b"hello")
    assert len(b.frames) == len(c.frames) == 1
    assert not a.frames
    b.say(b"hello yourself", to=A, sender=B)
    assert len(a.frames) == 1
    assert len(c.frames) == 1
    a.say(b"again", to=B)
    assert len(b.frames) == 2
    assert len(c.frames) == 1
    c.say(b"I am A now", sender=A)
    b.say(b"where?", to=A, sender=B)
    assert len(a.frames) == 2
    assert c.heard[-1].endswith(b"where?")


def test_a_switch_is_partitioned_and_healed() -> None:
    switch = Switch()
    a, b, c = switched(switch, "a", "b", "c")
    switch.partition(a, [b, c])
    a.say(b"one")
    b.say(b"two", sender=B)
    assert not a.frames
    assert len(b.frames) == 0
    assert len(c.frames) == 1
    assert switch.counters()["kept_apart"] == 3
    switch.heal()
    a.say(b"three")
    assert len(b.frames) == 1
    with pytest.raises(ConfigError):
        switch.partition(a, object())
    with pytest.raises(ConfigError):
        switch.partition(a, [a, b])


def test_a_guest_that_takes_nothing_loses_frames_and_stops_nobody() -> None:
    switch = Switch()
    a, b, c = switched(switch, "a", "b", "c")
    b.full = True
    for _ in range(200):
        assert a.say(bytes(60000))
    assert len(c.frames) == 200
    assert 0 < switch.counters()["dropped"] < 200
    b.full = False
    b.end.room()
    assert len(b.frames) + switch.counters()["dropped"] == 200


def test_an_unplugged_port_is_forgotten() -> None:
    switch = Switch()
    a, b, c = switched(switch, "a", "b", "c")
    b.say(b"here", sender=B)
    assert b.end.peer is not None
    switch.unplug(b.end.peer)
    assert b.end.peer is None
    a.say(b"gone?", to=B)
    assert c.heard[-1].endswith(b"gone?")  # nobody knows where it is any more


def test_a_switch_remembers_no_more_than_it_can() -> None:
    switch = Switch()
    a, b = switched(switch, "a", "b")
    for number in range(10000):
        a.say(b"", sender=b"\2" + number.to_bytes(5, "big"))
    assert len(switch._learnt) <= 4096
    assert len(b.frames) == 10000


# Sockets.


@given(st.lists(st.binary(min_size=14, max_size=100), max_size=10), st.lists(st.integers(1, 40)))
def test_a_stream_is_cut_into_frames_wherever_it_is_cut(frames: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(struct.pack(">I", len(frame)) + frame for frame in frames)
    deframer = Deframer()
    found = []
    for cut in cuts:
        found += deframer.feed(stream[:cut])
        stream = stream[cut:]
    assert found + deframer.feed(stream) == frames


@pytest.mark.parametrize("length", [0, 13, FRAME_MAX + 1, 0xFFFFFFFF])
def test_a_stream_of_something_else_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="a frame of"):
        Deframer().feed(struct.pack(">I", length))


async def test_processes_meet_at_a_socket(tmp_path: Path) -> None:
    """Whoever comes first is the switch; when it goes, the others find each other again."""
    path = tmp_path / "net"
    streams, owners, tasks = [], [], []
    for _ in range(3):
        stream, owner = Stream(path), Owner()
        join(owner.end, stream.end)
        streams.append(stream)
        owners.append(owner)
        tasks.append(asyncio.create_task(stream.run()))
    a, b, c = owners
    await _say_until_heard(b, [a, c])
    big = tcp(4, bytes(range(256)) * 250, 1448, sender=C)
    for owner in owners:
        owner.frames.clear()
    c.say(b"it is me", sender=C)
    for _ in range(10):
        c.end.send(big)
    wanted = 10 * -(-64000 // 1448)
    found = await b.hears(1 + wanted)
    assert b"".join(frame[66:] for frame in found[1:]) == bytes(range(256)) * 2500
    assert len(a.frames) == 1  # the rest was not for it
    tasks[0].cancel()
    await asyncio.gather(tasks[0], return_exceptions=True)
    streams[0].close()
    await _say_until_heard(b, [c])
    for task, stream in zip(tasks[1:], streams[1:], strict=True):
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        stream.close()
    assert not path.exists()


async def _say_until_heard(speaker: Owner, listeners: list[Owner]) -> None:
    before = [len(each.frames) for each in listeners]
    async with asyncio.timeout(30):
        while any(len(each.frames) == count for each, count in zip(listeners, before, strict=True)):
            speaker.say(b"anybody?", sender=B)
            await asyncio.sleep(0.001)


async def test_a_stranger_at_the_socket_is_hung_up_on(tmp_path: Path) -> None:
    stream = Stream(tmp_path / "net")
    task = asyncio.create_task(stream.run())
    reader, writer = await asyncio.open_unix_connection(tmp_path / "net")
    writer.write(b"GET / HTTP/1.0\r\n\r\n")
    async with asyncio.timeout(30):
        assert await reader.read() == b""
    writer.close()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    stream.close()


def test_sockets_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a socket")
    for path in (tmp_path / "nowhere" / "net", tmp_path / "file"):
        with pytest.raises(HostError, match=str(path)):
            Stream(path)
    assert (tmp_path / "file").read_text() == "not a socket"
    with pytest.raises(ConfigError, match="too long"):
        Stream(tmp_path / ("x" * 200))
    with socket.socket(socket.AF_UNIX) as left:  # by a process that was killed
        left.bind(str(tmp_path / "stale"))
    Stream(tmp_path / "stale").close()


def test_of_many_at_once_one_listens(tmp_path: Path) -> None:
    """And all others reach it, though each finds the socket of a process that was killed."""
    path = tmp_path / "net"
    with ThreadPoolExecutor(4) as pool:
        for _ in range(100):
            with socket.socket(socket.AF_UNIX) as left:
                left.bind(str(path))
            together = threading.Barrier(4)

            def meet(together: threading.Barrier = together) -> tuple[socket.socket, bool]:
                together.wait()
                return connect_or_listen(path)

            found = [each.result() for each in [pool.submit(meet) for _ in range(4)]]
            assert [listens for _, listens in found].count(True) == 1
            (listener,) = [made for made, listens in found if listens]
            for _ in range(3):
                listener.accept()[0].close()
            for made, _ in found:
                made.close()
            path.unlink()


# What the user types.


def test_networks_by_name() -> None:
    parse = NetConfig.parse
    assert parse("user,restrict") == NetConfig("user", restrict=True)
    assert parse("tap=tap0,mac=52:54:00:AB:cd:01") == NetConfig("tap", "tap0", mac=bytes.fromhex("525400abcd01"))
    assert parse("socket=/tmp/x=y,pcap=a.pcap") == NetConfig("socket", "/tmp/x=y", pcap=Path("a.pcap"))
    for wrong in ("", "bridge", "tap", "tap=", "user=x", "user,mac=1", "user,mac=01:00:00:00:00:00", "tap=a b",
                  "none=1", "tap=t,restrict", "user,pcap=", "user,what"):  # fmt: skip
        with pytest.raises(ConfigError):
            parse(wrong)
    switch = Switch()
    assert net_configs(["user", switch]) == (NetConfig("user"), NetConfig("network", network=switch))
    assert net_configs("none") == ()
    for both in (["user", "none"], ["user"] * 9):
        with pytest.raises(ConfigError):
            net_configs(both)


def test_ports_to_publish() -> None:
    parse = PublishConfig.parse
    assert parse("8080:80") == PublishConfig(8080, 80)
    assert parse("0:53/udp") == PublishConfig(0, 53, udp=True)
    assert parse("0.0.0.0:22:22/tcp") == PublishConfig(22, 22, address="0.0.0.0")
    assert parse("[::1]:22:22") == PublishConfig(22, 22, address="::1")
    for wrong in ("", "80", "80:", ":80", "80:0", "70000:80", "8080:80/sctp", "host:80:80", "a:b"):
        with pytest.raises(ConfigError):
            parse(wrong)
    with pytest.raises(ConfigError, match="user"):
        VmConfig.resolve("kernel", publish=["8080:80"])
    with pytest.raises(ConfigError, match="record"):
        VmConfig.resolve("kernel", pcap="file")
    config = VmConfig.resolve("kernel", net=["tap=a", "tap=b"], pcap="file")
    assert [each.pcap for each in config.nets] == [Path("file"), None]


def test_parted_ends_lose_what_is_sent() -> None:
    a, b = Owner(), Owner()
    join(a.end, b.end)
    part(a.end)
    assert a.say(b"hello?")
    assert not b.frames
