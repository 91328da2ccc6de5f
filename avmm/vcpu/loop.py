"""One vCPU: its thread, which runs the guest and serves exits, and its coroutine, which waits.

The split is by cost. An exit served on the vCPU's thread takes microseconds, a trip to the event loop and back
hundreds: so the thread comes back only with something to await (park, off, pause) or to report (:class:`Event`).
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, Protocol, TypeVar

from avmm.aio import outlast
from avmm.bus import Bus
from avmm.clock import EXPIRED, Clock
from avmm.errors import AvmmError, EngineError, GuestError, GuestFault
from avmm.hypervisor.base import ExitKind, Finish, Hypervisor, Reg, Vcpu
from avmm.irq import IrqChip
from avmm.vcpu import exits, sysregs
from avmm.vcpu.park import PAUSE, STOP, TRIP_NS, Cause, Mode, Parking, Timers
from avmm.vcpu.psci import SUCCESS, Action, Psci
from avmm.vcpu.state import VcpuState, apply, capture
from avmm.vcpu.thread import VcpuThread

T = TypeVar("T")

_U64: Final = (1 << 64) - 1

#: INTID of the EL1 virtual timer's PPI (Arm BSA, and what our device tree says).
VTIMER_INTID: Final = 27

#: CNTV_CTL_EL0 when the timer's output is high: ENABLE and ISTATUS, not IMASK.
_VTIMER_HIGH: Final = 0b101

#: PSTATE at a vCPU's start: EL1h, DAIF masked (Linux Documentation/arch/arm64/booting.rst; DEN 0022, 6.4.3.2).
_PSTATE_AT_START: Final = 0x3C5

#: WFE is a hint and steps over. A guest that does nothing else so many times on end waits for another vCPU (a lock),
#: which needs the processor and the interpreter more than we do: from then on each WFE dozes on its thread, so many
#: seconds. After many dozes (a spin-table secondary) it naps: it parks, so many nanoseconds or until an interrupt.
_WFE_SPINS: Final = 8
_WFE_DOZE: Final = 20e-6
_WFE_DOZES: Final = 256
_WFE_NAP_NS: Final = 1_000_000

_MMIO_READ: Final = int(ExitKind.MMIO_READ)
_MMIO_WRITE: Final = int(ExitKind.MMIO_WRITE)
_CANCELED: Final = int(ExitKind.CANCELED)
_WFE: Final = int(ExitKind.WFE)
_RUNNING: Final = Mode.RUNNING
_NONE: Final = int(Finish.NONE)
_ADVANCE: Final = int(Finish.ADVANCE)
_RESULT: Final = int(Finish.RESULT)


class Event(Enum):
    """Why a vCPU's thread came back to the loop."""

    PARK = "park"
    OFF = "off"
    PAUSE = "pause"
    STOP = "stop"
    POWER_OFF = "power-off"
    RESET = "reset"
    FAULT = "fault"


#: Events that end :meth:`VcpuLoop.run`.
_ENDS: Final = frozenset({Event.STOP, Event.POWER_OFF, Event.RESET, Event.FAULT})


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a vCPU's run ended: STOP, POWER_OFF, RESET or FAULT, and with FAULT the error."""

    event: Event
    vcpu: int
    error: AvmmError | None = None


@dataclass(slots=True)
class Counters:
    """What a vCPU did, as plain numbers that anybody may read at any time."""

    exits: list[int] = field(default_factory=lambda: [0] * len(ExitKind))  # by ExitKind
    parks: int = 0
    not_parked_expired: int = 0  # the deadline had passed already
    not_parked_soon: int = 0  # it was less than a trip away
    not_parked_pending: int = 0  # an interrupt, a pause or a stop was pending
    aborts: int = 0  # external aborts injected
    undefined: int = 0  # undefined instruction exceptions injected


class Tracer(Protocol):
    """Who wants to see each exit: :class:`avmm.trace.VcpuTrack`."""

    def runner(self, vcpu: Vcpu) -> Callable[[], int]:
        """What to call in the place of ``vcpu.run``. On the vCPU's thread, each time it is about to run the guest."""
        ...


