"""What every device promises, tried on each: no access raises, reset is a fresh start, restore brings back a state."""

from __future__ import annotations

import mmap
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avmm.backends.port import Port
from avmm.bus import Device
from avmm.devices.gicv3 import GICD_SIZE, Gicv3
from avmm.devices.gicv3.cpu_interface import CpuInterfaces
from avmm.devices.pl011 import PL011_SIZE, Pl011
from avmm.devices.pl031 import PL031_SIZE, Pl031
from avmm.devices.virtio.balloon import Balloon
from avmm.devices.virtio.blk import Blk
from avmm.devices.virtio.console import Console
from avmm.devices.virtio.fs import Fs
from avmm.devices.virtio.net import Net
from avmm.devices.virtio.rng import Rng
from avmm.devices.virtio.transport import VIRTIO_MMIO_SIZE, VirtioDevice, VirtioMmio
from avmm.devices.virtio.vsock import Vsock
from avmm.memory import GuestMemory, Region

SIZES = (1, 2, 4, 8)


@dataclass
class Line:
    """An interrupt line that remembers how it was driven."""

    level: bool = False
    edges: list[bool] = field(default_factory=list)

    def set(self, level: bool) -> None:
        assert level is not self.level, "a line is driven only when it changes"
        self.level = level
        self.edges.append(level)

    def pulse(self) -> None:
        self.edges += [True, False]

    def restore(self, level: bool) -> None:
        self.level = level

    def irq_changed(self, level: bool) -> None:
        self.set(level)

    def stir(self) -> None: ...

    def offer(self, intid: int) -> None: ...

    def retract(self) -> bool:
        return False


class Terminal:
    async def read(self, limit: int) -> bytes:
        return b""

    def write(self, data: bytes) -> None:
        assert len(data) == 1


@dataclass
class Subject:
    """A device with its window, the lines it drives, and its life cycle."""

    device: Device
    window: int
    lines: list[Line]
    whole: Any  # reset(), save(), restore(state): the states' types differ

    def scramble(self, accesses: list[tuple[int, int, int]]) -> None:
        for offset, size, value in accesses:
            offset = min(offset % self.window, self.window - size)
            self.device.write(offset, size, value & (1 << 8 * size) - 1)
            assert 0 <= self.device.read(offset, size) < 1 << 8 * size


def _gic() -> tuple[Gicv3, list[Line]]:
    sinks = [Line() for _ in range(3)]
    gic = Gicv3(threading.RLock(), len(sinks), 96)
    for index, sink in enumerate(sinks):
        gic.connect(index, 0x8000_0000 | index, sink)
    return gic, sinks


def distributor() -> Subject:
    gic, sinks = _gic()
    return Subject(gic.distributor, GICD_SIZE, sinks, gic)


def redistributors() -> Subject:
    gic, sinks = _gic()
    return Subject(gic.redistributors, gic.redistributors_size, sinks, gic)


