"""virtio devices before a driver: a good one, and the worst there can be."""

from __future__ import annotations

import asyncio
import mmap
import os
import random
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from avmm.backends.disk import RawDisk, open_file
from avmm.backends.drive import Drive
from avmm.backends.port import Port
from avmm.devices.virtio import transport as mmio
from avmm.devices.virtio.blk import Blk
from avmm.devices.virtio.console import Console
from avmm.devices.virtio.rng import Rng
from avmm.memory import GuestMemory, Region
from avmm.testing.queue import INDIRECT, NEXT, RAM_BASE, RAM_SIZE, WRITE, FakeQueue, attached

IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
ALL_BUT_EVENT_IDX = ~mmio.F_EVENT_IDX & ((1 << 64) - 1)


def header(kind: int, sector: int = 0) -> bytes:
    return struct.pack("<IIQ", kind, 0, sector)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"".join(struct.pack("<Q", n) * 64 for n in range(2048)))  # each sector holds its number
    return path


def content(path: Path) -> bytes:
    return path.read_bytes()


async def until(condition: Callable[[], object]) -> None:
    """Let the event loop turn until ``condition`` holds."""
    for _ in range(100_000):
        if condition():
            return
        await asyncio.sleep(1e-4)
    raise AssertionError("it never happens")


def drive_on(path: Path, read_only: bool = False) -> Drive:
    return Drive(RawDisk(open_file(path, read_only), read_only), "disk")


# The queue and the transport.


@pytest.mark.parametrize("features", [-1, ALL_BUT_EVENT_IDX], ids=["event-idx", "flags"])
@pytest.mark.parametrize("indirect", [False, True])
async def test_requests_go_round_the_ring_many_times(features: int, indirect: bool) -> None:
    async with attached(Rng(lambda n: b"\xa5" * n)) as driver:
        driver.start(driver.features() & features, queue_size=4)
        queue = driver.queue(0)
        for size in range(1, 200):
            assert await queue.request([], [size, 3], indirect=indirect) == b"\xa5" * (size + 3)