class VcpuLoop:
    """vCPU ``index`` of a VM. Made and used on the event loop's thread; ``lock`` is the VM's. ``halt_poll``: the most
    nanoseconds that a sleep may begin with a busy wait, which adapts.

    ``run()`` is its whole life. A vCPU starts off; ``psci.power_on(index, entry, x0)`` starts one::

        vcpus = [VcpuLoop(n, hypervisor=…, bus=…, irqchip=…, psci=…, clock=…, timers=…, lock=…) for n in range(cpus)]
        psci.power_on(0, entry, dtb)
        outcomes = [tasks.create_task(vcpu.run()) for vcpu in vcpus]
    """

    def __init__(
        self,
        index: int,
        *,
        hypervisor: Hypervisor,
        bus: Bus,
        irqchip: IrqChip,
        psci: Psci,
        clock: Clock,
        timers: Timers,
        lock: threading.RLock,
        halt_poll: int = 0,
    ) -> None:
        self.index = index
        self.mpidr = sysregs.mpidr(index)
        self.counters = Counters()
        self.parking = Parking(lock, asyncio.get_running_loop(), timers)
        self._hypervisor = hypervisor
        self._bus = bus
        self._irqchip = irqchip
        self._psci = psci
        self._clock = clock
        self._lock = lock
        self._halt_poll = halt_poll
        irqchip.connect(index, self.mpidr, self.parking)
        psci.connect(self.mpidr, self.parking.power_on)
        self._vtimer_line = irqchip.ppi(index, VTIMER_INTID)
        self._vtimer_masked = False  # by VTIMER_ACTIVATED, until we unmask it
        self._vtimer_high = False  # what we drive PPI 27 with
        self._overdue: int | None = None  # the CVAL that a WFI found expired
        self._due: int | None = None  # when the timer fires that the guest sleeps for
        self._offset: int | None = None  # the clock's, as the engine has it
        self._thread: VcpuThread | None = None
        self._job: asyncio.Future[Event] | None = None
        self._resumed = asyncio.Event()
        self._resumed.set()
        self._vcpu: Vcpu | None = None
        self._error: AvmmError | None = None
        self._sctlr_at_reset = 0
        self._wfe_run = 0
        self._wfe_others = 0
        self.tracer: Tracer | None = None

    # The coroutine.

    async def start(self) -> None:
        """Create the thread and, on it, the vCPU. Raises EngineError."""
        self._thread = VcpuThread(f"avmm-vcpu{self.index}")
        await self._thread.submit(self._create)

    async def run(self) -> Outcome:
        """Run until the guest powers off, resets or faults, or :meth:`stop`; then destroy the vCPU, join its thread.

        Cancelling does the same and raises CancelledError.
        """
        try:
            if self._thread is None:
                await self.start()
            return await self._run()
        finally:
            await outlast(asyncio.ensure_future(self.close()))

    async def report(self) -> Outcome:
        """:meth:`run`; what goes wrong on the host's side is an outcome too, not the end of a task group."""
        try:
            return await self.run()
        except AvmmError as error:
            return Outcome(Event.FAULT, self.index, error)

    async def _run(self) -> Outcome:
        parking = self.parking
        thread = self._thread
        assert thread is not None
        while True:
            await parking.wait()
            await self._resumed.wait()
            if parking.attention & STOP:
                return Outcome(Event.STOP, self.index)
            # Shielded: a cancelled run() must still know when the thread has come out of the guest.
            self._job = thread.submit(self.run_until_event)
            event = await asyncio.shield(self._job)
            if event in _ENDS:
                return Outcome(event, self.index, self._error)

    async def pause(self) -> None:
        """Bring the vCPU to a safe point: outside the guest, no exit half served. A parked one is there already."""
        self._resumed.clear()
        self.parking.request(PAUSE)
        self.parking.hold()
        await self._settle()

    def resume(self, late_ns: int = 0) -> None:
        """Go on after :meth:`pause`. The guest's time stood still for ``late_ns`` nanoseconds: so are its deadlines."""
        if self._due is not None:
            self._due += late_ns
        self.parking.withdraw(PAUSE)
        self.parking.unhold(late_ns)
        self._resumed.set()

    async def stop(self) -> None:
        """End :meth:`run` with STOP, whatever the vCPU is doing; returns once it is outside the guest."""
        self.parking.request(STOP)
        self._resumed.set()
        await self._settle()

    async def call(self, function: Callable[[Vcpu], T]) -> T:
        """``function(vcpu)`` on the vCPU's thread: before :meth:`run`, or while paused."""
        thread, vcpu = self._thread, self._vcpu
        if thread is None or vcpu is None:
            raise EngineError(f"vCPU {self.index} does not exist now: start it first")
        return await thread.submit(lambda: function(vcpu))

    async def save(self) -> VcpuState:
        """The vCPU's state; while paused, or before it runs."""
        return await self.call(self._save)

    async def restore(self, state: VcpuState) -> None:
        """Continue from ``state``: after :meth:`start` and after the interrupt controller's state, before :meth:`run`.

        Guest time goes on from where the VM's clock says. Raises ConfigError for a state we cannot read.
        """
        await self.call(lambda vcpu: self._restore(vcpu, state))

    async def _settle(self) -> None:
        """Wait until the thread is outside the guest."""
        if self._job is not None:
            await asyncio.wait((self._job,))

    async def close(self) -> None:
        """Destroy the vCPU and join its thread: what :meth:`run` does at its end."""
        await self.stop()
        self.parking.stopped()
        thread, self._thread = self._thread, None
        if thread is not None:
            try:
                await thread.submit(self._destroy)
            finally:
                thread.join()  # it is idle: this waits no longer than it takes to end

    # The vCPU's thread.

    def _create(self) -> None:
        self._vcpu = vcpu = self._hypervisor.create_vcpu()
        vcpu.set_sysreg(sysregs.MPIDR_EL1, self.mpidr)
        pfr0 = vcpu.get_sysreg(sysregs.ID_AA64PFR0_EL1)
        if not pfr0 >> 24 & 0xF:  # the GIC's system register interface: we provide it, the engine need not know
            vcpu.set_sysreg(sysregs.ID_AA64PFR0_EL1, pfr0 | 1 << 24)
        self._set_offset(vcpu)
        with contextlib.suppress(EngineError):  # not every engine tells; then it is the timebase's
            self._clock.set_counter_frequency(vcpu.get_sysreg(sysregs.CNTFRQ_EL0))
        self._sctlr_at_reset = vcpu.get_sysreg(sysregs.SCTLR_EL1)
        self.parking.vcpu = vcpu
        vcpu.set_poll(self._halt_poll)

    def _destroy(self) -> None:
        vcpu, self._vcpu = self._vcpu, None
        if vcpu is not None:
            vcpu.close()

    def _save(self, vcpu: Vcpu) -> VcpuState:
        while True:
            # Kicked, run() delivers what the last exit is owed and comes back before it enters the guest.
            vcpu.kick()
            kind = vcpu.run()
            if kind == _CANCELED:
                break
            if kind != ExitKind.VTIMER:
                raise EngineError(f"vCPU {self.index} ran on although it was kicked: its state cannot be saved")
            with self._lock:
                self._on_vtimer(vcpu)
        with self._lock:
            power, entry, context = self._psci.save(self.index)
        return capture(vcpu, power, entry, context)

    def _restore(self, vcpu: Vcpu, state: VcpuState) -> None:
        apply(vcpu, state, self._clock.offset)
        self._offset = self._clock.offset
        self._due = None
        with self._lock:
            # As the timer's output is now, which the snapshot's interrupt controller need not have known.
            self._vtimer_high = self._clock.deadline(state.cntv_ctl, state.cntv_cval) == EXPIRED
            self._vtimer_line.restore(self._vtimer_high)
            self._psci.restore(self.index, state.power, state.entry, state.context)

    def run_until_event(self) -> Event:
        """Run the guest and serve its exits until there is something to await or to report."""
        vcpu = self._vcpu
        assert vcpu is not None
        # This loop is every exit's price: locals, one lock round per exit, each field of the frame read once.
        run = vcpu.run if self.tracer is None else self.tracer.runner(vcpu)
        frame = vcpu.frame
        parking = self.parking
        lock = self._lock
        bus_read = self._bus.read
        bus_write = self._bus.write
        handlers = self._handlers
        settle = self._irqchip.settle
        exits_by_kind = self.counters.exits
        kind = _CANCELED  # nothing to serve yet
        slept = False
        try:
            if self._offset != self._clock.offset:
                self._set_offset(vcpu)
            with lock:
                self._begin(vcpu)
                self._slept(vcpu)
            while True:
                event: Event | None = None
                with lock:
                    if slept:
                        slept = False
                        if frame.entered:
                            parking.stats.entering(frame.entered)
                            self._due = None
                        else:
                            parking.give_up(bool(frame.expired and frame.sleep_exact))
                            if parking.mode is not _RUNNING:
                                return Event.PARK
                            self._slept(vcpu)
                    if frame.acknowledged:
                        frame.acknowledged = 0
                        settle(self.index)
                    if self._vtimer_masked:
                        self._sync_vtimer(vcpu)
                    if kind == _MMIO_WRITE:
                        try:
                            bus_write(frame.address, frame.size, frame.value)
                            frame.finish = _ADVANCE
                        except GuestFault:
                            self._abort(vcpu)
                    elif kind == _MMIO_READ:
                        try:
                            frame.result = bus_read(frame.address, frame.size)
                            frame.finish = _RESULT
                        except GuestFault:
                            self._abort(vcpu)
                    elif kind != _CANCELED:
                        event = handlers[kind](self, vcpu)
                    if event is None:
                        if parking.attention:
                            return Event.STOP if parking.attention & STOP else Event.PAUSE
                        frame.irq = parking.irq
                        parking.called = False
                        parking.entered = True
                if event is not None:
                    if event is not Event.PARK:
                        return event
                    slept = True
                    frame.irq = 0
                    parking.lie_down(frame)
                kind = run()
                parking.entered = False
                if not slept or frame.entered:
                    exits_by_kind[kind] += 1
        except AvmmError as error:
            self._error = error
            return Event.FAULT
        except Exception as error:  # a defect of ours that this guest found: it ends this VM, and no other
            doing = f"{ExitKind(kind).name} at pc {frame.pc:#x}"
            self._error = GuestError(f"vCPU {self.index}: cannot serve the guest's {doing}: {error!r}")
            self._error.__cause__ = error
            return Event.FAULT

    def _set_offset(self, vcpu: Vcpu) -> None:
        self._offset = self._clock.offset
        vcpu.set_vtimer_offset(self._offset)

    def _begin(self, vcpu: Vcpu) -> None:
        """After CPU_ON: the state a vCPU starts in (DEN 0022, 6.4.3)."""
        start = self._psci.starting(self.index)
        if start is None:
            return
        entry, context = start
        vcpu.frame.finish = _NONE
        vcpu.set_reg(Reg.PC, entry)
        vcpu.set_reg(0, context)
        vcpu.set_reg(Reg.CPSR, _PSTATE_AT_START)
        vcpu.set_sysreg(sysregs.SCTLR_EL1, self._sctlr_at_reset)
        vcpu.set_sysreg(sysregs.CNTV_CTL_EL0, 0)
        self._due = None
        if self._vtimer_masked:
            self._lower_vtimer(vcpu)
        self._irqchip.reset_cpu(self.index)

    def _sync_vtimer(self, vcpu: Vcpu) -> None:
        """While masked: PPI 27 follows the timer's output, and the mask goes when the output is low.

        Unmasking it while it is high would exit for ever; not unmasking it would lose the guest its tick.
        """
        if vcpu.frame.vtimer_ctl & 0b111 != _VTIMER_HIGH:
            self._lower_vtimer(vcpu)
        elif not self._vtimer_high:
            self._vtimer_high = True
            self._vtimer_line.set(True)

    def _raise_vtimer(self, vcpu: Vcpu) -> None:
        """What VTIMER_ACTIVATED would make us do, of a timer that is due, without entering the guest for it."""
        frame = vcpu.frame
        frame.mask_vtimer = frame.vtimer_masked = 1
        frame.vtimer_ctl = _VTIMER_HIGH
        self._on_vtimer(vcpu)

    def _slept(self, vcpu: Vcpu) -> None:
        """After a sleep: if it was the timer's, its interrupt goes in with the guest. The lock is held."""
        self.parking.stats.entering()
        due, self._due = self._due, None
        if due is not None and self._clock.now_ns() >= due and not self._vtimer_masked:
            self._raise_vtimer(vcpu)

    def _lower_vtimer(self, vcpu: Vcpu) -> None:
        self._vtimer_masked = False
        vcpu.frame.unmask_vtimer = 1
        if self._vtimer_high:
            self._vtimer_high = False
            self._vtimer_line.set(False)

    def _abort(self, vcpu: Vcpu) -> None:
        """Nothing answers at the address: an external abort, as on a real bus."""
        self.counters.aborts += 1
        exits.inject_external_abort(vcpu)

    def _undefined(self, vcpu: Vcpu) -> None:
        self.counters.undefined += 1
        exits.inject_undefined(vcpu)

    def _idle(self, vcpu: Vcpu, ctl: int, cval: int, until: int | None = None) -> Event | None:
        """WFI, its instruction stepped over already: PARK, or None to run on. ``until``: WFIT's own deadline.

        With the timer's mask ours, its output is high and PPI 27 with it: if that made no interrupt, the timer
        will not make one later either. A timer that is due the engine raises from inside run(); one that it has
        not raised by the guest's next WFI we raise, or the guest would go round until the engine does.
        """
        if self._irqchip.inside:  # nothing would wake us; a guest that asks by a call may go on at any time
            return None
        deadline = None if self._vtimer_masked else self._clock.deadline(ctl, cval)
        if deadline == EXPIRED:
            if cval == self._overdue:
                self._raise_vtimer(vcpu)
                deadline = None
            self._overdue = cval
        else:
            self._overdue = None
            self._due = deadline
        if until is not None:
            limit = self._clock.when(until)
            deadline = limit if deadline is None else min(deadline, limit)
        return self._park(deadline)

    def _park(self, deadline: int | None) -> Event | None:
        counters = self.counters
        if deadline is not None and (left := deadline - self._clock.now_ns()) < TRIP_NS:
            if left <= 0:
                counters.not_parked_expired += 1  # run on: the engine raises the timer from inside run()
            else:
                counters.not_parked_soon += 1
            return None
        if not self.parking.park(deadline):
            counters.not_parked_pending += 1
            return None
        counters.parks += 1
        return Event.PARK

    # What each kind of exit does: called under the lock, returns an Event to leave with.

    def _on_nothing(self, vcpu: Vcpu) -> Event | None:
        return None

    def _on_vtimer(self, vcpu: Vcpu) -> Event | None:
        self._vtimer_masked = True
        self._sync_vtimer(vcpu)
        return None

    def _on_sysreg_read(self, vcpu: Vcpu) -> Event | None:
        frame = vcpu.frame
        encoding = frame.address
        value = self._irqchip.read_sysreg(self.index, encoding)
        if value is None:
            value = sysregs.read(encoding, self._clock)
        if value is None:
            self._undefined(vcpu)
        else:
            frame.result = value
            frame.finish = _RESULT
        return None

    def _on_sysreg_write(self, vcpu: Vcpu) -> Event | None:
        frame = vcpu.frame
        encoding = frame.address
        if self._irqchip.write_sysreg(self.index, encoding, frame.value) or sysregs.write(encoding):
            frame.finish = _ADVANCE
        else:
            self._undefined(vcpu)
        return None

    def _on_hvc(self, vcpu: Vcpu) -> Event | None:
        return self._smccc(vcpu, _NONE)

    def _on_smc(self, vcpu: Vcpu) -> Event | None:
        return self._smccc(vcpu, _ADVANCE)

    def _smccc(self, vcpu: Vcpu, finish: int) -> Event | None:
        frame = vcpu.frame
        result = self._psci.call(self.index, frame.args)
        frame.finish = finish
        if result is Action.STANDBY:
            vcpu.set_reg(0, SUCCESS)
            return self._idle(vcpu, vcpu.get_sysreg(sysregs.CNTV_CTL_EL0), vcpu.get_sysreg(sysregs.CNTV_CVAL_EL0))
        if result is Action.OFF:
            self.parking.turn_off()
            return Event.OFF
        if result is Action.POWER_OFF:
            return Event.POWER_OFF
        if result is Action.RESET:
            return Event.RESET
        vcpu.set_reg(0, result & _U64)
        return None

    def _on_wfi(self, vcpu: Vcpu) -> Event | None:
        frame = vcpu.frame
        frame.finish = _ADVANCE
        timed = frame.syndrome & 0b11 == 0b10  # ISS.TI: WFIT
        return self._idle(vcpu, frame.vtimer_ctl, frame.vtimer_cval, frame.value if timed else None)

    def _on_wfe(self, vcpu: Vcpu) -> Event | None:
        vcpu.frame.finish = _ADVANCE
        by_kind = self.counters.exits
        others = sum(by_kind) - by_kind[_WFE]
        if others != self._wfe_others:
            self._wfe_others = others
            self._wfe_run = 0
        self._wfe_run += 1
        if self._wfe_run < _WFE_SPINS:
            return None
        may_park = self._wfe_run >= _WFE_DOZES and not self._irqchip.inside
        if may_park and self._park(self._clock.now_ns() + _WFE_NAP_NS):
            return Event.PARK
        self._lock.release()
        try:
            time.sleep(_WFE_DOZE)
        finally:
            self._lock.acquire()
        return None

    def _on_abort(self, vcpu: Vcpu) -> Event | None:
        self._abort(vcpu)
        return None

    def _on_other(self, vcpu: Vcpu) -> Event | None:
        frame = vcpu.frame
        if exits.exception_class(frame.syndrome) in exits.UNDEFINED_CLASSES:
            self._undefined(vcpu)
            return None
        self._error = GuestError(
            f"vCPU {self.index}: exception with syndrome {frame.syndrome:#x} at pc {frame.pc:#x} has no handler"
        )
        return Event.FAULT

    def _on_error(self, vcpu: Vcpu) -> Event | None:
        code = vcpu.frame.value & 0xFFFF_FFFF
        pc = vcpu.get_reg(Reg.PC)
        self._error = EngineError(f"vCPU {self.index}: the engine failed with {code:#x} at pc {pc:#x}", code)
        return Event.FAULT

    _handlers: Final = (  # by ExitKind
        _on_nothing,  # CANCELED
        _on_vtimer,
        _on_nothing,  # UNKNOWN
        _on_nothing,  # MMIO_READ and MMIO_WRITE are served in line
        _on_nothing,
        _on_sysreg_read,
        _on_sysreg_write,
        _on_hvc,
        _on_smc,
        _on_wfi,
        _on_wfe,
        _on_abort,
        _on_other,
        _on_error,
    )

    def snapshot_counters(self) -> dict[str, int]:
        """Counters by name: exits by kind, parks, why not parked, wakes by cause, injected exceptions."""
        counters = self.counters
        wakes = self.parking.wakes
        return {
            **{f"exit_{kind.name.lower()}": counters.exits[kind] for kind in ExitKind},
            **{f"wake_{cause.name.lower()}": wakes[cause] for cause in Cause},
            "parks": counters.parks,
            "not_parked_expired": counters.not_parked_expired,
            "not_parked_soon": counters.not_parked_soon,
            "not_parked_pending": counters.not_parked_pending,
            "aborts": counters.aborts,
            "undefined": counters.undefined,
        }

    @property
    def exists(self) -> bool:
        """Whether there is a vCPU behind it now, whose state could be saved."""
        return self._vcpu is not None

    @property
    def mode(self) -> Mode:
        """What the vCPU is doing now."""
        return self.parking.mode

    @property
    def cpu_ns(self) -> int | None:
        """CPU time of the vCPU's thread, in nanoseconds; None while it has none."""
        return None if self._thread is None else self._thread.cpu_ns


async def create_all(vcpus: Sequence[VcpuLoop]) -> None:
    """Start every vCPU, one after another, before any runs: an interrupt controller inside the hypervisor wants it so.

    Raises EngineError, and leaves none then.
    """
    try:
        for vcpu in vcpus:
            await vcpu.start()
    except BaseException:
        for vcpu in vcpus:
            await vcpu.close()
        raise
