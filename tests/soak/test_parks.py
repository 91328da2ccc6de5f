"""No wake-up is lost: the real threads and the real loop, parks raced against interrupts, deadlines, pauses, kicks.

The guest does nothing but WFI. A poster raises its interrupt and waits until the guest has seen it, at once or after a
moment, so that each post meets another instant of a park; a wake-up that was lost would leave both waiting for ever.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator

import pytest

from avmm.hypervisor.base import ExitKind
from avmm.vcpu import park, sysregs
from avmm.vcpu.loop import Event
from tests.unit.fake_vcpu import LOST, Exit, FakeChip, FakeVcpu
from tests.unit.test_vcpu_loop import SYSTEM_OFF, WFI, Machine

SPI = 3


async def race(parks: int, seed: int, halt_poll: int = 0) -> None:
    seen = threading.Semaphore(0)
    ended = threading.Event()
    rng = random.Random(seed)

    def guest(cpu: FakeVcpu) -> Iterator[Exit | None]:
        dice = random.Random(seed + 1)
        vcpu = m.vcpus[0]
        while vcpu.counters.parks < parks:
            if dice.random() < 0.3:  # sometimes a timer races the interrupt
                cpu.sysregs[sysregs.CNTV_CVAL_EL0] = m.clock.guest_now() + dice.randrange(1000, 3000)
                cpu.sysregs[sysregs.CNTV_CTL_EL0] = 1
            yield WFI
            if not cpu.frame.irq:
                continue
            yield Exit(ExitKind.SYSREG_READ, FakeChip.ACK)
            intid = cpu.frame.result
            cpu.sysregs[sysregs.CNTV_CTL_EL0] = 0
            if intid == SPI + 32:
                line.set(False)
                seen.release()
            yield Exit(ExitKind.SYSREG_WRITE, FakeChip.ACK, value=intid)
        ended.set()
        yield SYSTEM_OFF

    def poster() -> None:
        while not ended.is_set():
            for _ in range(rng.choice((0, 0, 1, 10, 100, 1000))):
                pass
            line.set(True)
            while not seen.acquire(timeout=0.1):
                if ended.is_set():
                    return
                assert not lost.is_set(), "the guest never saw its interrupt"

    async def pauser() -> None:
        while not ended.is_set():
            await m.vcpus[0].pause()
            m.vcpus[0].resume()
            for _ in range(rng.randrange(200)):
                await asyncio.sleep(0)

    lost = threading.Event()
    m = Machine(guest, halt_poll=halt_poll)
    line = m.chip.spi(SPI)
    thread = threading.Thread(target=poster)
    run = asyncio.create_task(m.vcpus[0].run())
    thread.start()
    pausing = asyncio.create_task(pauser())
    try:
        before = -1
        while not run.done():
            assert m.vcpus[0].counters.parks > before, "no park any more: a wake-up was lost"
            before = m.vcpus[0].counters.parks
            await asyncio.wait((run,), timeout=LOST)
        assert (await run).event is Event.POWER_OFF
        assert m.vcpus[0].counters.parks >= parks
    finally:
        lost.set()
        ended.set()
        await asyncio.gather(pausing, return_exceptions=True)
        await m.vcpus[0].stop()
        thread.join()


#: Sleeps that are handed over to the loop at once, sleeps at the gate, and sleeps that begin with a poll.
SLEEPS = [(0, 0), (park.LINGER_NS, 0), (park.LINGER_NS, 200_000)]


@pytest.mark.parametrize(("linger_ns", "halt_poll"), SLEEPS)
async def test_no_wake_up_is_lost(monkeypatch: pytest.MonkeyPatch, linger_ns: int, halt_poll: int) -> None:
    monkeypatch.setattr(park, "LINGER_NS", linger_ns)
    await race(5_000, 1, halt_poll)


@pytest.mark.soak
@pytest.mark.parametrize(("linger_ns", "halt_poll"), SLEEPS)
async def test_million_parks(monkeypatch: pytest.MonkeyPatch, linger_ns: int, halt_poll: int) -> None:
    monkeypatch.setattr(park, "LINGER_NS", linger_ns)
    await race(1_000_000, 2, halt_poll)


@pytest.mark.soak
@pytest.mark.parametrize("linger_ns", [0, park.LINGER_NS])
async def test_stops(monkeypatch: pytest.MonkeyPatch, linger_ns: int) -> None:
    """A stop at any instant of a park ends the vCPU."""
    monkeypatch.setattr(park, "LINGER_NS", linger_ns)
    rng = random.Random(3)
    for _ in range(300):

        def guest(cpu: FakeVcpu) -> Iterator[Exit | None]:
            while True:
                yield WFI

        m = Machine(guest)
        run = asyncio.create_task(m.vcpus[0].run())
        for _ in range(rng.randrange(20)):
            await asyncio.sleep(0)
        await asyncio.wait_for(m.vcpus[0].stop(), LOST)
        assert (await asyncio.wait_for(run, LOST)).event is Event.STOP