async def test_indices_wrap_at_65536() -> None:
    async with attached(Rng(lambda n: b"\xa5" * n)) as driver:
        driver.start(queue_size=16)
        queue = driver.queue(0)
        buffer = driver.allocate(4)
        driver.allocate = lambda size, align=16: buffer  # type: ignore[method-assign]  # memory for one is enough
        for _ in range(65536 // 16 + 10):
            for _ in range(16):
                queue.add([], [4])
            queue.kick()
            assert len(await queue.completed(16)) == 16


async def test_no_interrupt_that_was_not_asked_for() -> None:
    async with attached(Rng(os.urandom)) as driver:
        driver.start(driver.features() & ALL_BUT_EVENT_IDX)
        queue = driver.queue(0)
        driver.memory.write(queue.avail, struct.pack("<H", 1))  # VIRTQ_AVAIL_F_NO_INTERRUPT
        queue.add([], [16])
        queue.kick()
        await until(queue.collect)
        assert not driver.irq.raised
        driver.start()  # with VIRTIO_F_EVENT_IDX: not before the third
        queue = driver.queue(0)
        driver.memory.write(queue.avail + 4 + 2 * queue.size, struct.pack("<H", 2))
        for _ in range(3):
            assert not driver.irq.raised
            queue.add([], [16])
            queue.kick()
            for _ in range(10):
                await asyncio.sleep(0)
        await until(lambda: driver.irq.raised == 1)


async def test_a_busy_device_asks_for_no_notifications() -> None:
    async with attached(Rng(os.urandom)) as driver:
        driver.start()
        queue = driver.queue(0)
        for count in (1, 5):
            for _ in range(count):
                queue.add([], [16])
            queue.kick()
            await queue.completed(count)
            await asyncio.sleep(0)
            (wanted,) = struct.unpack("<H", driver.memory.read(queue.used + 4 + 8 * queue.size, 2))
            assert wanted == queue.avail_idx  # the next one that is to be announced


async def test_what_is_not_offered_is_not_agreed_to() -> None:
    async with attached(Rng(os.urandom)) as driver:
        assert not driver.negotiate(driver.features() | 1 << 5)
        assert not driver.negotiate(driver.features() & ~mmio.F_VERSION_1)
        assert driver.negotiate(mmio.F_VERSION_1)


async def test_registers_are_what_the_specification_says() -> None:
    async with attached(Rng(os.urandom)) as driver:
        assert driver.read(0x00) == 0x74726976
        assert driver.read(0x04) == 2
        assert driver.read(0x08) == 4
        driver.write(0x30, 7)
        assert driver.read(0x34) == 0  # there is no queue 7
        assert driver.read(0xB0) == 0xFFFFFFFF  # nor shared memory
        driver.start()
        driver.write(0x30, 0)
        driver.write(0x38, 2)  # not while it is ready
        assert driver.read(0x44) == 1
        assert len(await driver.queue(0).request([], [8])) == 8


async def test_state_moves_to_another_device() -> None:
    async with attached(Rng(lambda n: b"a" * n)) as one:
        one.start()
        queue = one.queue(0)
        await queue.request([], [4])
        await one.device.pause()
        await one.device.pause()
        queue.add([], [4])
        queue.kick()
        state = one.device.save()
        async with attached(Rng(lambda n: b"b" * n), one.memory) as two:
            two.device.restore(state)
            assert two.device.save() == state
            queue.driver = two
            (done,) = await queue.completed()
            assert done.data == b"bbbb"


def _table(queue: FakeQueue, *entries: tuple[int, int, int, int]) -> int:
    """An indirect table in memory: its GPA."""
    gpa = queue.driver.allocate(16 * len(entries))
    queue.driver.memory.write(gpa, b"".join(struct.pack("<QIHH", *entry) for entry in entries))
    return gpa


def outside(queue: FakeQueue) -> None:
    queue.describe(0, RAM_BASE + RAM_SIZE - 4, 8, WRITE)


def wraps_around(queue: FakeQueue) -> None:
    queue.describe(0, (1 << 64) - 4, 8, WRITE)


def loop(queue: FakeQueue) -> None:
    queue.describe(0, RAM_BASE, 8, WRITE | NEXT, 1)
    queue.describe(1, RAM_BASE, 8, WRITE | NEXT, 0)


def next_outside(queue: FakeQueue) -> None:
    queue.describe(0, RAM_BASE, 8, WRITE | NEXT, queue.size)


def readable_after_writable(queue: FakeQueue) -> None:
    queue.describe(0, RAM_BASE, 8, WRITE | NEXT, 1)
    queue.describe(1, RAM_BASE, 8, 0)


def nested_table(queue: FakeQueue) -> None:
    inner = _table(queue, (RAM_BASE, 8, WRITE, 0))
    queue.describe(0, _table(queue, (inner, 16, INDIRECT, 0)), 16, INDIRECT)


def table_and_next(queue: FakeQueue) -> None:
    queue.describe(0, _table(queue, (RAM_BASE, 8, WRITE, 0)), 16, INDIRECT | NEXT, 1)
    queue.describe(1, RAM_BASE, 8, WRITE)


def odd_table(queue: FakeQueue) -> None:
    queue.describe(0, _table(queue, (RAM_BASE, 8, WRITE, 0), (RAM_BASE, 8, WRITE, 0)), 24, INDIRECT)


def empty_table(queue: FakeQueue) -> None:
    queue.describe(0, RAM_BASE, 0, INDIRECT)


def leaves_its_table(queue: FakeQueue) -> None:
    queue.describe(0, _table(queue, (RAM_BASE, 8, WRITE | NEXT, 1)), 16, INDIRECT)


def head_outside(queue: FakeQueue) -> None:
    queue.offer(queue.size)


def index_jumps(queue: FakeQueue) -> None:
    queue.describe(0, RAM_BASE + 0x10000, 8, WRITE)
    queue.avail_idx = queue.size + 1


@pytest.mark.parametrize(
    "crime",
    [
        outside, wraps_around, loop, next_outside, readable_after_writable, nested_table, table_and_next, odd_table,
        empty_table, leaves_its_table, head_outside, index_jumps,
    ],
)  # fmt: skip
async def test_a_broken_rule_stops_the_device_until_it_is_reset(crime: Callable[[FakeQueue], None]) -> None:
    async with attached(Rng(lambda n: b"r" * n)) as driver:
        driver.start()
        queue = driver.queue(0)
        crime(queue)
        queue.offer(0)
        before = driver.memory.read(RAM_BASE, RAM_SIZE)
        queue.kick()
        assert await driver.interrupt() == 2  # a change of configuration (2.1.2)
        assert driver.needs_reset
        assert driver.device.guest_errors == 1
        queue.offer(0)
        queue.kick()
        for _ in range(10):
            await asyncio.sleep(0)
        assert not queue.collect()
        # Nothing was written but what we wrote, and the index from which the device wants to be notified.
        now = bytearray(driver.memory.read(RAM_BASE, RAM_SIZE))
        for gpa, length in ((queue.avail, 6 + 2 * queue.size), (queue.used + 4 + 8 * queue.size, 2)):
            at = gpa - RAM_BASE
            now[at : at + length] = before[at : at + length]
        assert now == before
        driver.start()
        assert await driver.queue(0).request([], [4]) == b"rrrr"


# Disks.


async def test_a_disk_reads_writes_flushes(image: Path) -> None:
    drive = drive_on(image)
    async with attached(Blk(drive, "serial")) as driver:
        driver.start()
        queue = driver.queue(0)
        assert driver.config(0, 8) == 2048
        assert await queue.request([header(GET_ID)], [20, 1]) == b"serial".ljust(20, b"\0") + b"\0"
        for length, status in ((512, [1]), (4096, [1]), (100, [412, 513]), (1 << 19, [1])):
            answer = await queue.request([header(IN, 5)], [length, *status])
            wanted = content(image)[5 * 512 :][: len(answer) - 1]
            assert answer == wanted + b"\0"
        data = random.Random(1).randbytes(8192)
        # Cut up as no driver of ours does it: 2.7.4 allows it.
        assert await queue.request([header(OUT, 9)[:7], header(OUT, 9)[7:] + data[:99], data[99:]], [1]) == b"\0"
        assert await queue.request([header(FLUSH)], [1]) == b"\0"
        assert content(image)[9 * 512 :].startswith(data)
        ranges = struct.pack("<QIIQII", 16, 16, 0, 64, 8, 1)
        assert await queue.request([header(WRITE_ZEROES), ranges], [1]) == b"\0"
        after = content(image)
        assert not any(after[16 * 512 : 32 * 512] + after[64 * 512 : 72 * 512])
        assert await queue.request([header(DISCARD), struct.pack("<QII", 0, 8, 0)], [1]) == b"\0"
        assert drive.counters["errors"] == driver.device.guest_errors == 0
    drive.close()


@pytest.mark.parametrize(
    ("request_header", "body", "status"),
    [
        (header(IN, 2048), [512, 1], 1),  # beyond the end
        (header(IN, 2047), [1024, 1], 1),
        (header(IN, 1 << 63), [512, 1], 1),
        (header(IN, 0), [100, 1], 1),  # no whole sector
        (header(OUT, 2048) + bytes(512), [1], 1),
        (header(OUT, 0) + bytes(5), [1], 1),
        (header(77, 0), [1], 2),
        (header(DISCARD) + struct.pack("<QII", 2047, 2, 0), [1], 1),
        (header(DISCARD) + struct.pack("<QII", 0, 2, 1), [1], 2),
        (header(WRITE_ZEROES) + struct.pack("<QII", 0, 0xFFFFFFFF, 0), [1], 1),
        (header(WRITE_ZEROES) + b"\0", [1], 1),
    ],
)
async def test_requests_that_cannot_be_are_answered_so(
    image: Path, request_header: bytes, body: list[int], status: int
) -> None:
    before = content(image)
    drive = drive_on(image)
    async with attached(Blk(drive, "d")) as driver:
        driver.start()
        assert (await driver.queue(0).request([request_header], body))[-1] == status
        assert not driver.needs_reset
    drive.close()
    assert content(image) == before


async def test_a_read_only_disk(image: Path) -> None:
    before = content(image)
    drive = drive_on(image, read_only=True)
    async with attached(Blk(drive, "d")) as driver:
        assert driver.features() & 1 << 5
        driver.start()
        assert await driver.queue(0).request([header(OUT) + bytes(512)], [1]) == b"\1"
    drive.close()
    assert content(image) == before


async def test_many_requests_at_once(image: Path) -> None:
    drive = drive_on(image)
    async with attached(Blk(drive, "d")) as driver:
        driver.start(queue_size=64)
        queue = driver.queue(0)
        order = {queue.add([header(IN, 7 * n)], [512, 1], indirect=True): 7 * n for n in range(60)}
        queue.kick()
        for done in await queue.completed(60):
            assert done.data == struct.pack("<Q", order[done.head]) * 64 + b"\0"
    drive.close()


async def expect_now(queue: FakeQueue, sector: int, count: int = 1) -> None:
    """Read ``count`` sectors, one chain each; the answers are there before the notification returns."""
    order = {queue.add([header(IN, sector + n)], [512, 1]): sector + n for n in range(count)}
    queue.kick()  # the event loop does not turn
    done = queue.collect()
    assert {each.head: each.data for each in done} == {
        head: struct.pack("<Q", at) * 64 + b"\0" for head, at in order.items()
    }
    assert await queue.driver.interrupt() == mmio.USED


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="the host cannot tell what is in its page cache")
@pytest.mark.parametrize("features", [-1, ALL_BUT_EVENT_IDX], ids=["event-idx", "flags"])
async def test_a_small_read_is_done_before_the_vcpu_goes_on(image: Path, features: int) -> None:
    assert content(image)  # into the page cache
    drive = drive_on(image)
    async with attached(Blk(drive, "d")) as driver:
        driver.start(driver.features() & features)
        queue, blk = driver.queue(0), driver.device.device

        async def asleep() -> None:
            await until(lambda: driver.device.queues[0].doorbell.awaited)

        assert (await queue.request([header(IN, 1)], [512, 1]))[-1] == 0  # by the worker, who finds that it was easy
        for sector in range(40):  # round the ring
            await asleep()
            await expect_now(queue, sector)
        await expect_now(queue, 100, 3)
        assert drive.counters["reads"] == 44
        assert drive.counters["read_bytes"] == 44 * 512

        # More than is done at once goes on in the worker, and nothing is lost or done twice.
        heads = {queue.add([header(IN, n)], [512, 1], indirect=True): n for n in range(12)}
        queue.kick()
        for done in await queue.completed(12):
            assert done.data == struct.pack("<Q", heads[done.head]) * 64 + b"\0"
        assert drive.counters["reads"] == 56

        # What may block is the worker's: a write, and a read while the drive has a fault.
        await asleep()
        queue.add([header(OUT, 7), b"x" * 512], [1])
        queue.kick()
        assert not queue.collect()
        assert not blk.serves_now
        await queue.completed()
        drive.fail(sector=9, op="read", times=1)
        assert (await queue.request([header(IN, 9)], [512, 1]))[-1] == 1
        assert await queue.request([header(IN, 7)], [512, 1]) == b"x" * 512 + b"\0"

        # A paused device does nothing, and goes on afterwards.
        await asleep()
        await driver.device.pause()
        queue.add([header(IN, 5)], [512, 1])
        queue.kick()
        await asyncio.sleep(0)
        assert not queue.collect()
        driver.device.resume()
        assert (await queue.completed())[0].data[:8] == struct.pack("<Q", 5)

        # A rule broken in a request that would be done at once.
        await asleep()
        await expect_now(queue, 11)
        queue.add([b"short"], [1])
        queue.kick()
        assert driver.needs_reset
        assert driver.device.guest_errors == 1
    drive.close()


