"""The balloon before a driver: what goes back to the host, and what does not."""

from __future__ import annotations

import asyncio
import mmap
import struct

import pytest

from avmm.backends.balloon import Balloon
from avmm.devices.virtio import balloon as device
from avmm.errors import ConfigError, GuestFault, WaitTimeout
from avmm.memory import GuestMemory, Region
from avmm.testing.queue import NEXT, RAM_BASE, RAM_SIZE, WRITE, attached

STATS, REPORTING = 1 << 1, 1 << 5
VERSION_1 = 1 << 32
PAGE = mmap.PAGESIZE


class Watched:
    """RAM, and what was done to it."""

    def __init__(self) -> None:
        self.memory = GuestMemory()
        self.memory.add(Region(RAM_BASE, mmap.mmap(-1, RAM_SIZE)))
        self.discarded: list[tuple[int, int]] = []
        self.dropped: list[tuple[int, int]] = []
        self.memory.on_discard = lambda region, offset, length: self.discarded.append((offset, length))
        self.memory.on_host_write = lambda gpa, length: self.dropped.append((gpa, length))


def test_whole_pages_only() -> None:
    ram = Watched()
    assert ram.memory.discard(RAM_BASE + 1, 2 * PAGE) == PAGE
    assert ram.memory.discard(RAM_BASE + 1, PAGE) == 0
    assert ram.discarded == [(PAGE, PAGE)]
    assert ram.dropped == [(RAM_BASE + PAGE, PAGE)]
    for gpa, length in (
        (RAM_BASE - PAGE, PAGE),
        (RAM_BASE, RAM_SIZE + 1),
        (RAM_BASE + RAM_SIZE, PAGE),
        (1 << 60, PAGE),
    ):
        with pytest.raises(GuestFault):
            ram.memory.discard(gpa, length)


async def test_inflate_and_deflate() -> None:
    ram = Watched()
    balloon = Balloon(RAM_SIZE)
    async with attached(device.Balloon(balloon), ram.memory) as driver:
        driver.start()
        resizing = asyncio.create_task(balloon.resize(4 * device.PAGE))
        await driver.interrupt()
        assert driver.config(0, 4) == 4
        first = (RAM_BASE + (2 << 20)) // device.PAGE
        numbers = struct.pack("<4I", first + 1, first, first + 9, first + 2)
        await driver.queue(0).request([numbers], [])
        assert ram.discarded == [((2 << 20), 3 * device.PAGE), ((2 << 20) + 9 * device.PAGE, device.PAGE)]
        driver.write(0x104, 4)
        await resizing
        assert balloon.actual == 4 * device.PAGE
        assert balloon.returned_bytes == 4 * device.PAGE
        await driver.queue(1).request([numbers], [])
        assert not driver.needs_reset
        driver.write(0x70, 0)
        assert balloon.actual == 0  # a driver that begins anew has all its pages


@pytest.mark.parametrize("features", [VERSION_1 | REPORTING, VERSION_1 | STATS | REPORTING])
async def test_reports(features: int) -> None:
    """Behind the queue of statistics, or in its place where there are none."""
    ram = Watched()
    async with attached(device.Balloon(Balloon(RAM_SIZE)), ram.memory) as driver:
        driver.start(features)
        queue = driver.queue(3 if features & STATS else 2)
        for index, offset in enumerate((1 << 20, 3 << 20)):
            queue.describe(index, RAM_BASE + offset, 1 << 19, WRITE | (NEXT if index == 0 else 0), 1)
        queue._chains[0] = ([0, 1], [])
        queue.offer(0)
        queue.kick()
        (done,) = await queue.completed()
        assert done.length == 0
        assert ram.discarded == [(1 << 20, 1 << 19), (3 << 20, 1 << 19)]


async def test_statistics() -> None:
    balloon = Balloon(RAM_SIZE)
    async with attached(device.Balloon(balloon)) as driver:
        driver.start()
        queue = driver.queue(2)

        def tell(free: int) -> None:
            queue.add([struct.pack("<HQHQHQ", 4, free, 5, 1000, 77, 1)], [])
            queue.kick()

        tell(1)
        asking = asyncio.create_task(balloon.stats())
        await queue.completed()  # the driver gets its buffer back ...
        tell(2)  # ... and fills it with fresh ones
        assert await asking == {"free": 2, "total": 1000}
        await driver.device.pause()  # nothing is in flight
        driver.device.resume()
        asking = asyncio.create_task(balloon.stats())
        await queue.completed()
        tell(3)
        assert (await asking)["free"] == 3


async def test_nobody_answers() -> None:
    balloon = Balloon(RAM_SIZE)
    with pytest.raises(WaitTimeout, match="balloon driver"):
        await balloon.resize(1 << 20, timeout=0.01)
    with pytest.raises(WaitTimeout, match="does not tell"):
        await balloon.stats(timeout=0.01)
    with pytest.raises(ConfigError, match="not 4194304 bytes large"):
        await balloon.resize(RAM_SIZE)


@pytest.mark.parametrize(
    "numbers", [b"abc", struct.pack("<I", 0), struct.pack("<I", 0xFFFFFFFF), bytes((1 << 18) + 4)], ids=len
)
async def test_bad_page_numbers_stop_the_device(numbers: bytes) -> None:
    ram = Watched()
    async with attached(device.Balloon(Balloon(RAM_SIZE)), ram.memory) as driver:
        driver.start()
        driver.queue(0).add([numbers], [])
        driver.queue(0).kick()
        await driver.interrupt()
        assert driver.needs_reset
        assert ram.discarded == []
