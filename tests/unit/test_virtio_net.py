"""The network card before a driver: frames both ways, offloads, room, control, and drivers that lie."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avmm.devices.virtio import transport as mmio
from avmm.devices.virtio.net import Net
from avmm.link import End, Frame, join
from avmm.testing.queue import FakeDriver, Used, attached

MAC = bytes.fromhex("525400123456")
HEADER = struct.Struct("<BBHHHHH")
CSUM, MRG_RXBUF, HOST_TSO4 = 1 << 0, 1 << 15, 1 << 11
RX, TX, CONTROL = 0, 1, 2
#: A TCP segment over IPv4: what matters is where its headers are.
SEGMENT = bytes(12) + b"\x08\x00" + bytes(20) + bytes(12) + b"\x50" + bytes(7) + bytes(range(256)) * 16


class Far:
    """The other end of the cable; ``full``: it takes nothing."""

    def __init__(self, card: End) -> None:
        self.end = End(self._receive, offload=True)
        self.frames: list[Frame] = []
        self.full = False
        self.some = asyncio.Event()
        self.room = asyncio.Event()
        self.end.on_room = self.room.set
        join(card, self.end)

    def _receive(self, frame: Frame) -> bool:
        self.some.set()
        if not self.full:
            self.frames.append(frame)
        return not self.full


@asynccontextmanager
async def card() -> AsyncIterator[tuple[FakeDriver, Net, Far]]:
    device = Net(MAC, mtu=1500)
    far = Far(device.end)
    async with attached(device) as driver, asyncio.timeout(30):
        yield driver, device, far


async def started(driver: FakeDriver, features: int | None = None, queue_size: int = 16) -> None:
    """DRIVER_OK, and the device has seen it."""
    driver.start(features, queue_size)
    for _ in range(5):
        await asyncio.sleep(0)


def frame_in(used: list[Used]) -> bytes:
    """One frame from the buffers it was spread over, its header first; the header counts the buffers."""
    data = b"".join(each.data[: each.length] for each in used)
    assert HEADER.unpack_from(data)[6] == len(used)
    return data


async def test_configuration_space() -> None:
    async with card() as (driver, device, _):
        assert bytes(driver.config(at, 1) for at in range(6)) == MAC
        assert [driver.config(at, 2) for at in (6, 8, 10)] == [1, 1, 1500]
        driver.start()
        device.set_link(False)
        assert await driver.interrupt() == mmio.CONFIG_CHANGED
        assert driver.config(6, 2) == 0


@pytest.mark.parametrize("cut", [[12], [5], [12, 14], [60], [1, 2, 3]])
async def test_a_frame_goes_out_however_it_is_cut_up(cut: list[int]) -> None:
    async with card() as (driver, _, far):
        driver.start()
        whole = bytes(12) + bytes(range(100))
        parts, at = [], 0
        for length in cut:
            parts.append(whole[at : at + length])
            at += length
        await driver.queue(TX).request([*parts, whole[at:]], [])
        assert far.frames == [Frame(bytes(range(100)))]


async def test_offloads_go_out_and_come_in() -> None:
    async with card() as (driver, device, far):
        await started(driver)
        sent = HEADER.pack(1, 1 | 0x80, 54, 1000, 34, 16, 0)
        await driver.queue(TX).request([sent, SEGMENT], [])
        assert far.frames == [Frame(SEGMENT, 34, 16, 1000)]
        assert device.end.offload
        for _ in range(10):
            driver.queue(RX).add([], [1024])
        far.end.send(far.frames[0])
        data = frame_in(await driver.queue(RX).completed(5))
        assert data == HEADER.pack(1, 1, 54, 1000, 34, 16, 5) + SEGMENT
        far.end.send(Frame(SEGMENT[:100], 34, 16))
        (used,) = await driver.queue(RX).completed()
        assert used.data[: used.length] == HEADER.pack(1, 0, 0, 0, 34, 16, 1) + SEGMENT[:100]


async def test_a_driver_without_offloads_is_given_none() -> None:
    async with card() as (driver, device, far):
        await started(driver, mmio.F_VERSION_1 | MRG_RXBUF)
        driver.queue(RX).add([], [2048])
        far.end.send(Frame(SEGMENT[:100], 34, 16))  # on its way since the driver before
        far.end.send(Frame(b"a whole frame, complete"))
        (used,) = await driver.queue(RX).completed()
        assert used.data[12 : used.length] == b"a whole frame, complete"
        assert not device.end.offload


async def test_without_merging_a_frame_has_one_buffer_or_is_lost() -> None:
    async with card() as (driver, device, far):
        await started(driver, driver.features() & ~MRG_RXBUF)
        driver.queue(RX).add([], [12, 50, 50])
        assert far.end.send(Frame(bytes(101)))
        assert device.counters["rx_too_long"] == 1
        assert far.end.send(Frame(bytes(range(100))))
        (used,) = await driver.queue(RX).completed()
        assert used.data[12:] == bytes(range(100))
        assert used.length == 112


@pytest.mark.parametrize("sizes", [[12, 88], [4, 4, 4, 88], [5, 95], [30, 30, 40]])
async def test_buffers_however_they_are_cut_up(sizes: list[int]) -> None:
    async with card() as (driver, _, far):
        await started(driver)
        driver.queue(RX).add([], sizes)
        driver.queue(RX).add([], [100])
        far.end.send(Frame(bytes(range(150))))
        data = frame_in(await driver.queue(RX).completed(2))
        assert data[12:] == bytes(range(150))


async def test_a_frame_waits_for_room_beyond() -> None:
    async with card() as (driver, device, far):
        driver.start()
        far.full = True
        for number in range(3):
            driver.queue(TX).add([bytes(12), bytes([number]) * 60], [])
        driver.queue(TX).kick()
        await far.some.wait()
        await driver.device.pause()  # which need not wait for room
        driver.device.resume()
        assert not driver.queue(TX).collect()
        far.full = False
        far.end.room()
        await driver.queue(TX).completed(3)
        assert [frame.data[0] for frame in far.frames] == [0, 1, 2]
        assert device.counters["tx_frames"] == 3


async def test_whoever_is_refused_hears_of_buffers() -> None:
    async with card() as (driver, _, far):
        await started(driver)
        big = Frame(SEGMENT, 34, 16, 1000)
        driver.queue(RX).add([], [1500])  # not enough
        driver.queue(RX).kick()
        assert not far.end.send(big)
        for enough in (False, True):
            far.room.clear()
            driver.queue(RX).add([], [1500])
            driver.queue(RX).kick()
            await far.room.wait()
            assert far.end.send(big) is enough
        data = frame_in(await driver.queue(RX).completed(3))
        assert data[12:] == SEGMENT
        assert not far.end.send(big)
        far.room.clear()
        driver.write(0x70, 0)  # a reset makes room, too: what comes is lost
        await far.room.wait()
        assert far.end.send(big)


async def test_a_pulled_cable_carries_nothing() -> None:
    async with card() as (driver, device, far):
        await started(driver)
        driver.queue(RX).add([], [1500])
        device.set_link(False)
        await driver.queue(TX).request([bytes(12), bytes(60)], [])
        assert far.end.send(Frame(bytes(60)))
        assert not far.frames
        assert not driver.queue(RX).collect()
        device.set_link(True)
        await driver.queue(TX).request([bytes(12), bytes(60)], [])
        assert len(far.frames) == 1


async def test_control_commands() -> None:
    async with card() as (driver, device, _):
        driver.start()
        queue = driver.queue(CONTROL)
        assert await queue.request([b"\0\0", b"\1"], [1]) == b"\0"
        assert await queue.request([b"\1\1", b"\x02abcde"], [1]) == b"\0"
        assert bytes(driver.config(at, 1) for at in range(6)) == b"\x02abcde"
        table = struct.pack("<I", 1) + b"\x02abcde" + struct.pack("<I", 0)
        assert await queue.request([b"\1\0", table], [1]) == b"\0"
        for wrong in (b"\0\x09\1", b"\1\1short", b"\1\0" + table[:-1], b"\1\0" + b"\xff" * 8, b"\x09\0"):
            assert await queue.request([wrong], [1]) == b"\1"
        state = device.save()
        driver.write(0x70, 0)
        assert bytes(driver.config(at, 1) for at in range(6)) == MAC
        device.restore(state)
        assert bytes(driver.config(at, 1) for at in range(6)) == b"\x02abcde"
        driver.start()
        driver.queue(CONTROL).add([b"\0"], [1])
        driver.queue(CONTROL).kick()
        await driver.interrupt()
        assert driver.needs_reset


@pytest.mark.parametrize(
    ("header", "length"),
    [
        (HEADER.pack(0, 0, 0, 0, 0, 0, 0), 13),  # shorter than Ethernet's own header
        (HEADER.pack(0, 0, 0, 0, 0, 0, 0), 70000),
        (HEADER.pack(1, 0, 0, 0, 60, 40, 0), 101),  # the checksum is outside by one byte
        (HEADER.pack(1, 0, 0, 0, 0xFFFF, 0xFFFF, 0), 100),
        (HEADER.pack(1, 0, 0, 0, 0, 6, 0), 100),
        (HEADER.pack(0, 1, 54, 1000, 34, 16, 0), 100),  # to be cut up, without a checksum
        (HEADER.pack(1, 3, 54, 1000, 34, 6, 0), 100),  # UDP, which is not offered
        (HEADER.pack(1, 1, 54, 0, 34, 16, 0), 100),
        (HEADER.pack(1, 1, 54, 1000, 34, 1, 0), 50),
        (b"short", 0),
    ],
)
async def test_headers_that_lie_stop_the_device(header: bytes, length: int) -> None:
    async with card() as (driver, _, far):
        driver.start()
        driver.queue(TX).add([header, bytes(length)], [])
        driver.queue(TX).kick()
        assert await driver.interrupt() & mmio.CONFIG_CHANGED
        assert driver.needs_reset
        assert not far.frames
        driver.start()
        await driver.queue(TX).request([bytes(12), bytes(60)], [])
        assert len(far.frames) == 1


async def test_offloads_never_agreed_on_stop_the_device() -> None:
    for features in (mmio.F_VERSION_1, mmio.F_VERSION_1 | CSUM):
        async with card() as (driver, _, _):
            driver.start(features)
            driver.queue(TX).add([HEADER.pack(1, 1, 54, 1000, 34, 16, 0), SEGMENT], [])
            driver.queue(TX).kick()
            await driver.interrupt()
            assert driver.needs_reset


@pytest.mark.parametrize("sizes", [[11], [0]])
async def test_buffers_that_are_none_stop_the_device(sizes: list[int]) -> None:
    async with card() as (driver, _, far):
        await started(driver)
        driver.queue(RX).add([], sizes)
        assert far.end.send(Frame(bytes(60)))
        assert driver.needs_reset


@given(
    frames=st.lists(st.integers(14, 5000), min_size=1, max_size=8),
    buffers=st.lists(st.lists(st.integers(1, 3000), min_size=1, max_size=3), min_size=1, max_size=16),
)
@settings(max_examples=60, deadline=None)
def test_what_arrives_is_what_was_sent(frames: list[int], buffers: list[list[int]]) -> None:
    """Whatever the sizes: every frame whole and in order, or refused."""

    async def check() -> None:
        async with card() as (driver, _, far):
            await started(driver, queue_size=64)
            queue = driver.queue(RX)
            for sizes in buffers:
                queue.add([], [sizes[0] + 12, *sizes[1:]])
            wanted = b""
            for number, size in enumerate(frames):
                data = bytes([number]) * size
                if not far.end.send(Frame(data)):
                    break
                wanted += data
            used = queue.collect()
            found = b""
            while used:
                count = HEADER.unpack_from(used[0].data)[6]
                found += frame_in(used[:count])[12:]
                used = used[count:]
            assert found == wanted
            assert not driver.needs_reset

    asyncio.run(check())
