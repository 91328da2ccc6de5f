"""The subject: softhv at EL1 with its MMU on, behind much the same interface as the reference."""

from __future__ import annotations

import mmap
import threading
from tempfile import TemporaryFile

from avmm.hypervisor import sysreg
from avmm.hypervisor._softhv import ffi, lib
from avmm.hypervisor.base import Reg
from avmm.hypervisor.softhv import Softhv
from avmm.memory import GRANULE, Region
from tests.oracle.machine import (
    BASE,
    CODE,
    CODE_SIZE,
    END,
    MAIR_VALUE,
    SCRATCH,
    SCTLR_VALUE,
    SIZE,
    TABLES,
    TCR_VALUE,
    VECTORS,
    VECTORS_SIZE,
    Outcome,
    Registers,
    Result,
    new_ram,
)

SCTLR, CPACR, TTBR0, TCR = (sysreg(3, 0, 1, 0, 0), sysreg(3, 0, 1, 0, 2), sysreg(3, 0, 2, 0, 0), sysreg(3, 0, 2, 0, 2))
SPSR, ELR, ESR, FAR = (sysreg(3, 0, 4, 0, 0), sysreg(3, 0, 4, 0, 1), sysreg(3, 0, 5, 2, 0), sysreg(3, 0, 6, 0, 0))
MAIR, VBAR, SP_EL1 = sysreg(3, 0, 10, 2, 0), sysreg(3, 0, 12, 0, 0), sysreg(3, 4, 4, 1, 0)

EXCEPTION = 1  # hv_exit_reason_t
EL1H_MASKED = 0x3C5
#: ESR_EL1.EC of what a program may raise (Arm ARM D17.2.37).
TO_EL1 = {
    0x00: Outcome.UNDEFINED, 0x0E: Outcome.UNDEFINED, 0x15: Outcome.SVC, 0x25: Outcome.FAULT, 0x3C: Outcome.BRK,
}  # fmt: skip
FETCH = {0x21, 0x22}  # instruction abort, PC alignment: a branch went there
#: ESR_EL2.EC of what leaves the guest.
TO_EL2 = {0x01: Outcome.WAIT, 0x17: Outcome.SMC, 0x24: Outcome.FAULT}


class Eager(Softhv):
    """No block is interpreted first."""

    COMPILE_AFTER = 0


