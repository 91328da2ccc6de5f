"""The vCPU loop against a scripted engine: exits, parking, power, pause, stop, cancellation, nothing left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import uvloop

from avmm.bus import Bus
from avmm.clock import Clock, DeadlineTimers
from avmm.errors import EngineError, GuestError
from avmm.hypervisor.base import ExitKind, Finish, Reg, Vcpu
from avmm.vcpu import Event, Outcome, Psci, VcpuLoop, sysregs
from avmm.vcpu.park import Cause, Mode
from tests.unit.fake_vcpu import LOST, RUN_ON, Exit, FakeChip, FakeHypervisor, FakeVcpu, Guest
from tests.unit.loops import at_end, on_both_loops

SYSTEM_OFF = Exit(ExitKind.HVC, args=(0x8400_0008,))
WFI = Exit(ExitKind.WFI, syndrome=0x07E0_0000)
UART = 0x900_0000
RAM = 0x4000_0000


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    threads = set(threading.enumerate())
    yield
    assert {thread.name for thread in threading.enumerate() if thread not in threads} == set()


@dataclass
class Register:
    """A device of one register."""

    value: int = 0xA5
    writes: list[tuple[int, int, int]] = field(default_factory=list)

    def read(self, offset: int, size: int) -> int:
        return self.value + offset

    def write(self, offset: int, size: int, value: int) -> None:
        self.writes.append((offset, size, value))


class Machine:
    """What a VM is to its vCPUs."""

    def __init__(self, *guests: Guest, lose_kicks: int = 0, halt_poll: int = 0) -> None:
        self.lock = threading.RLock()
        self.clock = Clock()
        self.timers = DeadlineTimers(asyncio.get_running_loop())
        at_end(self.timers.close)
        self.bus = Bus()
        self.register = Register()
        self.bus.add(UART, 0x1000, self.register, "register")
        self.chip = FakeChip(self.lock)
        self.psci = Psci(lambda address: RAM <= address < RAM + 0x1000_0000)
        self.hypervisor = FakeHypervisor(self.clock, list(guests), lose_kicks=lose_kicks)
        self.vcpus = [
            VcpuLoop(
                n,
                hypervisor=self.hypervisor,
                bus=self.bus,
                irqchip=self.chip,
                psci=self.psci,
                clock=self.clock,
                timers=self.timers,
                lock=self.lock,
                halt_poll=halt_poll,
            )
            for n in range(len(guests))
        ]
        if guests:
            self.psci.power_on(0, RAM, 0x1234)

    @property
    def fake(self) -> FakeVcpu:
        return self.hypervisor.vcpus[0]

    async def run(self) -> Outcome:
        return await asyncio.wait_for(self.vcpus[0].run(), LOST)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Let others run until ``condition``; fails when it never comes."""
        async with asyncio.timeout(LOST):
            while not condition():  # noqa: ASYNC110  # the state of another thread: there is no event to wait for
                await asyncio.sleep(0)


@pytest.fixture
def machine() -> Iterator[Callable[..., Machine]]:
    made: list[Machine] = []

    def make(*guests: Guest, lose_kicks: int = 0) -> Machine:
        made.append(Machine(*guests, lose_kicks=lose_kicks))
        return made[-1]

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.sleep(0))  # libuv opens a pipe for the process, once
    fds = len(os.listdir("/proc/self/fd"))
    yield make
    for each in made:
        assert all(vcpu.closed for vcpu in each.hypervisor.vcpus.values())
    assert len(os.listdir("/proc/self/fd")) == fds


Make = Callable[..., Machine]


@on_both_loops
async def test_boot_state_and_power_off(machine: Make) -> None:
    def guest(cpu: FakeVcpu) -> Iterator[Exit | None]:
        assert cpu.regs[Reg.PC] == RAM
        assert cpu.regs[0] == 0x1234
        assert cpu.regs[Reg.CPSR] == 0x3C5
        assert cpu.sysregs[sysregs.MPIDR_EL1] == 1 << 31
        assert cpu.sysregs[sysregs.ID_AA64PFR0_EL1] == 0x100_0022
        assert cpu.offset == m.clock.offset
        yield SYSTEM_OFF

    m = machine(guest)
    assert await m.run() == Outcome(Event.POWER_OFF, 0)
    assert m.vcpus[0].mode is Mode.STOPPED


