"""A scripted vCPU: the engine's manners (sticky kicks, the vtimer's mask) around a guest that is a Python generator.

The guest yields :class:`Exit` values, or RUN_ON to compute until a kick brings it out. ``vcpu.frame`` holds what the
VMM delivered when the generator is resumed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from avmm.clock import Clock
from avmm.hypervisor._softhv import ffi, lib
from avmm.hypervisor.base import ENTER, Capabilities, ExitKind, Finish, Frame, Reg, UartBatch, Vcpu
from avmm.irq import IrqChip, IrqLine, IrqSink
from avmm.memory import Region
from avmm.vcpu import sysregs

#: How long a test may hang before it is declared lost; far beyond anything that works.
LOST: Final = 20.0


@dataclass
class FakeFrame:
    irq: int = 0
    finish: int = 0
    unmask_vtimer: int = 0
    mask_vtimer: int = 0
    result: int = 0
    vtimer_masked: int = 0
    kind: int = 0
    size: int = 0
    sign_extend: int = 0
    wide: int = 0
    reg: int = 0
    address: int = 0
    value: int = 0
    pc: int = 0
    syndrome: int = 0
    virtual_address: int = 0
    vtimer_ctl: int = 0
    vtimer_cval: int = 0
    sleep: int = 0
    sleep_exact: int = 0
    sleep_until: int = 0
    expired: int = 0
    entered: int = 0
    offer: int = 0
    acknowledged: int = 0
    args: list[int] = field(default_factory=lambda: [0] * 8)


@dataclass
class Exit:
    """One exit and the frame's fields that come with it."""

    kind: ExitKind
    address: int = 0
    size: int = 4
    value: int = 0
    syndrome: int = 0
    virtual_address: int = 0
    reg: int = 0
    args: tuple[int, ...] = ()


#: The guest computes; only a kick ends it.
RUN_ON: Final = None

Guest = Callable[["FakeVcpu"], Iterator[Exit | None]]


