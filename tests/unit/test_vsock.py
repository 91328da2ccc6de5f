"""vsock: the protocol against a guest that counts credit itself, the device before a driver, and hostile packets."""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avmm.attachments.vsock import VsockAttachment
from avmm.backends.vsock.host import VsockHost
from avmm.backends.vsock.protocol import (
    BUFFER,
    CREDIT_REQUEST,
    CREDIT_UPDATE,
    HEADER,
    REQUEST,
    RESPONSE,
    RST,
    RW,
    SHUTDOWN,
    Connection,
    Vsock,
)
from avmm.config import VsockConfig, vsock_configs
from avmm.devices.virtio import transport as mmio
from avmm.devices.virtio.vsock import Vsock as Device
from avmm.errors import ConfigError, GuestGone, WaitTimeout
from avmm.testing.queue import FakeDriver, attached

CID = 3
RX, TX, EVENT = 0, 1, 2


class Endpoint:
    """Takes at most ``appetite`` bytes at a time and sends ``data`` as there is room."""

    def __init__(self, data: bytes = b"", appetite: int | None = None) -> None:
        self.data = data
        self.appetite = appetite
        self.got = bytearray()
        self.events: list[str] = []
        self.connection: Connection | None = None

    def opened(self) -> None:
        self.events.append("opened")
        self.room()

    def received(self, data: memoryview) -> int:
        taken = len(data) if self.appetite is None else min(self.appetite, len(data))
        self.got += data[:taken]
        return taken

    def ended(self) -> None:
        self.events.append("ended")

    def room(self) -> None:
        connection = self.connection
        assert connection is not None
        while self.data:
            room = connection.room()
            if not room:
                connection.want_room(0.0)
                return
            connection.send(bytearray(self.data[:room]), 0.0)
            self.data = self.data[room:]

    def closed(self, reset: bool) -> None:
        self.events.append("reset" if reset else "closed")


class Guest:
    """A guest by the book: it never sends more than it may, and checks that the host does not either."""

    def __init__(self, alloc: int = 1000) -> None:
        self.core = Vsock(self, CID)
        self.alloc = alloc
        self.serve: list[Endpoint] = []
        self.sent = self.got_total = self.eaten = 0
        self.host_alloc = self.host_taken = 0
        self.got = bytearray()
        self.operations: list[int] = []

    def asked(self, connection: Connection) -> None:
        if not self.serve:
            connection.refuse()
            return
        endpoint = self.serve.pop(0)
        endpoint.connection = connection
        connection.accept(endpoint, 0.0)

    def say(self, operation: int, payload: bytes = b"", flags: int = 0, port: int = 80) -> None:
        header = HEADER.pack(CID, 2, 4000, port, len(payload), 1, operation, flags, self.alloc, self.eaten)
        self.sent += len(payload)
        self.core.packet(header, memoryview(payload))

    @property
    def credit(self) -> int:
        return self.host_alloc - (self.sent - self.host_taken)

    def hear(self) -> list[int]:
        """Take in what the host has sent, and eat it."""
        heard = []
        while self.core.output:
            packet = self.core.output.popleft()
            heard.append(packet.operation)
            self.host_alloc, self.host_taken = packet.buf_alloc, packet.fwd_cnt
            self.got += packet.payload
            self.got_total += len(packet.payload)
            assert self.got_total - self.eaten <= self.alloc, "the host has sent more than there was room for"
        self.operations += heard
        return heard

    def eat(self) -> None:
        if self.eaten != self.got_total:
            self.eaten = self.got_total
            self.say(CREDIT_UPDATE)