@on_both_loops
async def test_mmio(machine: Make) -> None:
    def guest(cpu: FakeVcpu) -> Iterator[Exit | None]:
        yield Exit(ExitKind.MMIO_READ, UART + 4, size=2)
        assert cpu.frame.result == 0xA9
        yield Exit(ExitKind.MMIO_WRITE, UART + 8, size=1, value=0x77)
        yield SYSTEM_OFF

    m = machine(guest)
    await m.run()
    assert m.register.writes == [(8, 1, 0x77)]
    assert m.fake.finished == [Finish.NONE, Finish.RESULT, Finish.ADVANCE]
    assert m.vcpus[0].counters.exits[ExitKind.MMIO_READ] == 1


@on_both_loops
async def test_system_registers(machine: Make) -> None:
    def guest(cpu: FakeVcpu) -> Iterator[Exit | None]:
        yield Exit(ExitKind.SYSREG_READ, FakeChip.ACK)
        assert cpu.frame.result == 1023
        yield Exit(ExitKind.SYSREG_WRITE, FakeChip.ACK, value=5)
        yield Exit(ExitKind.SYSREG_READ, 0xC03F)  # reserved ID register
        assert cpu.frame.result == 0
        yield Exit(ExitKind.SYSREG_WRITE, 0x8084)  # OSLAR_EL1
        yield SYSTEM_OFF

    m = machine(guest)
    await m.run()
    assert m.chip.written[0] == (0, FakeChip.ACK, 5)
    assert m.fake.finished == [0, Finish.RESULT, Finish.ADVANCE, Finish.RESULT, Finish.ADVANCE]


@pytest.mark.parametrize(
    ("pstate", "vector", "exception_class"), [(0x3C5, 0x200, 0x25), (0x3C4, 0x000, 0x25), (0x6000_0000, 0x400, 0x24)]
)
@pytest.mark.parametrize("kind", [ExitKind.MMIO_READ, ExitKind.MMIO_WRITE, ExitKind.ABORT])
@on_both_loops
async def test_nothing_at_the_address(
    machine: Make, kind: ExitKind, pstate: int, vector: int, exception_class: int
) -> None:
    wnr = 0x40 if kind is ExitKind.MMIO_WRITE else 0

    def guest(cpu: FakeVcpu) -> Iterator[Exit | None]:
        cpu.regs[Reg.CPSR] = pstate
        cpu.regs[Reg.PC] = RAM + 0x40
        cpu.sysregs[sysregs.VBAR_EL1] = RAM + 0x800
        yield Exit(kind, 0x100_0000, syndrome=0x24 << 26 | 1 << 25 | wnr | 0x6, virtual_address=0xFFFF_0000_0100_0000)
        assert cpu.regs[Reg.PC] == RAM + 0x800 + vector
        assert cpu.sysregs[sysregs.ELR_EL1] == RAM + 0x40
        assert cpu.sysregs[sysregs.SPSR_EL1] == pstate
        assert cpu.sysregs[sysregs.ESR_EL1] == exception_class << 26 | 1 << 25 | wnr | 0x10
        assert cpu.sysregs[sysregs.FAR_EL1] == 0xFFFF_0000_0100_0000
        assert cpu.regs[Reg.CPSR] & 0x3DF == 0x3C5
        yield SYSTEM_OFF

    m = machine(guest)
    assert (await m.run()).event is Event.POWER_OFF
    assert m.fake.finished[1] == Finish.NONE
    assert m.vcpus[0].counters.aborts == 1


@on_both_loops
async def test_instruction_abort(machine: Make) -> None:
    def guest(cpu: FakeVcpu) -> Iterator[Exit | None]:
        yield Exit(ExitKind.ABORT, syndrome=0x20 << 26 | 1 << 25 | 0x86)
        assert cpu.sysregs[sysregs.ESR_EL1] == 0x21 << 26 | 1 << 25 | 0x10
        yield SYSTEM_OFF

    m = machine(guest)
    await m.run()
    assert m.vcpus[0].counters.aborts == 1


@pytest.mark.parametrize(
    "exit_",
    [
        Exit(ExitKind.SYSREG_READ, 0xC7FF),
        Exit(ExitKind.SYSREG_WRITE, 0xC7FF),
        Exit(ExitKind.SYSREG_WRITE, 0xC038),  # an ID register cannot be written
        Exit(ExitKind.OTHER, syndrome=0x19 << 26),
    ],
)
@on_both_loops
async def test_undefined(machine: Make, exit_: Exit) -> None:
    def guest(cpu: FakeVcpu) -> Iterator[Exit | None]:
        yield exit_
        assert cpu.sysregs[sysregs.ESR_EL1] == 1 << 25
        assert cpu.sysregs[sysregs.ELR_EL1] == RAM
        assert cpu.regs[Reg.PC] == 0x200
        yield SYSTEM_OFF

    m = machine(guest)
    assert (await m.run()).event is Event.POWER_OFF
    assert m.vcpus[0].counters.undefined == 1


