"""Exceptions that we make a guest take: what a real machine would do where the engine left it to us.

Each function redirects the vCPU to its EL1 vector. Only on the vCPU's thread.
"""

from __future__ import annotations

from typing import Final

from avmm.hypervisor.base import Finish, Frame, Reg, Vcpu
from avmm.vcpu import sysregs

#: Exception classes of a syndrome (Arm ARM D19.2.40, ESR_EL2.EC).
EC_UNKNOWN: Final = 0x00
EC_INSTRUCTION_ABORT: Final = 0x20
EC_DATA_ABORT: Final = 0x24

#: Accesses to extensions we do not offer: FP/SVE, pointer authentication, SVE, SME, and what has no class of its own.
UNDEFINED_CLASSES: Final = frozenset({EC_UNKNOWN, 0x07, 0x09, 0x19, 0x1D})

_IL = 1 << 25
_ISS_WNR = 1 << 6  # of a data abort
_EXTERNAL_ABORT = 0x10  # DFSC/IFSC: synchronous external abort, not on a table walk

_PSTATE_EL1H_MASKED = 0x3C5
_PSTATE_PAN = 1 << 22
_PSTATE_KEPT = 0xF << 28 | 1 << 24 | _PSTATE_PAN  # NZCV, DIT, PAN (Arm ARM D1.3.1)
_SCTLR_SPAN = 1 << 23


def exception_class(syndrome: int) -> int:
    """The EC field of an ESR_ELx value."""
    return syndrome >> 26 & 0x3F


def inject_external_abort(vcpu: Vcpu) -> None:
    """Answer the abort in the vCPU's frame as a bus does where nothing responds: synchronously."""
    frame = vcpu.frame
    syndrome = frame.syndrome
    kind = EC_INSTRUCTION_ABORT if exception_class(syndrome) == EC_INSTRUCTION_ABORT else EC_DATA_ABORT
    iss = _EXTERNAL_ABORT | (syndrome & _ISS_WNR if kind == EC_DATA_ABORT else 0)
    pstate = vcpu.get_reg(Reg.CPSR)
    if pstate >> 2 & 3:
        kind += 1  # "taken without a change in Exception level"
    vcpu.set_sysreg(sysregs.FAR_EL1, frame.virtual_address)
    _take(vcpu, frame, pstate, kind << 26 | syndrome & _IL | iss)


def inject_undefined(vcpu: Vcpu) -> None:
    """The instruction that exited is UNDEFINED."""
    _take(vcpu, vcpu.frame, vcpu.get_reg(Reg.CPSR), EC_UNKNOWN << 26 | _IL)


def _take(vcpu: Vcpu, frame: Frame, pstate: int, esr: int) -> None:
    """Take a synchronous exception to EL1 (Arm ARM D1.3.1, D1.3.2); frame.pc is the preferred return address."""
    if pstate >> 2 & 3 == 0:
        vector = 0x600 if pstate & 0x10 else 0x400  # from EL0, AArch32 or AArch64
    else:
        vector = 0x200 if pstate & 1 else 0x000  # on SP_EL1 or SP_EL0
    entered = pstate & _PSTATE_KEPT | _PSTATE_EL1H_MASKED
    if not vcpu.get_sysreg(sysregs.SCTLR_EL1) & _SCTLR_SPAN:
        entered |= _PSTATE_PAN
    vcpu.set_sysreg(sysregs.ESR_EL1, esr)
    vcpu.set_sysreg(sysregs.ELR_EL1, frame.pc)
    vcpu.set_sysreg(sysregs.SPSR_EL1, pstate)
    vcpu.set_reg(Reg.CPSR, entered)
    vcpu.set_reg(Reg.PC, vcpu.get_sysreg(sysregs.VBAR_EL1) + vector & (1 << 64) - 1)
    frame.finish = Finish.NONE
