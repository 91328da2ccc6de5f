"""The worst driver there can be, at every virtio device: one entry for each, or :func:`test_every_device_has_an_entry`
fails.

Loops, wrong lengths, overlapping and out-of-RAM descriptors, indirect tables, indices that jump, resets in mid-flight,
garbage in every register, and requests that are nearly right: no exception, no hang, nothing left in flight, no byte
touched outside RAM; and after a reset the device serves as before.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import pkgutil
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import avmm.devices.virtio
from avmm.backends.balloon import Balloon as BalloonHost
from avmm.backends.disk import RawDisk, open_file
from avmm.backends.drive import Drive
from avmm.backends.port import Port
from avmm.backends.share import fuse
from avmm.backends.share.folder import open_folder
from avmm.backends.share.fuse import Op
from avmm.backends.share.server import Share
from avmm.backends.vsock.host import VsockHost
from avmm.backends.vsock.protocol import HEADER, REQUEST, RESPONSE, RST, RW
from avmm.devices.virtio.balloon import Balloon
from avmm.devices.virtio.blk import Blk
from avmm.devices.virtio.console import Console
from avmm.devices.virtio.fs import Fs
from avmm.devices.virtio.net import Net
from avmm.devices.virtio.rng import Rng
from avmm.devices.virtio.transport import VirtioDevice
from avmm.devices.virtio.vsock import Vsock
from avmm.link import End, join
from avmm.memory import GuestMemory, Region
from avmm.testing.queue import INDIRECT, NEXT, RAM_BASE, RAM_SIZE, WRITE, FakeDriver, FakeQueue, attached


@dataclass
class Victim:
    """A device; requests it would serve, as (what it reads, bytes to write); and a proof that it serves."""

    device: VirtioDevice
    requests: list[tuple[bytes, int]]
    serves: Callable[[FakeDriver], Awaitable[None]]


@asynccontextmanager
async def rng(folder: Path) -> AsyncIterator[Victim]:
    async def serves(driver: FakeDriver) -> None:
        assert len(await driver.queue(0).request([], [8])) == 8

    yield Victim(Rng(os.urandom), [(b"", 64)], serves)


@asynccontextmanager
async def blk(folder: Path) -> AsyncIterator[Victim]:
    path = folder / "hostile.img"
    path.write_bytes(bytes(1 << 16))
    drive = Drive(RawDisk(open_file(path, False), False), "disk")

    async def serves(driver: FakeDriver) -> None:
        assert (await driver.queue(0).request([struct.pack("<IIQ", 0, 0, 0)], [512, 1]))[-1] == 0

    some = struct.pack("<QII", 0, 8, 1)  # eight sectors
    requests = [(struct.pack("<IIQ", kind, 0, 3) + more, room) for kind, more, room in (
        (0, b"", 513), (1, bytes(1024), 1), (4, b"", 1), (8, b"", 21), (11, some, 1), (13, some, 1))]  # fmt: skip
    try:
        yield Victim(Blk(drive, "d"), requests, serves)
    finally:
        drive.close()


@asynccontextmanager
async def console(folder: Path) -> AsyncIterator[Victim]:
    ports = [Port("hvc0", True), Port("agent", False)]
    for port in ports:
        port.write(b"for the guest" * 100)

    async def serves(driver: FakeDriver) -> None:
        await driver.queue(3).request([struct.pack("<IHH", 0, 0, 1)], [])

    requests = [(struct.pack("<IHH", which, event, value), 0) for which, event, value in (
        (0, 0, 1), (0, 3, 1), (1, 3, 1), (1, 6, 1), (1, 6, 0), (9, 3, 1))]  # fmt: skip
    yield Victim(Console(ports), [*requests, (b"output", 0), (b"", 64)], serves)


@asynccontextmanager
async def net(folder: Path) -> AsyncIterator[Victim]:
    device = Net(bytes.fromhex("525400123456"))
    echo = End(lambda frame: echo.send(frame) or True, offload=True)
    join(device.end, echo)

    async def serves(driver: FakeDriver) -> None:
        driver.queue(0).add([], [2048])
        await driver.queue(1).request([bytes(12), b"a frame that comes back"], [])
        (back,) = await driver.queue(0).completed()
        assert back.data[12 : back.length] == b"a frame that comes back"

    headers = [struct.pack("<BBHHHHH", 1, 1, 54, 1448, 34, 16, 0), bytes(12)]
    requests = [(header + bytes(12) + b"\x08\x00" + bytes(120), 0) for header in headers]
    yield Victim(device, [*requests, (b"", 2048), (bytes((2, 0, 0)), 1), (bytes((0, 4, 0)), 1)], serves)


@asynccontextmanager
async def fs(folder: Path) -> AsyncIterator[Victim]:
    (folder / "shared").mkdir(exist_ok=True)
    (folder / "shared" / "file").write_bytes(b"content")
    share = Share(open_folder(folder / "shared", False, 32), "hostile")

    def ask(op: int, nodeid: int, body: bytes) -> bytes:
        return fuse.IN_HEADER.pack(fuse.IN_HEADER.size + len(body), op, 7, nodeid, 0, 0, 0, 0, 0) + body

    init = ask(Op.INIT, 0, fuse.INIT_IN.pack(7, 31, 0, 0))
    lookup = ask(Op.LOOKUP, 1, b"file\0")

    async def serves(driver: FakeDriver) -> None:
        assert fuse.OUT_HEADER.unpack_from(await driver.queue(1).request([init], [80])) == (80, 0, 7)
        assert fuse.OUT_HEADER.unpack_from(await driver.queue(1).request([lookup], [144])) == (144, 0, 7)

    data = fuse.READ_IN.pack(1, 0, 64, 0, 0, 0)
    requests = [(init, 80), (lookup, 144), (ask(Op.OPEN, 2, bytes(8)), 32), (ask(Op.READ, 2, data), 80),
                (ask(Op.WRITE, 2, data + bytes(64)), 24), (ask(Op.FORGET, 2, bytes(8)), 0)]  # fmt: skip
    try:
        yield Victim(Fs(share, "code"), requests, serves)
    finally:
        share.close()


@asynccontextmanager
async def vsock(folder: Path) -> AsyncIterator[Victim]:
    host = VsockHost(3)

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(100):
            writer.write(data)

    host.listen(80, echo)

    def packet(operation: int, port: int, payload: bytes = b"") -> bytes:
        return HEADER.pack(3, 2, port, 80, len(payload), 1, operation, 0, 1 << 18, 0) + payload

    async def serves(driver: FakeDriver) -> None:
        await driver.queue(1).request([packet(REQUEST, 9000)], [])
        while True:  # there may be last words to connections of before
            answer = HEADER.unpack(await driver.queue(0).request([], [44]))
            if answer[3] == 9000:
                assert answer[6] == RESPONSE
                return

    requests = [(packet(operation, 4000, payload), 0) for operation, payload in (
        (REQUEST, b""), (RW, b"hello"), (RST, b""), (4, b""), (5, b""), (6, b""), (7, b""))]  # fmt: skip
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(host.run())
        await asyncio.sleep(0)
        yield Victim(Vsock(host.core), [*requests, (b"", 64), (b"", 4096)], serves)
        running.cancel()


@asynccontextmanager
async def balloon(folder: Path) -> AsyncIterator[Victim]:
    async def serves(driver: FakeDriver) -> None:
        page = (RAM_BASE + (2 << 20)) // 4096
        await driver.queue(0).request([struct.pack("<2I", page, page + 1)], [])

    pages = struct.pack("<4I", *((RAM_BASE >> 12) + n for n in (600, 601, 3, 700)))
    statistics = struct.pack("<HQHQ", 4, 1000, 5, 2000)
    yield Victim(Balloon(BalloonHost(RAM_SIZE)), [(pages, 0), (statistics, 0), (b"", 4096), (b"", 1 << 16)], serves)


VICTIMS: dict[type[VirtioDevice], Callable[[Path], AbstractAsyncContextManager[Victim]]] = {
    Rng: rng, Blk: blk, Console: console, Net: net, Fs: fs, Vsock: vsock, Balloon: balloon,
}  # fmt: skip


def test_every_device_has_an_entry() -> None:
    for module in pkgutil.iter_modules(avmm.devices.virtio.__path__):
        import_module(f"avmm.devices.virtio.{module.name}")
    kinds = {kind for kind in VirtioDevice.__subclasses__() if kind.__module__.startswith("avmm.")}
    assert kinds == VICTIMS.keys()


_ADDRESS = st.one_of(
    st.integers(RAM_BASE, RAM_BASE + 0x4000),
    st.integers(RAM_BASE + RAM_SIZE - 64, RAM_BASE + RAM_SIZE + 64),
    st.sampled_from([0, RAM_BASE - 1, (1 << 64) - 1, (1 << 64) - 16]),
    st.integers(0, (1 << 64) - 1),
)
_LENGTH = st.one_of(st.integers(0, 64), st.sampled_from([512, 513, 4096, 1 << 16, 0x7FFFFFFF, 0xFFFFFFFF]))
_FLAGS = st.sampled_from([0, NEXT, WRITE, NEXT | WRITE, INDIRECT, INDIRECT | NEXT, INDIRECT | WRITE, 0xFFFF])
_INDEX = st.one_of(st.integers(0, 17), st.integers(0, 0xFFFF))
_CHANGES = st.lists(st.tuples(st.integers(0, 63), st.integers(0, 255)), max_size=2)
_REGISTER = st.sampled_from([0x14, 0x20, 0x24, 0x30, 0x38, 0x44, 0x50, 0x64, 0x80, 0x90, 0xA0]) | st.integers(0, 0x1FF)
_STEP = st.one_of(
    st.tuples(st.just("describe"), st.integers(0, 15), _ADDRESS, _LENGTH, _FLAGS, _INDEX),
    st.tuples(st.just("request"), st.integers(0, 9), _CHANGES, st.none() | _LENGTH),
    st.tuples(st.just("offer"), _INDEX),
    st.tuples(st.just("jump"), st.integers(0, 0xFFFF)),
    st.tuples(st.just("poke"), _ADDRESS, st.binary(min_size=1, max_size=32)),
    st.tuples(st.just("register"), _REGISTER, st.sampled_from([1, 2, 4, 8]), st.integers(0, (1 << 64) - 1)),
    st.tuples(st.just("status"), st.integers(0, 255)),
    st.tuples(st.just("start")),
    st.tuples(st.just("yield")),
)
Step = tuple[object, ...]


def _do(driver: FakeDriver, queue: FakeQueue, step: Step, requests: list[tuple[bytes, int]]) -> None:
    kind, *rest = step
    match kind, rest:
        case "describe", [int(index), int(address), int(length), int(flags), int(following)]:
            queue.describe(index, address, length, flags, following)
        case "request", [int(number), list(changes), int() | None as length]:
            # Nearly right, so that more than the first check is reached; sometimes cut in two.
            data, room = requests[number % len(requests)]
            changed = bytearray(data)
            for at, value in changes:
                if at < len(changed):
                    changed[at] = value
            at, cut = RAM_BASE + 0x8000, 7 if number & 1 and len(changed) > 7 else len(changed)
            driver.memory.write(at, changed)
            room = room if length is None else length
            parts = [(at, cut, 0), (at + cut + 16, len(changed) - cut, 0), (at + 0x2000, room, WRITE)]
            driver.memory.write(at + cut + 16, changed[cut:])
            used = [part for part in parts if part[1]] or parts[:1]
            for index, (gpa, size, flags) in enumerate(used):
                queue.describe(index, gpa, size, flags | (NEXT if index < len(used) - 1 else 0), index + 1)
            queue.offer(0)
        case "offer", [int(head)]:
            queue.offer(head)
        case "jump", [int(index)]:
            queue.avail_idx = index
            queue.offer(0)
        case "poke", [int(address), bytes(data)] if RAM_BASE <= address <= RAM_BASE + RAM_SIZE - len(data):
            driver.memory.write(address, data)
        case "register", [int(offset), int(size), int(value)] if offset + size <= 0x200:
            driver.write(offset, value & (1 << 8 * size) - 1, size)
            driver.read(offset, size)
        case "status", [int(value)]:
            driver.write(0x70, value)
    queue.kick()


@pytest.mark.parametrize("kind", VICTIMS, ids=lambda kind: kind.__name__.lower())
@given(steps=st.lists(st.tuples(st.integers(0, 5), _STEP), max_size=40))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_hostile_driver_harms_nobody(kind: type[VirtioDevice], tmp_path: Path, steps: list[tuple[int, Step]]) -> None:
    async def attack() -> None:
        memory = GuestMemory()
        memory.add(Region(RAM_BASE, mmap.mmap(-1, RAM_SIZE)))
        discarded: list[tuple[int, int]] = []
        memory.on_discard = lambda region, offset, length: discarded.append((offset, length))
        async with VICTIMS[kind](tmp_path) as victim, attached(victim.device, memory) as driver, asyncio.timeout(60):
            driver.start()
            for which, step in steps:
                if step[0] == "start":
                    driver.start()
                _do(driver, driver.queue(which % len(driver.device.queues)), step, victim.requests)
                for _ in range(3):
                    await asyncio.sleep(0)
            if driver.device.guest_errors:
                assert driver.device.last_error is not None
            await driver.device.pause()
            driver.device.resume()
            driver.start()
            assert not driver.needs_reset
            await victim.serves(driver)
        assert all(0 <= offset <= offset + length <= RAM_SIZE for offset, length in discarded)
        memory.close()

    asyncio.run(attack())