@on_both_loops
async def test_faults(machine: Make) -> None:
    def strange(cpu: FakeVcpu) -> Iterator[Exit | None]:
        yield Exit(ExitKind.OTHER, syndrome=0x3F << 26)

    outcome = await machine(strange).run()
    assert outcome.event is Event.FAULT
    assert isinstance(outcome.error, GuestError)
    assert f"pc {RAM:#x}" in str(outcome.error)

    def broken(cpu: FakeVcpu) -> Iterator[Exit | None]:
        yield Exit(ExitKind.ERROR, value=0xFFFF_FFFF_FAE9_4001)

    outcome = await machine(broken).run()
    assert outcome.event is Event.FAULT
    assert isinstance(outcome.error, EngineError)
    assert outcome.error.code == 0xFAE9_4001


@on_both_loops
async def test_reset(machine: Make) -> None:
    def guest(cpu: FakeVcpu) -> Iterator[Exit | None]:
        yield Exit(ExitKind.SMC, args=(0x8400_0009,))

    assert (await machine(guest).run()).event is Event.RESET


@on_both_loops
async def test_calls(machine: Make) -> None:
    def guest(cpu: FakeVcpu) -> Iterator[Exit | None]:
        yield Exit(ExitKind.SMC, args=(0x8400_0000,))
        assert cpu.regs[0] == 0x1_0001
        yield Exit(ExitKind.HVC, args=(0xDEAD,))
        assert cpu.regs[0] == (1 << 64) - 1
        yield SYSTEM_OFF

    m = machine(guest)
    await m.run()
    assert m.fake.finished == [Finish.NONE, Finish.ADVANCE, Finish.NONE]


@on_both_loops
async def test_wfi_sleeps_until_the_timer(machine: Make) -> None:
    """A tick: park, wake at the deadline, take the timer's exit, drive PPI 27; the mask goes with its cause."""
    ticks = 5

    def guest(cpu: FakeVcpu) -> Iterator[Exit | None]:
        for _ in range(ticks):
            cval = m.clock.guest_now() + 24_000  # 1 ms
            cpu.sysregs[sysregs.CNTV_CVAL_EL0] = cval
            cpu.sysregs[sysregs.CNTV_CTL_EL0] = 1
            while not cpu.frame.irq:
                yield WFI
            assert m.clock.guest_now() >= cval
            assert cpu.frame.vtimer_masked
            yield Exit(ExitKind.SYSREG_READ, FakeChip.ACK)
            assert cpu.frame.result == 27
            cpu.sysregs[sysregs.CNTV_CTL_EL0] = 0
            yield Exit(ExitKind.SYSREG_WRITE, FakeChip.ACK, value=27)
            assert not cpu.frame.irq
            assert not cpu.frame.vtimer_masked
        yield SYSTEM_OFF

    m = machine(guest)
    assert (await m.run()).event is Event.POWER_OFF
    counters, wakes = m.vcpus[0].counters, m.vcpus[0].parking.wakes
    assert counters.parks == wakes[Cause.TIMER] == ticks  # never early, or it would park again
    assert counters.exits[ExitKind.VTIMER] == 0  # the interrupt goes in with the wake
    assert counters.exits[ExitKind.WFI] == ticks
    assert m.chip.lines[0, 27].edges == [True, False] * ticks


@on_both_loops
async def test_wfi_with_a_masked_or_disabled_timer_sleeps_on(machine: Make) -> None:
    def guest(cpu: FakeVcpu) -> Iterator[Exit | None]:
        cpu.sysregs[sysregs.CNTV_CVAL_EL0] = 0
        cpu.sysregs[sysregs.CNTV_CTL_EL0] = 3  # due, but IMASK
        yield WFI
        yield SYSTEM_OFF

    m = machine(guest)
    run = asyncio.create_task(m.run())
    await m.until(lambda: m.vcpus[0].mode is Mode.PARKED)
    assert m.vcpus[0].parking.deadline is None
    m.chip.spi(1).set(True)
    assert (await run).event is Event.POWER_OFF
    assert m.vcpus[0].parking.wakes[Cause.IRQ] == 1