async def test_a_small_write_takes_no_thread_unless_one_had_to_wait(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drive = drive_on(image)
    async with attached(Blk(drive, "d")) as driver:
        driver.start()
        queue = driver.queue(0)
        write = [header(OUT, 2), b"small" * 102 + b"!!"]
        assert await queue.request(write, [1]) == b"\0"
        assert not drive._pool._threads
        assert content(image)[1024:1536] == write[1]
        assert drive.counters["writes"] == 1
        # Through a thread: for a while, once one has waited; what is large; and all of a driver that cannot flush.
        monkeypatch.setattr("avmm.backends.threads._PATIENCE", 1e9)
        drive._brief.run(lambda: time.sleep(0.01))
        assert not drive._brief.allowed()
        assert await queue.request(write, [1]) == b"\0"
        assert len(drive._pool._threads) == 1
    drive.close()
    for features, size in ((-1, 1 << 16), (~(1 << 9), 512)):
        drive = drive_on(image)
        async with attached(Blk(drive, "d")) as driver:
            driver.start(driver.features() & features)
            assert await driver.queue(0).request([header(OUT, 8), bytes(size)], [1]) == b"\0"
            assert drive._pool._threads
        drive.close()


async def test_faults_that_were_asked_for(image: Path) -> None:
    drive = drive_on(image)
    before = content(image)
    async with attached(Blk(drive, "d")) as driver:
        driver.start()
        queue = driver.queue(0)

        async def status(*parts: bytes, room: int = 0) -> int:
            return (await queue.request(parts, [room, 1] if room else [1]))[-1]

        drive.fail(sector=100, count=2, op="read", times=2)
        assert [await status(header(IN, at), room=512) for at in (99, 102, 101, 100, 100)] == [0, 0, 1, 1, 0]
        drive.fail(op="write", error="nospace")
        assert await status(header(OUT, 3), bytes(512)) == 1
        drive.heal()
        drive.tear(sector=8, seed=3)
        assert await status(header(OUT, 8), b"x" * 4096) == 1
        kept = content(image).count(b"x" * 512)
        assert content(image)[4096:8192] == b"x" * 512 * kept + before[4096 + 512 * kept : 8192]
        assert 0 < kept < 8
        assert await status(header(OUT, 8), b"x" * 4096) == 0  # once only
        drive.hold_writes()
        assert await status(header(OUT, 200), b"a" * 512) == 0
        assert await status(header(FLUSH)) == 0
        assert await status(header(OUT, 200), b"b" * 512) == 0
        assert await queue.request([header(IN, 200)], [512, 1]) == b"b" * 512 + b"\0"
        drive.power_cut()
        assert await status(header(IN, 200), room=512) == 1
        drive.heal()
        assert await queue.request([header(IN, 200)], [512, 1]) == b"a" * 512 + b"\0"
    drive.close()


async def test_a_power_cut_is_reproducible(tmp_path: Path) -> None:
    left = []
    for number in range(2):
        path = tmp_path / str(number)
        path.write_bytes(bytes(1 << 20))
        drive = drive_on(path)
        drive.hold_writes()
        for sector in range(64):
            await drive.writev(512 * sector, [memoryview(b"x" * 512)])
        drive.power_cut(seed=5)
        drive.close()
        left.append(path.read_bytes())
    assert left[0] == left[1]
    assert 0 < left[0].count(b"x" * 512) < 64


async def test_a_reset_in_mid_flight_drops_the_answers(image: Path) -> None:
    drive = drive_on(image)
    async with attached(Blk(drive, "d")) as driver:
        driver.start()
        queue = driver.queue(0)
        drive.delay(0.02, times=1)
        queue.add([header(IN, 1)], [512, 1])
        queue.kick()
        core = driver.device.queues[0].core
        assert core is not None
        await until(lambda: core.in_flight)
        driver.write(0x70, 0)
        assert driver.status  # not complete while a thread may still write to memory (2.4)
        ring = driver.memory.read(queue.used, 64)
        await until(lambda: not driver.status)
        assert driver.memory.read(queue.used, 64) == ring
        driver.start()
        assert (await driver.queue(0).request([header(IN, 1)], [512, 1]))[-1] == 0
    drive.close()


def test_guest_memory_may_go_as_soon_as_the_last_request_is_answered(image: Path) -> None:
    """Nobody holds a view of it then, or it would stay mapped. Threads that change places often show who does."""

    async def use(step: int) -> None:
        drive = drive_on(image)
        buffer = mmap.mmap(-1, RAM_SIZE)
        memory = GuestMemory()
        memory.add(Region(RAM_BASE, buffer))
        async with attached(Blk(drive, "d"), memory) as driver:
            driver.start()
            queue = driver.queue(0)
            if step % 3 == 0:
                await queue.request([header(OUT, 8), bytes(4096)], [1])
            elif step % 3 == 1:  # cancelled in mid-flight, more or less
                queue.add([header(OUT, 8), bytes(65536)], [1])
                queue.kick()
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            else:
                drive.fail(op="read")
                await queue.request([header(IN, 8)], [4096, 1])
        memory.close()
        assert buffer.closed
        drive.close()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for step in range(150):
            asyncio.run(use(step))
    finally:
        sys.setswitchinterval(interval)


# The console.


async def test_console_ports_open_and_talk() -> None:
    ports = [Port("hvc0", True), Port("agent", False)]
    async with attached(Console(ports)) as driver:
        driver.start()
        told, tell = driver.queue(2), driver.queue(3)
        for _ in range(8):
            told.add([], [64])
        told.kick()

        async def hear(count: int) -> list[tuple[int, int, int, bytes]]:
            heard = []
            for done in await told.completed(count):
                heard.append((*struct.unpack_from("<IHH", done.data), done.data[8 : done.length]))
                told.add([], [64])
            told.kick()
            return heard

        await tell.request([struct.pack("<IHH", 0, 0, 1)], [])
        assert await hear(2) == [(0, 1, 1, b""), (1, 1, 1, b"")]
        await tell.request([struct.pack("<IHH", 1, 3, 1)], [])
        assert await hear(2) == [(1, 7, 1, b"agent"), (1, 6, 1, b"")]
        receive, transmit = driver.queue(4), driver.queue(5)
        ports[1].write(b"too early")
        receive.add([], [4])
        receive.add([], [100])
        receive.kick()
        assert not ports[1].is_open
        await tell.request([struct.pack("<IHH", 1, 6, 1)], [])
        await ports[1].wait_open()
        assert b"".join(done.data[: done.length] for done in await receive.completed(2)) == b"too early"
        await transmit.request([b"hel", b"lo"], [])
        assert await ports[1].read(100) == b"hello"
        driver.device.device.resize(0, 100, 40)  # type: ignore[attr-defined]  # a Console
        assert await hear(1) == [(0, 5, 0, struct.pack("<HH", 100, 40))]
        assert (driver.config(0, 2), driver.config(2, 2)) == (100, 40)


async def test_a_console_makes_a_fast_guest_wait_and_nobody_who_pauses_it() -> None:
    port = Port("agent", False)
    sent = b"".join(b"%07d\n" % number for number in range(40 * 8192))
    async with attached(Console([port])) as driver:
        driver.start(queue_size=64)
        transmit = driver.queue(1)
        for at in range(0, len(sent), 3 * 65536):  # several pieces, of which the port may take some
            transmit.add([sent[at : at + 3 * 65536]], [])
        transmit.kick()
        for _ in range(200):
            await asyncio.sleep(0)
        assert len(transmit.collect()) < 13
        got = b""
        while len(got) < len(sent):
            got += await port.read(50_000)
            async with asyncio.timeout(20):
                await driver.device.pause()
            driver.device.restore(driver.device.save())  # as in a twin, which knows how much has been taken
            driver.device.resume()
        assert got == sent
