"""System registers by name, and the few that we answer ourselves when an access traps.

Encodings are op0<<14 | op1<<11 | CRn<<7 | CRm<<3 | op2, as everywhere in the ABI.
"""

from __future__ import annotations

from typing import Final

from avmm.clock import Clock
from avmm.hypervisor.base import sysreg

MPIDR_EL1: Final = sysreg(3, 0, 0, 0, 5)
ID_AA64PFR0_EL1: Final = sysreg(3, 0, 0, 4, 0)
SCTLR_EL1: Final = sysreg(3, 0, 1, 0, 0)
ACTLR_EL1: Final = sysreg(3, 0, 1, 0, 1)
CPACR_EL1: Final = sysreg(3, 0, 1, 0, 2)
SPSR_EL1: Final = sysreg(3, 0, 4, 0, 0)
ELR_EL1: Final = sysreg(3, 0, 4, 0, 1)
ESR_EL1: Final = sysreg(3, 0, 5, 2, 0)
FAR_EL1: Final = sysreg(3, 0, 6, 0, 0)
VBAR_EL1: Final = sysreg(3, 0, 12, 0, 0)
CNTFRQ_EL0: Final = sysreg(3, 3, 14, 0, 0)
CNTV_CTL_EL0: Final = sysreg(3, 3, 14, 3, 1)
CNTV_CVAL_EL0: Final = sysreg(3, 3, 14, 3, 2)

_OSLAR_EL1: Final = sysreg(2, 0, 1, 0, 4)
_OSLSR_EL1: Final = sysreg(2, 0, 1, 1, 4)
_OSDLR_EL1: Final = sysreg(2, 0, 1, 3, 4)
_PMCR_EL0: Final = sysreg(3, 3, 9, 12, 0)
_PMUSERENR_EL0: Final = sysreg(3, 3, 9, 14, 0)
_CNTPCT_EL0: Final = sysreg(3, 3, 14, 0, 1)
_CNTVCT_EL0: Final = sysreg(3, 3, 14, 0, 2)

#: Registers a guest pokes while it boots and that have no effect here: read as this, writes ignored. OSLSR_EL1
#: says that the OS lock exists and is open (Arm ARM D19.3.19).
_CONSTANT: Final = {
    _OSLAR_EL1: 0,
    _OSLSR_EL1: 0b1000,
    _OSDLR_EL1: 0,
    _PMCR_EL0: 0,
    _PMUSERENR_EL0: 0,
    ACTLR_EL1: 0,
}

#: What makes a vCPU's state, for snapshots, by name. The timer is apart: its offset, CVAL, CTL go in that order.
SAVED: Final = {
    "SCTLR_EL1": SCTLR_EL1,
    "CPACR_EL1": CPACR_EL1,
    "TTBR0_EL1": sysreg(3, 0, 2, 0, 0),
    "TTBR1_EL1": sysreg(3, 0, 2, 0, 1),
    "TCR_EL1": sysreg(3, 0, 2, 0, 2),
    "SPSR_EL1": SPSR_EL1,
    "ELR_EL1": ELR_EL1,
    "SP_EL0": sysreg(3, 0, 4, 1, 0),
    "SP_EL1": sysreg(3, 4, 4, 1, 0),
    "AFSR0_EL1": sysreg(3, 0, 5, 1, 0),
    "AFSR1_EL1": sysreg(3, 0, 5, 1, 1),
    "ESR_EL1": ESR_EL1,
    "FAR_EL1": FAR_EL1,
    "PAR_EL1": sysreg(3, 0, 7, 4, 0),
    "MAIR_EL1": sysreg(3, 0, 10, 2, 0),
    "AMAIR_EL1": sysreg(3, 0, 10, 3, 0),
    "VBAR_EL1": VBAR_EL1,
    "CONTEXTIDR_EL1": sysreg(3, 0, 13, 0, 1),
    "TPIDR_EL1": sysreg(3, 0, 13, 0, 4),
    "TPIDR_EL0": sysreg(3, 3, 13, 0, 2),
    "TPIDRRO_EL0": sysreg(3, 3, 13, 0, 3),
    "CNTKCTL_EL1": sysreg(3, 0, 14, 1, 0),
    "CSSELR_EL1": sysreg(3, 2, 0, 0, 0),
    "MDSCR_EL1": sysreg(2, 0, 0, 2, 2),
}


def mpidr(index: int) -> int:
    """MPIDR_EL1 of vCPU ``index``: 16 vCPUs to a cluster, as many as a GICv3 SGI's target list holds."""
    return 1 << 31 | (index >> 4) << 8 | index & 0xF


def _is_reserved_id(encoding: int) -> bool:
    """Whether ``encoding`` is in the ID register space, whose unallocated part reads as zero (Arm ARM D18.3.1)."""
    return encoding & ~0x7F == sysreg(3, 0, 0, 0, 0) and encoding >> 3 & 0xF != 0


def read(encoding: int, clock: Clock) -> int | None:
    """The value of a register that neither the engine nor the interrupt controller has; None: it is undefined."""
    value = _CONSTANT.get(encoding)
    if value is not None:
        return value
    if encoding == _CNTVCT_EL0:
        return clock.guest_now()
    if encoding == _CNTPCT_EL0:
        return clock.now()
    return 0 if _is_reserved_id(encoding) else None


def write(encoding: int) -> bool:
    """Whether a write to ``encoding`` is to be ignored; False: the register is undefined or read-only."""
    return encoding in _CONSTANT and encoding != _OSLSR_EL1