@given(
    st.integers(0, 100_000),
    st.integers(0, 3_000_000),
    st.integers(1, 200_000),
    st.sampled_from([None, 1000, 50_000]),
)
@settings(max_examples=50, deadline=None)
def test_credit_both_ways(down: int, up: int, alloc: int, appetite: int | None) -> None:
    """Everything arrives, and neither side ever holds more than it said it would."""
    down = min(down, alloc * 200)
    guest = Guest(alloc)
    data = random.Random(down).randbytes(max(down, up))
    endpoint = Endpoint(data[:down], appetite)
    guest.serve.append(endpoint)
    guest.say(REQUEST)
    assert guest.hear()[0] == RESPONSE
    left = data[:up]
    while left or len(guest.got) < down or len(endpoint.got) < up:
        while left and guest.credit > 0:
            piece = left[: min(guest.credit, 65536)]
            left = left[len(piece) :]
            guest.say(RW, piece)
            connection = endpoint.connection
            assert connection is not None
            assert len(connection.waiting) <= BUFFER
            guest.hear()
        guest.hear()
        guest.eat()
        connection = endpoint.connection
        assert connection is not None
        if connection.waiting:
            endpoint.got += connection.waiting
            connection.taken(len(connection.waiting), 0.0)
    assert bytes(guest.got) == data[:down]
    assert bytes(endpoint.got) == data[:up]
    guest.say(SHUTDOWN, flags=3)
    assert guest.hear()[-1] == RST
    assert endpoint.events == ["opened", "ended", "closed"]
    assert guest.core.connections == 0


def test_half_close() -> None:
    guest = Guest()
    endpoint = Endpoint()
    guest.serve.append(endpoint)
    guest.say(REQUEST)
    guest.say(RW, b"question")
    guest.say(SHUTDOWN, flags=2)
    assert (bytes(endpoint.got), endpoint.events) == (b"question", ["opened", "ended"])
    endpoint.data = b"answer"
    endpoint.room()
    assert endpoint.connection is not None
    endpoint.connection.shutdown(0.0)
    assert guest.hear() == [RESPONSE, RW, SHUTDOWN, RST]
    assert bytes(guest.got) == b"answer"
    assert endpoint.events[-1] == "closed"


def test_refused_and_stray() -> None:
    guest = Guest()
    guest.say(REQUEST)
    assert guest.hear() == [RST]
    guest.say(RW, b"x")
    assert guest.hear() == [RST]
    guest.say(RST)
    assert guest.hear() == []
    for source, target, kind in ((9, 2, 1), (CID, 9, 1), (CID, 2, 2)):  # another guest, another host, SOCK_SEQPACKET
        guest.core.packet(HEADER.pack(source, target, 1, 1, 0, kind, REQUEST, 0, 0, 0), memoryview(b""))
        assert guest.hear() == ([] if source == 9 else [RST])