@on_both_loops
async def test_expired_timer_whose_interrupt_is_disabled_does_not_spin(machine: Make) -> None:
    """PPI 27 is high but the controller passes nothing on: hardware sleeps, and so must we."""

    def guest(cpu: FakeVcpu) -> Iterator[Exit | None]:
        cpu.sysregs[sysregs.CNTV_CTL_EL0] = 1
        while not cpu.frame.irq:
            yield WFI
        yield SYSTEM_OFF

    m = machine(guest)
    m.chip.disabled.add(27)
    run = asyncio.create_task(m.run())
    await m.until(lambda: m.vcpus[0].mode is Mode.PARKED)
    assert m.vcpus[0].counters.exits[ExitKind.WFI] == 2  # the first lets the engine raise its timer
    m.chip.spi(1).set(True)
    await run


@on_both_loops
async def test_wfi_with_an_interrupt_pending_goes_on(machine: Make) -> None:
    def guest(cpu: FakeVcpu) -> Iterator[Exit | None]:
        assert cpu.frame.irq
        yield WFI
        yield SYSTEM_OFF

    m = machine(guest)
    m.chip.spi(0).set(True)
    await m.run()
    assert m.vcpus[0].counters.parks == 0
    assert m.vcpus[0].counters.not_parked_pending == 1


@on_both_loops
async def test_wfit(machine: Make) -> None:
    def guest(cpu: FakeVcpu) -> Iterator[Exit | None]:
        until = m.clock.guest_now() + 48_000
        yield Exit(ExitKind.WFI, value=until, syndrome=0b10)
        assert m.clock.guest_now() >= until
        yield Exit(ExitKind.WFI, value=0, syndrome=0b10)
        yield SYSTEM_OFF

    m = machine(guest)
    await m.run()
    assert m.vcpus[0].parking.wakes[Cause.TIMER] == 1
    assert m.vcpus[0].counters.not_parked_expired == 1


@on_both_loops
async def test_standby_is_wfi(machine: Make) -> None:
    def guest(cpu: FakeVcpu) -> Iterator[Exit | None]:
        cpu.sysregs[sysregs.CNTV_CVAL_EL0] = m.clock.guest_now() + 48_000
        cpu.sysregs[sysregs.CNTV_CTL_EL0] = 1
        yield Exit(ExitKind.HVC, args=(0xC400_0001, 0))
        assert cpu.regs[0] == 0
        assert cpu.timer_due()
        yield SYSTEM_OFF

    m = machine(guest)
    await m.run()
    assert m.vcpus[0].counters.parks == 1


@on_both_loops
async def test_long_run_of_wfe_naps(machine: Make) -> None:
    def guest(cpu: FakeVcpu) -> Iterator[Exit | None]:
        for _ in range(100):
            yield Exit(ExitKind.WFE)
        yield Exit(ExitKind.UNKNOWN)
        for _ in range(300):
            yield Exit(ExitKind.WFE)
        yield SYSTEM_OFF

    m = machine(guest)
    await m.run()
    assert m.vcpus[0].counters.parks == 300 - 255


@pytest.mark.parametrize("from_thread", [False, True])
@on_both_loops
async def test_interrupt_kicks_a_running_guest(machine: Make, from_thread: bool) -> None:
    def guest(cpu: FakeVcpu) -> Iterator[Exit | None]:
        yield RUN_ON
        assert cpu.frame.irq
        yield SYSTEM_OFF

    m = machine(guest)
    run = asyncio.create_task(m.run())
    await m.until(lambda: bool(m.hypervisor.vcpus) and m.fake.in_guest.is_set())
    if from_thread:
        await asyncio.to_thread(m.chip.spi(3).set, True)
    else:
        m.chip.spi(3).set(True)
    assert (await run).event is Event.POWER_OFF
    await asyncio.get_running_loop().shutdown_default_executor()


@on_both_loops
async def test_device_interrupt_wakes_from_another_thread(machine: Make) -> None:
    def guest(cpu: FakeVcpu) -> Iterator[Exit | None]:
        for n in range(50):
            yield WFI
            assert cpu.frame.irq, n
            m.chip.spi(3).set(False)
        yield SYSTEM_OFF

    m = machine(guest)
    line = m.chip.spi(3)
    done = threading.Event()

    def device() -> None:
        while not done.is_set():
            if m.vcpus[0].mode is Mode.PARKED:
                line.set(True)
            time.sleep(0)

    thread = threading.Thread(target=device)
    thread.start()
    try:
        assert (await m.run()).event is Event.POWER_OFF
    finally:
        done.set()
        thread.join()
    assert m.vcpus[0].parking.wakes[Cause.IRQ] == m.vcpus[0].counters.parks


