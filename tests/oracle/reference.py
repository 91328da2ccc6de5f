"""The reference: Unicorn 2.1.4, driven through its C interface (its Python one costs more than the emulation)."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import unicorn
from cffi import FFI
from unicorn import arm64_const, unicorn_const

from tests.oracle.machine import BASE, CODE, CODE_SIZE, SIZE, Outcome, Registers, Result, new_ram

ffi = FFI()
ffi.cdef("""
    int uc_emu_start(void *uc, uint64_t begin, uint64_t until, uint64_t timeout, size_t count);
    int uc_reg_write_batch(void *uc, int *regs, void *const *vals, int count);
    int uc_reg_read_batch(void *uc, int *regs, void **vals, int count);
""")

X = [*range(arm64_const.UC_ARM64_REG_X0, arm64_const.UC_ARM64_REG_X0 + 29), arm64_const.UC_ARM64_REG_X29,
     arm64_const.UC_ARM64_REG_X30]  # fmt: skip
CORE = [*X, arm64_const.UC_ARM64_REG_SP, arm64_const.UC_ARM64_REG_NZCV, arm64_const.UC_ARM64_REG_FPCR,
        arm64_const.UC_ARM64_REG_FPSR]  # fmt: skip
SP, NZCV, FPCR, FPSR, PC = 31, 32, 33, 34, 35

#: QEMU's exception numbers (target/arm/cpu.h, EXCP_*), as Unicorn's interrupt hook gets them.
INTERRUPTS = {
    1: Outcome.UNDEFINED, 2: Outcome.SVC, 3: Outcome.TRAP, 4: Outcome.FAULT, 7: Outcome.BRK,
    11: Outcome.HVC, 13: Outcome.SMC,
}  # fmt: skip
YIELDING = {0x10001: Outcome.WAIT, 0x10004: Outcome.WAIT}

UNMAPPED = {
    unicorn_const.UC_ERR_READ_UNMAPPED, unicorn_const.UC_ERR_WRITE_UNMAPPED, unicorn_const.UC_ERR_READ_PROT,
    unicorn_const.UC_ERR_WRITE_PROT, unicorn_const.UC_ERR_READ_UNALIGNED, unicorn_const.UC_ERR_WRITE_UNALIGNED,
}  # fmt: skip
FETCH = {unicorn_const.UC_ERR_FETCH_UNMAPPED, unicorn_const.UC_ERR_FETCH_PROT, unicorn_const.UC_ERR_FETCH_UNALIGNED}


class Reference:
    """One Unicorn instance. Its memory is ``ram``; call :meth:`loaded` after writing programs into it."""

    def __init__(self) -> None:
        self._lib: Any = ffi.dlopen(str(Path(unicorn.__file__).parent / "lib" / "libunicorn.so.2"))
        self.ram = new_ram()
        self._uc = unicorn.Uc(unicorn_const.UC_ARCH_ARM64, unicorn_const.UC_MODE_ARM, arm64_const.UC_CPU_ARM64_MAX)
        self._uc.mem_map_ptr(
            BASE, SIZE, unicorn_const.UC_PROT_ALL, ctypes.addressof(ctypes.c_char.from_buffer(self.ram))
        )
        self._uc.reg_write(arm64_const.UC_ARM64_REG_CPACR_EL1, 3 << 20)
        self._uc.hook_add(unicorn_const.UC_HOOK_INTR, self._interrupt)
        self._handle = ffi.cast("void *", self._uc._uch.value)
        self._interrupted: int | None = None
        count = len(CORE) + 1
        self._core = ffi.new("uint64_t[]", count)
        self._core_ids = ffi.new("int[]", [*CORE, arm64_const.UC_ARM64_REG_PC])
        self._core_at = ffi.new("void *[]", [self._core + index for index in range(count)])
        self._vector = ffi.new("uint8_t[512]")
        self._vector_ids = ffi.new("int[]", [arm64_const.UC_ARM64_REG_V0 + index for index in range(32)])
        self._vector_at = ffi.new("void *[]", [self._vector + 16 * index for index in range(32)])

    def _interrupt(self, uc: Any, number: int, data: Any) -> None:
        self._interrupted = number
        uc.emu_stop()  # from inside the hook: synchronous, hence safe

    def loaded(self) -> None:
        """Programs were written: forget translations of what was there."""
        self._uc.ctl_remove_cache(CODE, CODE + CODE_SIZE)

    def run(self, start: int, before: Registers, vectors: bool, *, count: int = 0, until: int = 0) -> Result:
        """Run ``count`` instructions from ``start``, or up to ``until``. V0..V31 are left alone without ``vectors``."""
        core, lib, handle = self._core, self._lib, self._handle
        core[0:31] = before.x
        core[SP], core[NZCV], core[FPCR], core[FPSR] = before.sp, before.nzcv, before.fpcr, before.fpsr
        lib.uc_reg_write_batch(handle, self._core_ids, self._core_at, PC)
        if vectors:
            ffi.buffer(self._vector)[:] = before.v
            lib.uc_reg_write_batch(handle, self._vector_ids, self._vector_at, 32)
        self._interrupted = None
        error = lib.uc_emu_start(handle, start, until, 0, count)
        lib.uc_reg_read_batch(handle, self._core_ids, self._core_at, PC + 1)
        if vectors:
            lib.uc_reg_read_batch(handle, self._vector_ids, self._vector_at, 32)
        values = list(core)
        return Result(
            self._outcome(error),
            values[PC],
            values[0:31],
            values[SP],
            values[NZCV] & 0xF000_0000,
            values[FPCR] & 0xFFFF_FFFF,
            values[FPSR] & 0xFFFF_FFFF,
            bytes(ffi.buffer(self._vector)) if vectors else b"",
            detail=f"error {error} interrupt {self._interrupted}",
        )

    def _outcome(self, error: int) -> Outcome:
        if self._interrupted is not None:
            return INTERRUPTS.get(self._interrupted) or YIELDING.get(self._interrupted, Outcome.TRAP)
        if error == unicorn_const.UC_ERR_OK or error in FETCH:
            return Outcome.DONE
        if error == unicorn_const.UC_ERR_INSN_INVALID:
            return Outcome.UNDEFINED
        return Outcome.FAULT if error in UNMAPPED else Outcome.TRAP
