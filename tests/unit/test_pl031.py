"""PL031: the clock, its alarm, and its identity beside QEMU's."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import subprocess
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from avmm.bootloader import machine
from avmm.devices.pl031 import Pl031

DR, MR, LR, CR, IMSC, RIS, MIS, ICR = range(0, 0x20, 4)
T0 = 1_700_000_000


class Line:
    level = False

    def __init__(self) -> None:
        self.rose = asyncio.Event()

    def set(self, level: bool) -> None:
        self.level = level
        if level:
            self.rose.set()

    def pulse(self) -> None:
        raise AssertionError("a clock's interrupt is level-sensitive")

    restore = set


@dataclass
class HostClock:
    time: float = T0 + 0.25

    def __call__(self) -> float:
        return self.time


class Clock:
    def __init__(self) -> None:
        self.host = HostClock()
        self.line = Line()
        self.rtc = Pl031(threading.RLock(), self.line, self.host)

    def read(self, offset: int) -> int:
        return self.rtc.read(offset, 4)

    def write(self, offset: int, value: int) -> None:
        self.rtc.write(offset, 4, value)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@contextlib.asynccontextmanager
async def running(clock: Clock) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(clock.rtc.run())
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def test_shows_the_hosts_time(clock: Clock) -> None:
    assert clock.read(DR) == T0
    clock.host.time += 5
    assert clock.read(DR) == T0 + 5
    clock.write(DR, 1)  # read-only
    assert clock.read(DR) == T0 + 5
    assert clock.read(CR) == 1


def test_can_be_set(clock: Clock) -> None:
    clock.write(LR, 1000)
    assert clock.read(LR) == 1000
    assert clock.read(DR) == 1000
    clock.host.time += 7
    assert clock.read(DR) == 1007
    clock.write(LR, 0xFFFFFFFF)
    clock.host.time += 2
    assert clock.read(DR) == 1  # 32 bits: it wraps


def test_match_sets_the_raw_status_once(clock: Clock) -> None:
    clock.write(MR, T0 + 10)
    clock.host.time = T0 + 9.9
    assert clock.read(RIS) == 0
    clock.host.time = T0 + 10
    assert clock.read(RIS) == 1
    assert clock.read(MIS) == 0
    assert not clock.line.level
    clock.write(IMSC, 1)
    assert clock.read(MIS) == 1
    assert clock.line.level
    clock.write(ICR, 1)
    assert not clock.line.level
    clock.host.time += 100
    assert clock.read(RIS) == 0


def test_match_of_this_very_second_is_immediate(clock: Clock) -> None:
    clock.write(IMSC, 1)
    clock.write(MR, T0)
    assert clock.line.level


def test_match_in_the_past_waits_for_the_wrap(clock: Clock) -> None:
    clock.write(MR, T0 - 1)
    clock.host.time += 1_000_000
    assert clock.read(RIS) == 0
    clock.host.time = T0 + (1 << 32) - 1
    assert clock.read(RIS) == 1


async def test_alarm_is_raised_without_the_guest_looking(clock: Clock) -> None:
    async with running(clock), asyncio.timeout(60):
        clock.write(IMSC, 1)
        clock.write(MR, T0 + 1000)
        await asyncio.sleep(0)
        assert not clock.line.level
        # The host's clock has moved meanwhile: the alarm looks again when the guest writes.
        clock.host.time = T0 + 999.999
        clock.write(IMSC, 1)
        assert not clock.line.level
        await asyncio.sleep(0)
        clock.host.time = T0 + 1000
        await clock.line.rose.wait()
    assert clock.read(MIS) == 1


async def test_state_can_be_restored_while_running(clock: Clock) -> None:
    clock.write(IMSC, 1)
    clock.write(MR, T0 + 3600)
    state = clock.rtc.save()
    twin = Clock()
    async with running(twin), asyncio.timeout(60):
        await asyncio.sleep(0)
        twin.host.time = T0 + 3600
        twin.rtc.restore(state)
        await twin.line.rose.wait()
    assert twin.read(RIS) == 1


async def test_no_timer_while_no_alarm_is_wanted(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    armed: asyncio.Queue[float | None] = asyncio.Queue()
    timeout = asyncio.timeout

    def spy(delay: float | None) -> asyncio.Timeout:
        armed.put_nowait(delay)
        return timeout(delay)

    monkeypatch.setattr(asyncio, "timeout", spy)
    async with running(clock) as task:
        assert await armed.get() is None
        clock.write(MR, T0 + 5)  # masked
        assert await armed.get() is None
        clock.write(IMSC, 1)
        assert await armed.get() == 4.75
        assert not task.done()


def test_node() -> None:
    node = Pl031.fdt_node(machine.PL031)
    assert node.name == "pl031@9010000"
    assert node["clock-names"] == b"apb_pclk\0"
    assert node["interrupts"] == bytes([0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 4])


@pytest.mark.skipif(shutil.which("qemu-system-aarch64") is None, reason="qemu-system-aarch64 is not installed")
def test_reset_and_identity_like_qemu(clock: Clock) -> None:
    offsets = [*range(4, 0x20, 4), *range(0xFE0, 0x1000, 4)]
    script = "".join(f"xp /1wx {machine.PL031.base + offset:#x}\n" for offset in offsets) + "quit\n"
    monitor = subprocess.run(
        ["qemu-system-aarch64", "-M", "virt", "-S", "-nic", "none", "-display", "none", "-monitor", "stdio"],
        input=script, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    shown = re.findall(r"(\w{16}): (0x\w{8})", monitor.stdout)
    theirs = {int(address, 16) - machine.PL031.base: int(value, 16) for address, value in shown}
    ours = {offset: clock.read(offset) for offset in offsets}
    # QEMU's PeriphID2 is that of another revision; drivers mask it out.
    assert theirs.pop(0xFE8) & 0xF == ours.pop(0xFE8) & 0xF
    assert ours == theirs