class Subject:
    """One vCPU of softhv. Its memory is ``ram``; call :meth:`loaded` after writing programs into it.

    Either everything is compiled for the host before it runs, or nothing is.
    """

    def __init__(self, compiled: bool) -> None:
        self._vm = Eager(compiled=compiled)
        with TemporaryFile() as file:
            file.truncate(SIZE)
            self.ram = new_ram(file.fileno())
            self._vm.map(Region(BASE, mmap.mmap(file.fileno(), SCRATCH - BASE)))
            for at in range(SCRATCH, END, GRANULE):  # from the top down, as hosts place them
                self._vm.map(Region(at, mmap.mmap(file.fileno(), GRANULE, offset=at - BASE)))
        self.vcpu = self._vm.create_vcpu()
        self.vcpu.set_sysreg(VBAR, VECTORS)
        self.vcpu.set_sysreg(CPACR, 3 << 20)
        self.translate()
        self._handle = self.vcpu._handle  # the C interface: twice as fast as the methods
        self._exit = self.vcpu._exit
        self._x = ffi.new("uint64_t[31]")
        self._x_at = [(index, self._x + index) for index in range(31)]
        self._vector = ffi.new("uint8_t[512]")
        self._vector_at = [(index, self._vector + 16 * index) for index in range(32)]
        self._cell = ffi.new("uint64_t *")
        self._started = 0
        self._ended = 0
        self._closing = threading.Event()
        self._watchdog = threading.Thread(target=self._watch, daemon=True)
        self._watchdog.start()

    def _watch(self) -> None:
        """End a program that runs for seconds: it does not end by itself."""
        seen = 0
        while not self._closing.wait(3):
            if seen == self._started != self._ended:
                self.vcpu.kick()
            seen = self._started

    def translate(self) -> None:
        """The MMU as programs find it."""
        for encoding, value in ((MAIR, MAIR_VALUE), (TCR, TCR_VALUE), (TTBR0, TABLES), (SCTLR, SCTLR_VALUE)):
            self.vcpu.set_sysreg(encoding, value)

    def loaded(self) -> None:
        """Programs were written: forget translations of what was there."""
        self._vm.host_wrote(CODE, CODE_SIZE)

    def id_register(self, encoding: int) -> int:
        """An ID register, or any other."""
        return self._sysreg(encoding)

    def _reg(self, reg: int) -> int:
        lib.hv_vcpu_get_reg(self._handle, reg, self._cell)
        value: int = self._cell[0]
        return value

    def _sysreg(self, encoding: int) -> int:
        lib.hv_vcpu_get_sys_reg(self._handle, encoding, self._cell)
        value: int = self._cell[0]
        return value

    def run(self, start: int, before: Registers, vectors: bool) -> Result:
        """Run from ``start`` to the first HVC or exception. Without ``vectors``, V0..V31 stay as they were."""
        handle, set_reg, get_reg = self._handle, lib.hv_vcpu_set_reg, lib.hv_vcpu_get_reg
        for index, value in enumerate(before.x):
            set_reg(handle, index, value)
        set_reg(handle, Reg.PC, start)
        set_reg(handle, Reg.FPCR, before.fpcr)
        set_reg(handle, Reg.FPSR, before.fpsr)
        set_reg(handle, Reg.CPSR, EL1H_MASKED | before.nzcv)
        lib.hv_vcpu_set_sys_reg(handle, SP_EL1, before.sp)
        if vectors:
            ffi.buffer(self._vector)[:] = before.v
            for index, at in self._vector_at:
                lib.avmm_set_simd_fp_reg(handle, index, at)
        self._started += 1
        code = lib.hv_vcpu_run(handle)
        self._ended = self._started
        for index, at in self._x_at:
            get_reg(handle, index, at)
        if vectors:
            for index, at in self._vector_at:
                lib.avmm_get_simd_fp_reg(handle, index, at)
        outcome, pc, pstate, esr, far = self._outcome(code)
        return Result(
            outcome,
            pc,
            list(self._x),
            self._sysreg(SP_EL1),
            pstate & 0xF000_0000,
            self._reg(Reg.FPCR),
            self._reg(Reg.FPSR),
            bytes(ffi.buffer(self._vector)) if vectors else b"",
            esr,
            far,
            f"syndrome {esr:#x} address {far:#x}" if esr else "",
        )

    def _outcome(self, code: int) -> tuple[Outcome, int, int, int, int]:
        """How it ended; PC, PSTATE, syndrome and fault address then."""
        pc, pstate = self._reg(Reg.PC), self._reg(Reg.CPSR)
        if code or self._exit.reason != EXCEPTION:
            return Outcome.FAILED, pc, pstate, code & 0xFFFF_FFFF, self._exit.reason
        exit = self._exit.exception
        kind = exit.syndrome >> 26
        if kind != 0x16:
            return TO_EL2.get(kind, Outcome.TRAP), pc, pstate, exit.syndrome, exit.virtual_address
        pc -= 4
        if not VECTORS <= pc < VECTORS + VECTORS_SIZE:
            return Outcome.DONE, pc, pstate, 0, 0
        esr, elr, spsr, far = (self._sysreg(register) for register in (ESR, ELR, SPSR, FAR))
        kind = esr >> 26 & 0x3F
        outcome = Outcome.DONE if kind in FETCH else TO_EL1.get(kind, Outcome.TRAP)
        return outcome, elr, spsr, esr, far

    def close(self) -> None:
        """Destroy the vCPU and the VM."""
        self._closing.set()
        self._watchdog.join()
        self.vcpu.close()
        self._vm.close()