class SystemRegisters:
    """The ICC_* registers as a window: two bytes of offset for each register."""

    def __init__(self, gic: Gicv3) -> None:
        interfaces = CpuInterfaces(gic)
        self._gic = gic
        self.encodings = sorted({*interfaces.readers, *interfaces.writers})

    def read(self, offset: int, size: int) -> int:
        return (self._gic.read_sysreg(1, self.encodings[offset // 8 % len(self.encodings)]) or 0) & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        self._gic.write_sysreg(offset % 3, self.encodings[offset // 8 % len(self.encodings)], value)


def system_registers() -> Subject:
    gic, sinks = _gic()
    # Something to acknowledge: everything enabled and pending.
    gic.distributor.write(0, 4, 3)
    for offset in (0x84, 0x104, 0x204):
        gic.distributor.write(offset, 4, 0xFFFFFFFF)
    return Subject(SystemRegisters(gic), 0x100, sinks, gic)


def pl011() -> Subject:
    line = Line()
    uart = Pl011(threading.RLock(), line, Terminal())
    return Subject(uart, PL011_SIZE, [line], uart)


def pl031() -> Subject:
    line = Line()
    rtc = Pl031(threading.RLock(), line, lambda: 1_700_000_000.5)
    return Subject(rtc, PL031_SIZE, [line], rtc)


def _virtio(device: VirtioDevice) -> Subject:
    """Behind a transport, with RAM where small numbers point, so that queues can be made ready."""
    line = Line()
    memory = GuestMemory()
    memory.add(Region(0, mmap.mmap(-1, 1 << 17)))
    transport = VirtioMmio(threading.RLock(), line, memory, device)
    # As far as a driver gets before it sets up its queues, so that what follows at random finds something to do.
    for offset, value in ((0x70, 1), (0x70, 3), (0x24, 1), (0x20, 1), (0x70, 0xB)):
        transport.write(offset, 4, value)
    return Subject(transport, VIRTIO_MMIO_SIZE, [line], transport)


class Medium:
    """A disk's backend that no register ever reaches."""

    size = 1 << 20
    read_only = False

    def read_now(self, offset: int, views: list[memoryview]) -> bool:
        raise AssertionError

    def write_now(self, offset: int, views: list[memoryview]) -> bool:
        raise AssertionError

    async def readv(self, offset: int, views: list[memoryview]) -> None:
        raise AssertionError

    async def writev(self, offset: int, views: list[memoryview]) -> None:
        raise AssertionError

    async def flush(self) -> None:
        raise AssertionError

    async def discard(self, offset: int, length: int) -> None:
        raise AssertionError

    async def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        raise AssertionError


def rng() -> Subject:
    return _virtio(Rng(bytes))


def blk() -> Subject:
    return _virtio(Blk(Medium(), "disk"))


def console() -> Subject:
    return _virtio(Console([Port("hvc0", True), Port("agent", False)]))


def net() -> Subject:
    return _virtio(Net(bytes.fromhex("525400123456")))


class Served:
    """A share's backend that no register ever reaches either."""

    def serve(self, readable: list[memoryview], writable: list[memoryview]) -> int:
        raise AssertionError

    async def finish(self, work: Callable[[], int]) -> int:
        raise AssertionError

    def save(self) -> None:
        pass

    def restore(self, state: None) -> None:
        pass


class Wanting:
    """The host's side of a balloon."""

    wanted = 1 << 20

    def connect(self, changed: Callable[[], None]) -> None:
        pass

    def guest_gave(self, actual: int) -> None:
        assert 0 <= actual < 1 << 44

    def returned(self, length: int) -> None:
        raise AssertionError

    async def asked(self) -> None:
        raise AssertionError

    def answered(self, values: dict[int, int]) -> None:
        raise AssertionError


def fs() -> Subject:
    return _virtio(Fs(Served(), "tag"))


class Silent:
    """A vsock protocol that no register ever reaches either."""

    def __init__(self) -> None:
        self.cid = 3
        self.output: deque[object] = deque()
        self.on_output: Callable[[], None] = lambda: None

    def packet(self, header: bytes, payload: memoryview) -> None:
        raise AssertionError

    def reset(self) -> None: ...


def vsock() -> Subject:
    return _virtio(Vsock(Silent()))


def balloon() -> Subject:
    return _virtio(Balloon(Wanting()))


VIRTIO = [rng, blk, console, net, fs, vsock, balloon]
SUBJECTS = [distributor, redistributors, system_registers, pl011, pl031, *VIRTIO]
Make = Callable[[], Subject]

# Registers lie at the beginning and the end of a window and of its 64 KiB frames; elsewhere there is not much to find.
OFFSETS = st.one_of(
    st.integers(0, 0x80),
    st.builds(lambda frame, offset: frame << 16 | offset, st.integers(0, 5), st.integers(0, 0xD00)),
    st.integers(0x6100, 0x6300),
    st.integers(0, 1 << 20),
)
VALUES = st.one_of(st.just((1 << 64) - 1), st.integers(0, 0xFFFF), st.integers(0, (1 << 64) - 1))
ACCESSES = st.lists(st.tuples(OFFSETS, st.sampled_from(SIZES), VALUES), max_size=60)


@pytest.mark.parametrize("make", SUBJECTS)
def test_every_offset_and_width_is_harmless(make: Make) -> None:
    subject = make()
    for size in SIZES:
        top = (1 << 8 * size) - 1
        # Unaligned too, but not at each byte of the emptier parts of the large windows.
        for offset in range(0, subject.window - size + 1, 1 if subject.window <= PL011_SIZE else 3):
            assert 0 <= subject.device.read(offset, size) <= top
            subject.device.write(offset, size, top)
            subject.device.write(offset, size, 0)


@pytest.mark.parametrize("make", SUBJECTS)
@given(accesses=ACCESSES)
def test_reset_equals_fresh(make: Make, accesses: list[tuple[int, int, int]]) -> None:
    subject = make()
    subject.scramble(accesses)
    subject.whole.reset()
    fresh = make()
    fresh.whole.reset()
    assert subject.whole.save() == fresh.whole.save()
    assert not any(line.level for line in subject.lines)


@pytest.mark.parametrize("make", SUBJECTS)
@given(before=ACCESSES, after=ACCESSES)
def test_restore_brings_back_what_was_saved(
    make: Make, before: list[tuple[int, int, int]], after: list[tuple[int, int, int]]
) -> None:
    subject = make()
    subject.scramble(before)
    state = subject.whole.save()
    levels = [line.level for line in subject.lines]
    subject.scramble(after)
    subject.whole.restore(state)
    assert subject.whole.save() == state
    assert [line.level for line in subject.lines] == levels
    # ... and on another machine, where it behaves as the first one does.
    twin = make()
    twin.whole.restore(state)
    assert [line.level for line in twin.lines] == levels
    subject.scramble(after)
    twin.scramble(after)
    assert twin.whole.save() == subject.whole.save()
    assert [line.level for line in twin.lines] == [line.level for line in subject.lines]


@pytest.mark.parametrize("make", [pl011, pl031, *VIRTIO])
@given(before=ACCESSES, after=ACCESSES)
@settings(max_examples=50)
def test_restore_makes_no_edge(
    make: Make, before: list[tuple[int, int, int]], after: list[tuple[int, int, int]]
) -> None:
    subject = make()
    subject.scramble(before)
    state = subject.whole.save()
    subject.scramble(after)
    edges = list(subject.lines[0].edges)
    subject.whole.restore(state)
    assert subject.lines[0].edges == edges


@pytest.mark.parametrize("make", SUBJECTS)
def test_states_of_other_versions_are_refused(make: Make) -> None:
    subject = make()
    state = subject.whole.save()
    object.__setattr__(state, "version", 99)
    with pytest.raises(ValueError, match="version 99"):
        subject.whole.restore(state)