@on_both_loops
async def test_no_interrupt_is_lost(machine: Make) -> None:
    """Interrupts from another thread, the next as soon as the last is taken, raced against WFI."""
    rounds = 2000

    def guest(cpu: FakeVcpu) -> Iterator[Exit | None]:
        for _ in range(rounds):
            while not cpu.frame.irq:
                yield WFI
            line.set(False)
            taken.release()
            yield Exit(ExitKind.UNKNOWN)
        yield SYSTEM_OFF

    m = machine(guest)
    line = m.chip.spi(3)
    taken = threading.Semaphore()

    def device() -> None:
        for _ in range(rounds):
            assert taken.acquire(timeout=LOST)
            line.set(True)

    thread = threading.Thread(target=device)
    thread.start()
    assert (await m.run()).event is Event.POWER_OFF
    thread.join()
    assert m.vcpus[0].counters.exits[ExitKind.UNKNOWN] == rounds


@on_both_loops
async def test_signals_stay_away_from_the_thread(machine: Make) -> None:
    blocked: set[int] = set()

    def guest(cpu: FakeVcpu) -> Iterator[Exit | None]:
        blocked.update(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        yield SYSTEM_OFF

    await machine(guest).run()
    assert {signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGUSR1, signal.SIGPROF, signal.SIGCHLD} <= blocked
    assert signal.SIGSEGV not in blocked


@on_both_loops
async def test_cpu_on_off_on(machine: Make) -> None:
    def boot(cpu: FakeVcpu) -> Iterator[Exit | None]:
        yield Exit(ExitKind.HVC, args=(0xC400_0003, 1, RAM + 0x100, 7))
        assert cpu.regs[0] == 0
        while True:
            yield Exit(ExitKind.HVC, args=(0xC400_0004, 1, 0))
            if cpu.regs[0] == 1:
                break
        yield Exit(ExitKind.HVC, args=(0xC400_0003, 1, RAM + 0x200, 8))
        assert cpu.regs[0] == 0
        yield WFI
        yield SYSTEM_OFF

    def second(cpu: FakeVcpu) -> Iterator[Exit | None]:
        assert (cpu.regs[Reg.PC], cpu.regs[0]) == (RAM + 0x100, 7)
        assert cpu.sysregs[sysregs.MPIDR_EL1] == 1 << 31 | 1
        cpu.sysregs[sysregs.SCTLR_EL1] |= 1
        yield Exit(ExitKind.SMC, args=(0x8400_0002,))
        assert (cpu.regs[Reg.PC], cpu.regs[0]) == (RAM + 0x200, 8)
        assert not cpu.sysregs[sysregs.SCTLR_EL1] & 1
        m.chip.drive(0, 40, True)
        yield Exit(ExitKind.HVC, args=(0x8400_0002,))

    m = machine(boot, second)
    other = asyncio.create_task(m.vcpus[1].run())
    assert (await m.run()).event is Event.POWER_OFF
    await m.vcpus[1].stop()
    assert await other == Outcome(Event.STOP, 1)
    assert m.hypervisor.vcpus[1].finished == [0, 0]
    assert m.vcpus[1].parking.wakes[Cause.POWER] == 2
    assert m.chip.resets == [0, 1, 1]


@on_both_loops
async def test_pause_running_and_resume(machine: Make) -> None:
    def guest(cpu: FakeVcpu) -> Iterator[Exit | None]:
        yield RUN_ON
        yield RUN_ON
        yield SYSTEM_OFF

    m = machine(guest, lose_kicks=2)
    run = asyncio.create_task(m.run())
    for _ in range(2):
        await m.until(lambda: bool(m.hypervisor.vcpus) and m.fake.in_guest.is_set())
        await m.vcpus[0].pause()
        entries = m.fake.entries
        assert await m.vcpus[0].call(lambda vcpu: vcpu.get_reg(0)) == 0x1234
        assert m.fake.entries == entries
        m.vcpus[0].resume()
    assert (await run).event is Event.POWER_OFF


@on_both_loops
async def test_pause_while_parked(machine: Make) -> None:
    def guest(cpu: FakeVcpu) -> Iterator[Exit | None]:
        yield WFI
        yield SYSTEM_OFF

    m = machine(guest)
    run = asyncio.create_task(m.run())
    await m.until(lambda: m.vcpus[0].mode is Mode.PARKED)
    await m.vcpus[0].pause()
    entries = m.fake.entries
    m.chip.spi(0).set(True)  # wakes it, but it may not run
    for _ in range(20):
        await m.vcpus[0].call(lambda vcpu: None)
    assert m.fake.entries == entries
    assert not run.done()
    m.vcpus[0].resume()
    assert (await run).event is Event.POWER_OFF


def _runs_on(cpu: FakeVcpu) -> Iterator[Exit | None]:
    while True:
        yield RUN_ON


def _sleeps(cpu: FakeVcpu) -> Iterator[Exit | None]:
    while True:
        yield WFI


def _busy_with_exits(cpu: FakeVcpu) -> Iterator[Exit | None]:
    while True:
        yield Exit(ExitKind.MMIO_READ, UART)


GUESTS = pytest.mark.parametrize("guest", [_runs_on, _sleeps, _busy_with_exits])


@GUESTS
@pytest.mark.parametrize("lose_kicks", [0, 3])
@on_both_loops
async def test_stop(machine: Make, guest: Guest, lose_kicks: int) -> None:
    m = machine(guest, lose_kicks=lose_kicks)
    run = asyncio.create_task(m.run())
    await m.until(lambda: bool(m.hypervisor.vcpus) and m.fake.entries > 0)
    await m.vcpus[0].stop()
    assert await run == Outcome(Event.STOP, 0)


@GUESTS
@on_both_loops
async def test_stop_while_paused(machine: Make, guest: Guest) -> None:
    m = machine(guest)
    run = asyncio.create_task(m.run())
    await m.until(lambda: bool(m.hypervisor.vcpus) and m.fake.entries > 0)
    await m.vcpus[0].pause()
    await m.vcpus[0].stop()
    assert await run == Outcome(Event.STOP, 0)


@on_both_loops
async def test_stop_one_that_was_never_on(machine: Make) -> None:
    m = machine(_runs_on, _runs_on)
    run = asyncio.create_task(m.vcpus[1].run())
    await m.until(lambda: len(m.hypervisor.vcpus) == 1)
    await m.vcpus[1].stop()
    assert await run == Outcome(Event.STOP, 1)


@GUESTS
@pytest.mark.parametrize("cancels", [1, 3])
@on_both_loops
async def test_cancel(machine: Make, guest: Guest, cancels: int) -> None:
    m = machine(guest, lose_kicks=1)
    run = asyncio.create_task(m.vcpus[0].run())
    await m.until(lambda: bool(m.hypervisor.vcpus) and m.fake.entries > 0)
    for _ in range(cancels):
        run.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await run
    assert m.fake.closed


@on_both_loops
async def test_cancel_at_every_step(machine: Make) -> None:
    """Whatever turn of the loop a cancellation lands in, the thread is joined and the vCPU destroyed."""
    for turns in range(40):
        m = machine(_sleeps)
        run = asyncio.create_task(m.vcpus[0].run())
        for _ in range(turns):
            await asyncio.sleep(0)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        assert m.vcpus[0].mode in (Mode.STOPPED, Mode.RUNNING)


@on_both_loops
async def test_engine_that_cannot_make_a_vcpu(machine: Make) -> None:
    m = machine()
    vcpu = VcpuLoop(
        0,
        hypervisor=m.hypervisor,
        bus=m.bus,
        irqchip=m.chip,
        psci=m.psci,
        clock=m.clock,
        timers=m.timers,
        lock=m.lock,
    )

    def refuse() -> Vcpu:
        raise EngineError("hv_vcpu_create failed: HV_NO_RESOURCES", 0xFAE9_4005)

    m.hypervisor.create_vcpu = refuse  # type: ignore[method-assign]  # the engine refuses
    with pytest.raises(EngineError):
        await vcpu.run()


@on_both_loops
async def test_counters_have_names(machine: Make) -> None:
    def guest(cpu: FakeVcpu) -> Iterator[Exit | None]:
        yield SYSTEM_OFF

    m = machine(guest)
    await m.run()
    assert m.vcpus[0].snapshot_counters()["exit_hvc"] == 1