def test_more_than_there_is_credit_for_ends_the_connection() -> None:
    guest = Guest()
    endpoint = Endpoint(appetite=0)
    guest.serve.append(endpoint)
    guest.say(REQUEST)
    guest.hear()
    for _ in range(BUFFER // 65536):
        guest.say(RW, bytes(65536))
    assert endpoint.events == ["opened"]
    guest.say(RW, b"x")
    assert endpoint.events == ["opened", "reset"]
    assert guest.hear()[-1] == RST


def test_a_guest_that_promises_the_world_is_not_believed() -> None:
    guest = Guest(alloc=0xFFFFFFFF)
    endpoint = Endpoint(bytes(8 * BUFFER))
    guest.serve.append(endpoint)
    guest.say(REQUEST)
    assert sum(len(each.payload) for each in guest.core.output) == BUFFER


def test_credit_on_request() -> None:
    guest = Guest()
    guest.serve.append(Endpoint())
    guest.say(REQUEST)
    guest.say(CREDIT_REQUEST)
    assert guest.hear() == [RESPONSE, CREDIT_UPDATE]


@given(
    st.lists(
        st.tuples(
            st.sampled_from([CID, CID, CID, 2, 0]),
            st.sampled_from([2, 2, 2, 3]),
            st.integers(0, 3),
            st.integers(0, 3),
            st.sampled_from([1, 1, 1, 2]),
            st.integers(0, 9),
            st.integers(0, 4),
            st.integers(0, 0xFFFFFFFF) | st.integers(0, 1000),
            st.integers(0, 0xFFFFFFFF) | st.integers(0, 1000),
            st.binary(max_size=50),
        ),
        max_size=60,
    )
)
@settings(max_examples=300, deadline=None)
def test_fuzz(packets: list[tuple[int, int, int, int, int, int, int, int, int, bytes]]) -> None:
    """No row of packets raises anything or is answered by more than a few."""
    guest = Guest()
    for source, target, port, local, kind, operation, flags, alloc, taken, payload in packets:
        if local and not guest.serve:
            guest.serve.append(Endpoint(bytes(100_000), appetite=local))
        header = HEADER.pack(source, target, port, local, len(payload), kind, operation, flags, alloc, taken)
        guest.core.packet(header, memoryview(payload))
    assert len(guest.core.output) <= 10 * len(packets)
    assert guest.core.connections <= len(packets)
    guest.core.reset(gone=True)
    assert guest.core.connections == 0


# The device.


def packet(operation: int, payload: bytes = b"", *, port: int = 80, length: int | None = None, taken: int = 0) -> bytes:
    size = len(payload) if length is None else length
    return HEADER.pack(CID, 2, 4000, port, size, 1, operation, 0, 1 << 18, taken) + payload


@asynccontextmanager
async def machine(sockets: dict[int, str] | None = None) -> AsyncIterator[tuple[FakeDriver, VsockHost]]:
    host = VsockHost(CID, sockets)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(host.run())
        async with attached(Device(host.core)) as driver, asyncio.timeout(30):
            await asyncio.sleep(0)
            yield driver, host
        running.cancel()


async def heard(driver: FakeDriver, size: int = 4096) -> tuple[int, bytes]:
    """The next packet for the guest: its operation and its payload, in a buffer of this size."""
    data = await driver.queue(RX).request([], [44, size])
    length, operation = struct.unpack_from("<I", data, 24)[0], struct.unpack_from("<H", data, 30)[0]
    return operation, data[44 : 44 + length]


async def test_configuration_and_streams() -> None:
    async with machine() as (driver, host):
        assert driver.config(0, 8) == CID

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            assert writer.get_extra_info("peername") == (CID, 4000)
            while data := await reader.read(100):
                writer.write(data.upper())

        host.listen(80, handler)
        driver.start()
        await driver.queue(TX).request([packet(REQUEST)], [])
        assert await heard(driver) == (RESPONSE, b"")
        await driver.queue(TX).request([packet(RW, b"hello")[:20], packet(RW, b"hello")[20:]], [])
        # What does not fit into one buffer comes in several.
        assert [await heard(driver, 3), await heard(driver, 3)] == [(RW, b"HEL"), (RW, b"LO")]


async def test_into_the_guest_and_its_refusal() -> None:
    async with machine() as (driver, host):
        driver.start()
        dialling = asyncio.create_task(host.connect(5000))
        header = await driver.queue(RX).request([], [44])
        _, _, ours, theirs, _, _, operation, *_ = HEADER.unpack(header)
        assert (theirs, operation) == (5000, REQUEST)
        await driver.queue(TX).request([HEADER.pack(CID, 2, 5000, ours, 0, 1, RST, 0, 0, 0)], [])
        with pytest.raises(ConnectionRefusedError, match="refuses port 5000"):
            await dialling
        with pytest.raises(WaitTimeout, match="port 5000"):
            await host.connect(5000, timeout=0.01)


async def test_a_driver_that_comes_late_is_asked_again() -> None:
    async with machine() as (driver, host):
        dialling = asyncio.create_task(host.connect(5000))
        await asyncio.sleep(0)
        driver.start()
        assert (await heard(driver))[0] == REQUEST
        dialling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await dialling


async def test_who_is_gone_is_told_of_by_name() -> None:
    host = VsockHost(CID)
    with pytest.raises(WaitTimeout, match="not been started"):
        await host.connect(1, timeout=0.01)
    waiting = asyncio.create_task(host.connect(1))
    await asyncio.sleep(0)
    host.gone()
    with pytest.raises(GuestGone):
        await waiting


async def test_a_unix_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.read(100) + b"!")
        await writer.drain()
        writer.close()

    server = await asyncio.start_unix_server(echo, path)
    async with server, machine({80: path, 81: path + "-not-there"}) as (driver, _):
        driver.start()
        await driver.queue(TX).request([packet(REQUEST, port=81)], [])
        assert (await heard(driver))[0] == RST
        await driver.queue(TX).request([packet(REQUEST)], [])
        assert (await heard(driver))[0] == RESPONSE
        await driver.queue(TX).request([packet(RW, b"hello")], [])
        assert await heard(driver) == (RW, b"hello!")
        assert (await heard(driver))[0] == SHUTDOWN


