"""A vCPU's registers as plain data, for snapshots. Only on the vCPU's thread, and with no exit half served."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from avmm.clock import TIMER_ISTATUS
from avmm.errors import ConfigError
from avmm.hypervisor.base import Reg, Vcpu
from avmm.vcpu import sysregs
from avmm.vcpu.psci import Power

VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class VcpuState:
    """Everything of a vCPU but its clock, which is the VM's. ``sysregs`` by name, ``q`` 16 bytes each.

    ``entry`` and ``context`` matter to a vCPU that CPU_ON has turned on and that has not run yet.
    """

    power: Power
    entry: int
    context: int
    x: tuple[int, ...]
    pc: int
    pstate: int
    fpcr: int
    fpsr: int
    q: tuple[bytes, ...]
    sysregs: dict[str, int]
    cntv_cval: int
    cntv_ctl: int
    version: int = VERSION


def capture(vcpu: Vcpu, power: Power, entry: int, context: int) -> VcpuState:
    """The vCPU's state now."""
    return VcpuState(
        power=power,
        entry=entry,
        context=context,
        x=tuple(vcpu.get_reg(number) for number in range(31)),
        pc=vcpu.get_reg(Reg.PC),
        pstate=vcpu.get_reg(Reg.CPSR),
        fpcr=vcpu.get_reg(Reg.FPCR),
        fpsr=vcpu.get_reg(Reg.FPSR),
        q=tuple(vcpu.get_simd(number) for number in range(32)),
        sysregs={name: vcpu.get_sysreg(encoding) for name, encoding in sysregs.SAVED.items()},
        cntv_cval=vcpu.get_sysreg(sysregs.CNTV_CVAL_EL0),
        cntv_ctl=vcpu.get_sysreg(sysregs.CNTV_CTL_EL0) & ~TIMER_ISTATUS,  # which time decides
    )


def apply(vcpu: Vcpu, state: VcpuState, offset: int) -> None:
    """Put ``state`` into a vCPU whose counter offset is to be ``offset``. Raises ConfigError for another version."""
    if state.version != VERSION:
        raise ConfigError(f"vCPU state has version {state.version}; this avmm reads version {VERSION}")
    # CPSR first: SP_EL0 and SP_EL1 are what they are whatever SPSel says, but an engine may keep one as "the" SP.
    vcpu.set_reg(Reg.CPSR, state.pstate)
    for name, value in state.sysregs.items():
        vcpu.set_sysreg(sysregs.SAVED[name], value)
    for number, value in enumerate(state.x):
        vcpu.set_reg(number, value)
    vcpu.set_reg(Reg.PC, state.pc)
    vcpu.set_reg(Reg.FPCR, state.fpcr)
    vcpu.set_reg(Reg.FPSR, state.fpsr)
    for number, vector in enumerate(state.q):
        vcpu.set_simd(number, vector)
    # The order counts: a deadline against the wrong offset, or a timer enabled against a stale deadline, fires.
    vcpu.set_vtimer_offset(offset)
    vcpu.set_sysreg(sysregs.CNTV_CVAL_EL0, state.cntv_cval)
    vcpu.set_sysreg(sysregs.CNTV_CTL_EL0, state.cntv_ctl)
