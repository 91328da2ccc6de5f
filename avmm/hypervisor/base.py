"""What every hypervisor gives us: a VM with RAM, and vCPUs that run until they exit.

Three implementations satisfy this: Apple's Hypervisor.framework, softhv (our engine with the same C ABI) and KVM.
Nobody outside ``hypervisor/`` knows which one runs; :func:`avmm.hypervisor.open_hypervisor` picks it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final, Protocol

from avmm.irq import IrqChip
from avmm.memory import Region


class ExitKind(IntEnum):
    """Why a vCPU came back; the values of AVMM_EXIT_* in frame.h, which says what each carries."""

    CANCELED = 0
    VTIMER = 1
    UNKNOWN = 2
    MMIO_READ = 3
    MMIO_WRITE = 4
    SYSREG_READ = 5
    SYSREG_WRITE = 6
    HVC = 7
    SMC = 8
    WFI = 9
    WFE = 10
    ABORT = 11
    OTHER = 12
    ERROR = 13


class Finish(IntEnum):
    """What :meth:`Vcpu.run` does with the instruction that exited, before running on."""

    NONE = 0
    ADVANCE = 1
    RESULT = 2


#: Of ``frame.offer``: an INTID that ICC_IAR1_EL1 may return without an exit, and one that it has returned.
OFFERED: Final = 0x4000_0000
TAKEN: Final = 0x8000_0000

#: How :meth:`Vcpu.open_gate` ends a sleep.
ENTER: Final = 1
OUT: Final = 2


class Frame(Protocol):
    """``avmm_frame_t`` of frame.h: the last exit, and what the next :meth:`Vcpu.run` delivers. All integers."""

    irq: int
    finish: int
    unmask_vtimer: int
    mask_vtimer: int
    result: int
    vtimer_masked: int
    kind: int
    size: int
    sign_extend: int
    wide: int
    reg: int
    address: int
    value: int
    pc: int
    syndrome: int
    virtual_address: int
    vtimer_ctl: int
    vtimer_cval: int
    sleep: int
    sleep_exact: int
    sleep_until: int
    expired: int
    entered: int
    offer: int
    acknowledged: int

    @property
    def args(self) -> list[int]:
        """x0..x7 of an HVC or SMC."""
        ...


class UartBatch(Protocol):
    """A UART's output, taken a batch at a time: see avmm_uart_open() in frame.h. Any thread."""

    def open(self, flags: int) -> None:
        """From now on the data register is written to, and the flag register reads as ``flags``, without exits."""
        ...

    def close(self) -> bytes:
        """No longer; what was written meanwhile, in order."""
        ...

    def served(self) -> int:
        """How many accesses needed no exit, ever."""
        ...


class Reg:
    """Register numbers of :meth:`Vcpu.get_reg` (Apple's ``hv_reg_t``): X0..X30 are 0..30."""

    PC = 31
    FPCR = 32
    FPSR = 33
    CPSR = 34


def sysreg(op0: int, op1: int, crn: int, crm: int, op2: int) -> int:
    """The 16-bit encoding of a system register, as in ``hv_sys_reg_t``."""
    return op0 << 14 | op1 << 11 | crn << 7 | crm << 3 | op2


class Vcpu(Protocol):
    """One virtual CPU. Every method but :meth:`kick` only on the thread that created it."""

    frame: Frame

    def run(self) -> int:
        """Finish the last exit, enter the guest, come back with an :class:`ExitKind` (as a plain int).

        With ``frame.sleep`` it sleeps first: at a gate, until ``frame.sleep_until``.
        """
        ...

    def kick(self) -> None:
        """Make :meth:`run` return CANCELED, now or at its next call. Any thread."""
        ...

    def open_gate(self, how: int) -> None:
        """End a sleep that :meth:`run` is in, or will be: ENTER the guest, or come OUT of run. Any thread."""
        ...

    def set_poll(self, most_ns: int) -> None:
        """How long at most, in nanoseconds, a sleep may begin with a busy wait. Not while it runs."""
        ...

    def stir(self) -> None:
        """The gate may be opened very soon: who sleeps there wakes up in the meantime. Any thread."""
        ...

    def shut_gate(self) -> None:
        """Take it back that the gate was opened: the sleep had ended by itself."""
        ...

    def withdraw(self) -> int:
        """Take ``frame.offer`` back; what it was. Any thread."""
        ...

    def get_reg(self, reg: int) -> int:
        """A general register, see :class:`Reg`."""
        ...

    def set_reg(self, reg: int, value: int) -> None:
        """Write a general register."""
        ...

    def get_sysreg(self, encoding: int) -> int:
        """A system register; raises EngineError when the engine does not know it."""
        ...

    def set_sysreg(self, encoding: int, value: int) -> None:
        """Write a system register."""
        ...

    def get_simd(self, index: int) -> bytes:
        """Q``index``: 16 bytes, little endian."""
        ...

    def set_simd(self, index: int, value: bytes) -> None:
        """Write Q``index``."""
        ...

    def get_vtimer_offset(self) -> int:
        """CNTVOFF: guest CNTVCT = host counter - this, in counter ticks."""
        ...

    def set_vtimer_offset(self, offset: int) -> None:
        """Set CNTVOFF."""
        ...

    def counters(self) -> dict[str, int]:
        """The engine's own counters, empty where it has none."""
        ...

    def close(self) -> None:
        """Destroy the vCPU."""
        ...


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What the engine can do. ``ipa_bits``: width of guest physical addresses; ``max_vcpus`` per VM."""

    name: str
    ipa_bits: int
    max_vcpus: int
    many_vms: bool


class Hypervisor(Protocol):
    """One virtual machine of one engine. Create it, map RAM, create vCPUs on their threads, close it last."""

    capabilities: Capabilities

    def map(self, region: Region, *, read_only: bool = False) -> None:
        """Put ``region`` into the guest's physical address space."""
        ...

    def unmap(self, region: Region) -> None:
        """Take it out again."""
        ...

    def host_wrote(self, gpa: int, length: int) -> None:
        """The host wrote guest RAM: drop what was derived from the old contents. Any thread."""
        ...

    def fault_counts(self) -> dict[str, int]:
        """How often each injected fault has happened; empty without faults."""
        ...

    def batch_uart(self, base: int) -> UartBatch:
        """A batch, closed, for the UART at ``base``; vCPUs that are created from now on use it. Raises EngineError."""
        ...

    def gic(self, distributor: int, redistributors: int) -> IrqChip:
        """The engine's own GICv3, fresh from reset, its registers at these addresses: before there are vCPUs.

        All of them must exist before one runs. Raises EngineError where there is none.
        """
        ...

    def create_vcpu(self) -> Vcpu:
        """A vCPU owned by the calling thread."""
        ...

    def close(self) -> None:
        """Destroy the VM; its vCPUs are closed already."""
        ...