class FakeVcpu:
    """Satisfies :class:`avmm.hypervisor.base.Vcpu`."""

    def __init__(self, guest: Guest, clock: Clock, *, lose_kicks: int = 0) -> None:
        self._frame = FakeFrame()
        self.frame: Frame = self._frame
        self.regs: dict[int, int] = {Reg.CPSR: 0, Reg.PC: 0}
        self.sysregs: dict[int, int] = {sysregs.SCTLR_EL1: 0x30C5_0830, sysregs.ID_AA64PFR0_EL1: 0x22}
        self.simd: dict[int, bytes] = {}
        self.offset = 0
        self.entries = 0  # calls of run()
        self.finished: list[int] = []  # each finish delivered, in order
        self.closed = False
        self.thread = threading.get_ident()
        self.lose_kicks = lose_kicks
        self.in_guest = threading.Event()  # set while it computes
        self._clock = clock
        self._kicked = threading.Event()
        self._gate = ffi.gc(lib.avmm_gate_new(), lib.avmm_gate_free)  # the real one
        self._guest = guest(self)

    def _check_thread(self) -> None:
        assert threading.get_ident() == self.thread, "touched on a thread that does not own it"
        assert not self.closed

    def timer_due(self) -> bool:
        ctl = self.sysregs.get(sysregs.CNTV_CTL_EL0, 0)
        cval = self.sysregs.get(sysregs.CNTV_CVAL_EL0, 0)
        return ctl & 3 == 1 and self._clock.guest_now() >= cval

    def open_gate(self, how: int) -> None:
        lib.avmm_gate_open(self._gate, how)

    def set_poll(self, most_ns: int) -> None:
        lib.avmm_gate_set_poll(self._gate, most_ns)

    def stir(self) -> None:
        lib.avmm_gate_stir(self._gate)

    def shut_gate(self) -> None:
        lib.avmm_gate_shut(self._gate)

    def withdraw(self) -> int:
        raise NotImplementedError

    def _sleep(self) -> bool:
        frame = self._frame
        frame.sleep = 0
        how = lib.avmm_gate_sleep(self._gate, frame.sleep_until, frame.sleep_exact)
        frame.expired = how == 0
        frame.entered = time.monotonic_ns() if how == ENTER else 0
        frame.irq |= how == ENTER
        return bool(how == ENTER)

    def run(self) -> int:
        self._check_thread()
        frame = self._frame
        if frame.sleep and not self._sleep():
            return ExitKind.CANCELED
        self.entries += 1
        self.finished.append(frame.finish)
        frame.finish = Finish.NONE
        if frame.mask_vtimer:
            frame.mask_vtimer = 0
            frame.vtimer_masked = 1
        if frame.unmask_vtimer:
            frame.unmask_vtimer = 0
            frame.vtimer_masked = 0
        kind = self._enter()
        due = self.timer_due()
        ctl = self.sysregs.get(sysregs.CNTV_CTL_EL0, 0)
        frame.vtimer_ctl = ctl & 3 | (4 if due else 0)
        frame.vtimer_cval = self.sysregs.get(sysregs.CNTV_CVAL_EL0, 0)
        frame.kind = kind
        return int(kind)

    def _enter(self) -> ExitKind:
        frame = self._frame
        if self._kicked.is_set():
            self._kicked.clear()
            return ExitKind.CANCELED
        if not frame.vtimer_masked and self.timer_due():
            frame.vtimer_masked = 1
            return ExitKind.VTIMER
        wanted = next(self._guest)
        if wanted is RUN_ON:
            self.in_guest.set()
            assert self._kicked.wait(LOST), "nobody called the guest out"
            self._kicked.clear()
            self.in_guest.clear()
            return ExitKind.CANCELED
        for name in ("address", "size", "value", "syndrome", "virtual_address", "reg"):
            setattr(frame, name, getattr(wanted, name))
        frame.args = [*wanted.args, *[0] * (8 - len(wanted.args))]
        frame.pc = self.regs[Reg.PC]
        return wanted.kind

    def kick(self) -> None:
        if self.lose_kicks:
            self.lose_kicks -= 1
        else:
            self._kicked.set()

    def get_reg(self, reg: int) -> int:
        self._check_thread()
        return self.regs.get(reg, 0)

    def set_reg(self, reg: int, value: int) -> None:
        self._check_thread()
        assert 0 <= value < 1 << 64
        self.regs[reg] = value

    def get_sysreg(self, encoding: int) -> int:
        self._check_thread()
        return self.sysregs.get(encoding, 0)

    def set_sysreg(self, encoding: int, value: int) -> None:
        self._check_thread()
        assert 0 <= value < 1 << 64
        self.sysregs[encoding] = value

    def get_simd(self, index: int) -> bytes:
        self._check_thread()
        return self.simd.get(index, bytes(16))

    def set_simd(self, index: int, value: bytes) -> None:
        self._check_thread()
        self.simd[index] = value

    def get_vtimer_offset(self) -> int:
        return self.offset

    def set_vtimer_offset(self, offset: int) -> None:
        self.offset = offset

    def counters(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        self._check_thread()
        self.closed = True


class FakeHypervisor:
    """Gives each vCPU's thread, by its name, a :class:`FakeVcpu` that runs the guest of its index."""

    def __init__(self, clock: Clock, guests: list[Guest], *, lose_kicks: int = 0) -> None:
        self.capabilities = Capabilities("fake", 40, 8, True)
        self.vcpus: dict[int, FakeVcpu] = {}
        self._clock = clock
        self._guests = guests
        self._lose_kicks = lose_kicks

    def map(self, region: Region, *, read_only: bool = False) -> None: ...

    def unmap(self, region: Region) -> None: ...

    def host_wrote(self, gpa: int, length: int) -> None: ...

    def fault_counts(self) -> dict[str, int]:
        return {}

    def batch_uart(self, base: int) -> UartBatch:
        raise NotImplementedError

    def gic(self, distributor: int, redistributors: int) -> IrqChip:
        raise NotImplementedError  # these vCPUs have a chip of avmm's own

    def create_vcpu(self) -> Vcpu:
        index = int(threading.current_thread().name.removeprefix("avmm-vcpu"))
        self.vcpus[index] = FakeVcpu(self._guests[index], self._clock, lose_kicks=self._lose_kicks)
        return self.vcpus[index]

    def close(self) -> None: ...


class _Line:
    def __init__(self, chip: FakeChip, index: int, intid: int) -> None:
        self._chip, self._index, self._intid = chip, index, intid
        self.edges: list[bool] = []

    def set(self, level: bool) -> None:
        self.edges.append(level)
        self._chip.drive(self._index, self._intid, level)

    def pulse(self) -> None:
        raise NotImplementedError

    def restore(self, level: bool) -> None:
        raise NotImplementedError


class FakeChip:
    """An interrupt controller of level lines: a vCPU's IRQ is up while any of its enabled lines is.

    Reading system register ACK gives the lowest line that is up, 1023 when none is.
    """

    ACK: Final = 0xC660

    inside: Final = False

    def __init__(self, lock: threading.RLock) -> None:
        self._lock = lock
        self._sinks: dict[int, IrqSink] = {}
        self._up: dict[int, set[int]] = {}
        self.lines: dict[tuple[int, int], _Line] = {}
        self.disabled: set[int] = set()
        self.written: list[tuple[int, int, int]] = []
        self.resets: list[int] = []

    def connect(self, index: int, mpidr: int, sink: IrqSink) -> None:
        self._sinks[index] = sink
        self._up[index] = set()

    def spi(self, number: int) -> IrqLine:
        return self._line(0, number + 32)

    def ppi(self, index: int, intid: int) -> IrqLine:
        return self._line(index, intid)

    def _line(self, index: int, intid: int) -> IrqLine:
        return self.lines.setdefault((index, intid), _Line(self, index, intid))

    def drive(self, index: int, intid: int, level: bool) -> None:
        with self._lock:
            up = self._up[index]
            before = bool(up - self.disabled)
            (up.add if level else up.discard)(intid)
            after = bool(up - self.disabled)
            if before != after:
                self._sinks[index].irq_changed(after)

    def read_sysreg(self, index: int, encoding: int) -> int | None:
        return min(self._up[index], default=1023) if encoding == self.ACK else None

    def reset_cpu(self, index: int) -> None:
        self.resets.append(index)

    def settle(self, index: int) -> None:
        raise NotImplementedError

    def write_sysreg(self, index: int, encoding: int, value: int) -> bool:
        self.written.append((index, encoding, value))
        return encoding == self.ACK
