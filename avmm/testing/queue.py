"""The driver's side of virtio-mmio and of split virtqueues, for tests of devices without a guest.

::

    async with attached(Rng(os.urandom)) as driver:
        driver.start()
        queue = driver.queue(0)
        assert len(await queue.request([], [16])) == 16

Well-behaved by default; :class:`FakeQueue` gives the ring's parts away, so that a hostile driver is a few writes more.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import struct
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from avmm.devices.virtio import transport as mmio
from avmm.devices.virtio.transport import VirtioDevice, VirtioMmio
from avmm.errors import WaitTimeout
from avmm.memory import GuestMemory, Region

#: Where the driver's RAM begins, and how much of it there is, in bytes.
RAM_BASE = 0x4000_0000
RAM_SIZE = 4 << 20

NEXT, WRITE, INDIRECT = 1, 2, 4
_DESC = struct.Struct("<QIHH")

#: An answer that takes longer has been lost, in seconds.
_PATIENCE = 30.0


class Interrupt:
    """An interrupt line that can be awaited; ``raised`` counts how often it rose. See :class:`avmm.irq.IrqLine`."""

    def __init__(self) -> None:
        self.level = False
        self.raised = 0
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()

    def set(self, level: bool) -> None:
        """Drive the line."""
        if level and not self.level:
            self.raised += 1
            self._loop.call_soon_threadsafe(self._event.set)
        self.level = level

    def pulse(self) -> None:
        """One edge."""
        self.set(True)
        self.set(False)

    def restore(self, level: bool) -> None:
        """A level without an edge."""
        self.level = level

    async def wait(self) -> None:
        """Return when it has risen since the last time."""
        await self._event.wait()
        self._event.clear()


@dataclass(frozen=True, slots=True)
class Used:
    """An entry of the used ring: the head of a chain, the length the device reports, and what is in the buffers."""

    head: int
    length: int
    data: bytes


class FakeDriver:
    """Drives ``device`` through its registers; queues and buffers are in ``memory``, from ``RAM_BASE`` on."""

    def __init__(self, device: VirtioMmio, memory: GuestMemory, irq: Interrupt, lock: threading.RLock) -> None:
        self.device = device
        self.memory = memory
        self.irq = irq
        self.lock = lock
        self.event_idx = False
        self._free = RAM_BASE
        self._queues: dict[int, FakeQueue] = {}

    def read(self, offset: int, size: int = 4) -> int:
        """A register."""
        with self.lock:
            return self.device.read(offset, size)

    def write(self, offset: int, value: int, size: int = 4) -> None:
        """Write a register."""
        with self.lock:
            self.device.write(offset, size, value)

    @property
    def status(self) -> int:
        """The device status."""
        return self.read(0x70)

    @property
    def needs_reset(self) -> bool:
        """Whether the device has given up on us."""
        return bool(self.status & mmio.NEEDS_RESET)

    def features(self) -> int:
        """What the device offers."""
        found = 0
        for half in range(2):
            self.write(0x14, half)
            found |= self.read(0x10) << 32 * half
        return found

    def negotiate(self, features: int | None = None) -> bool:
        """Reset, and go as far as FEATURES_OK with ``features`` (default: all offered); whether the device agreed."""
        self.write(0x70, 0)
        self._queues.clear()
        self._free = RAM_BASE
        self.write(0x70, mmio.ACKNOWLEDGE)
        self.write(0x70, mmio.ACKNOWLEDGE | mmio.DRIVER)
        wanted = self.features() if features is None else features
        for half in range(2):
            self.write(0x24, half)
            self.write(0x20, wanted >> 32 * half & 0xFFFFFFFF)
        self.event_idx = bool(wanted & mmio.F_EVENT_IDX)
        self.write(0x70, mmio.ACKNOWLEDGE | mmio.DRIVER | mmio.FEATURES_OK)
        return bool(self.status & mmio.FEATURES_OK)

    def start(self, features: int | None = None, queue_size: int = 16) -> None:
        """Negotiate, make every queue ready and say DRIVER_OK."""
        assert self.negotiate(features), "the device did not accept the features"
        index = 0
        while self._select(index):
            self._queues[index] = FakeQueue(self, index, min(queue_size, self.read(0x34)))
            index += 1
        self.write(0x70, mmio.ACKNOWLEDGE | mmio.DRIVER | mmio.FEATURES_OK | mmio.DRIVER_OK)

    def queue(self, index: int) -> FakeQueue:
        """A queue made ready by :meth:`start`."""
        return self._queues[index]

    def config(self, offset: int, size: int) -> int:
        """A field of the configuration space."""
        return self.read(0x100 + offset, size)

    def allocate(self, size: int, align: int = 16) -> int:
        """The GPA of ``size`` fresh bytes."""
        gpa = (self._free + align - 1) // align * align
        self._free = gpa + size
        assert self._free <= RAM_BASE + RAM_SIZE, "the fake driver is out of memory"
        return gpa

    async def interrupt(self) -> int:
        """Wait for the interrupt and acknowledge it; the interrupt status as it was."""
        async with asyncio.timeout(_PATIENCE):
            while not (status := self.read(0x60)):
                await self.irq.wait()
        self.write(0x64, status)
        return status

    def _select(self, index: int) -> bool:
        self.write(0x30, index)
        return bool(self.read(0x34))


class FakeQueue:
    """The driver's half of one queue. ``desc``, ``avail`` and ``used`` are the GPAs of its parts."""

    def __init__(self, driver: FakeDriver, index: int, size: int) -> None:
        self.driver = driver
        self.index = index
        self.size = size
        self.desc = driver.allocate(16 * size)
        self.avail = driver.allocate(6 + 2 * size)
        self.used = driver.allocate(6 + 8 * size)
        for gpa, length in ((self.desc, 16 * size), (self.avail, 6 + 2 * size), (self.used, 6 + 8 * size)):
            driver.memory.write(gpa, bytes(length))
        driver.write(0x30, index)
        driver.write(0x38, size)
        for offset, gpa in ((0x80, self.desc), (0x90, self.avail), (0xA0, self.used)):
            driver.write(offset, gpa & 0xFFFFFFFF)
            driver.write(offset + 4, gpa >> 32)
        driver.write(0x44, 1)
        self.avail_idx = 0
        self._seen = 0
        self._free = list(range(size))
        self._chains: dict[int, tuple[list[int], list[tuple[int, int]]]] = {}  # head: descriptors, writable buffers

    def describe(self, index: int, gpa: int, length: int, flags: int, following: int = 0) -> None:
        """Write a descriptor, right or wrong."""
        self.driver.memory.write(self.desc + 16 * index, _DESC.pack(gpa, length, flags, following))

    def offer(self, head: int) -> None:
        """Put ``head`` into the available ring, without a notification."""
        memory = self.driver.memory
        memory.write(self.avail + 4 + 2 * (self.avail_idx % self.size), struct.pack("<H", head & 0xFFFF))
        self.avail_idx = self.avail_idx + 1 & 0xFFFF
        memory.write(self.avail + 2, struct.pack("<H", self.avail_idx))

    def kick(self) -> None:
        """Notify the device."""
        self.driver.write(0x50, self.index)

    def add(self, readable: Sequence[bytes], writable: Sequence[int], *, indirect: bool = False) -> int:
        """Offer a chain: buffers with content for the device to read, sizes of those it may write; its head."""
        memory, allocate = self.driver.memory, self.driver.allocate
        buffers = []
        for data in readable:
            gpa = allocate(max(len(data), 1))
            memory.write(gpa, data)
            buffers.append((gpa, len(data), 0))
        answers = [(allocate(max(size, 1)), size) for size in writable]
        buffers += [(gpa, size, WRITE) for gpa, size in answers]
        last = len(buffers) - 1
        if indirect:
            table = allocate(16 * len(buffers))
            for at, (gpa, length, flags) in enumerate(buffers):
                entry = _DESC.pack(gpa, length, flags | (NEXT if at < last else 0), at + 1 if at < last else 0)
                memory.write(table + 16 * at, entry)
            used = [self._free.pop(0)]
            self.describe(used[0], table, 16 * len(buffers), INDIRECT)
        else:
            used = [self._free.pop(0) for _ in buffers]
            for at, (gpa, length, flags) in enumerate(buffers):
                following = used[at + 1] if at < last else 0
                self.describe(used[at], gpa, length, flags | (NEXT if at < last else 0), following)
        self._chains[used[0]] = (used, answers)
        self.offer(used[0])
        return used[0]

    def collect(self) -> list[Used]:
        """What the device has given back since the last time."""
        memory = self.driver.memory
        (index,) = struct.unpack("<H", memory.read(self.used + 2, 2))
        found = []
        while self._seen != index:
            head, length = struct.unpack("<II", memory.read(self.used + 4 + 8 * (self._seen % self.size), 8))
            self._seen = self._seen + 1 & 0xFFFF
            descriptors, answers = self._chains.pop(head)
            self._free += descriptors
            found.append(Used(head, length, b"".join(memory.read(gpa, size) for gpa, size in answers)))
        if self.driver.event_idx:  # wake us for the next one
            memory.write(self.avail + 4 + 2 * self.size, struct.pack("<H", self._seen))
        return found

    async def completed(self, count: int = 1) -> list[Used]:
        """Wait until the device has given ``count`` chains back. Raises WaitTimeout when it never does."""
        found = self.collect()
        try:
            while len(found) < count:
                await self.driver.interrupt()
                found += self.collect()
        except TimeoutError:
            raise WaitTimeout(f"the device gave back {len(found)} chains of {count}", elapsed=_PATIENCE) from None
        return found

    async def request(self, readable: Sequence[bytes], writable: Sequence[int], *, indirect: bool = False) -> bytes:
        """One chain there and back: what the writable buffers hold then."""
        head = self.add(readable, writable, indirect=indirect)
        self.kick()
        (done,) = await self.completed()
        assert done.head == head
        return done.data


@contextlib.asynccontextmanager
async def attached(device: VirtioDevice, memory: GuestMemory | None = None) -> AsyncIterator[FakeDriver]:
    """``device`` behind a transport of its own, its work running, and a driver for it. RAM is made where not given."""
    lock = threading.RLock()
    irq = Interrupt()
    ram = memory or GuestMemory()
    if memory is None:
        ram.add(Region(RAM_BASE, mmap.mmap(-1, RAM_SIZE)))
    transport = VirtioMmio(lock, irq, ram, device)
    work = asyncio.create_task(transport.run())
    try:
        yield FakeDriver(transport, ram, irq, lock)
    finally:
        work.cancel()
        results = await asyncio.gather(work, return_exceptions=True)
        transport.close()
        if memory is None:
            ram.close()
        for result in results:
            if isinstance(result, Exception):
                raise result