async def test_a_guest_that_reads_nothing_is_not_listened_to() -> None:
    async with machine() as (driver, host):
        driver.start(queue_size=256)
        queue = driver.queue(TX)
        done = 0
        for _ in range(4):
            for _ in range(100):
                queue.add([packet(RW, port=7)], [])  # each is to be answered by RST
            queue.kick()
            for _ in range(50):
                await asyncio.sleep(0)
            done += len(queue.collect())
        assert done < 400
        assert len(host.core.output) <= done
        while done < 400:  # until the guest reads
            await heard(driver)
            await asyncio.sleep(0)
            done += len(queue.collect())


@pytest.mark.parametrize(
    "bad", [b"", bytes(43), packet(RW, b"x", length=2), packet(RW, b"", length=0xFFFFFFFF)], ids=range(4)
)
async def test_packets_that_lie_stop_the_device(bad: bytes) -> None:
    async with machine() as (driver, _):
        driver.start()
        queue = driver.queue(TX)
        queue.add([bad] if bad else [], [] if bad else [16])
        queue.kick()
        await driver.interrupt()
        assert driver.needs_reset


async def test_a_buffer_without_room_stops_the_device() -> None:
    async with machine() as (driver, _):
        driver.start()
        queue = driver.queue(RX)
        queue.add([], [43])
        queue.kick()
        driver.queue(TX).add([packet(RW, port=7)], [])
        driver.queue(TX).kick()
        while not await driver.interrupt() & mmio.CONFIG_CHANGED:
            pass
        assert driver.needs_reset


async def test_a_restored_guest_hears_that_its_connections_are_gone() -> None:
    async with machine() as (driver, host):
        driver.start()
        state = driver.device.save()
        driver.device.restore(state)
        events, packets = driver.queue(EVENT), driver.queue(RX)
        packets.add([], [44])
        packets.kick()
        dialling = asyncio.create_task(host.connect(5000))
        assert await events.request([], [4]) == bytes(4)
        assert not packets.collect()  # nothing new before the guest has forgotten the old
        events.add([], [4])
        events.kick()
        await packets.completed()
        dialling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await dialling


def test_configuration(tmp_path: Path) -> None:
    assert vsock_configs(["5=/s"]) == (VsockConfig(5, Path("/s")),)
    assert (vsock_configs(True), vsock_configs(False), vsock_configs([])) == ((), None, None)
    for bad in ("x=/s", "=/s", "1=", "4294967295=/s"):
        with pytest.raises(ConfigError, match="write it like"):
            vsock_configs([bad])
    with pytest.raises(ConfigError, match="one socket"):
        vsock_configs(["1=/a", "1=/b"])
    assert VsockAttachment([VsockConfig(1, Path("/a"))]).fork().describe() == [{"port": 1, "socket": "/a"}]
