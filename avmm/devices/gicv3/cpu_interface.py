"""The CPU interface's system registers, ICC_*_EL1 (IHI 0069, 12.2), for a GIC with a single security state.

Keys are the 16-bit encodings op0<<14 | op1<<11 | CRn<<7 | CRm<<3 | op2. A register that is not readable (or not
writable) has no entry in the table: the access is UNDEFINED, as on hardware.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from avmm.devices.gicv3.interrupts import GROUP0, GROUP1, MIN_BPR0, MIN_BPR1, PRIORITY_MASK, SPURIOUS, Cpu

if TYPE_CHECKING:
    from avmm.devices.gicv3.gic import Gicv3

ICC_PMR_EL1: Final = 0xC230
ICC_IAR0_EL1: Final = 0xC640
ICC_EOIR0_EL1: Final = 0xC641
ICC_HPPIR0_EL1: Final = 0xC642
ICC_BPR0_EL1: Final = 0xC643
ICC_AP0R0_EL1: Final = 0xC644
ICC_AP1R0_EL1: Final = 0xC648
ICC_DIR_EL1: Final = 0xC659
ICC_RPR_EL1: Final = 0xC65B
ICC_SGI1R_EL1: Final = 0xC65D
ICC_ASGI1R_EL1: Final = 0xC65E
ICC_SGI0R_EL1: Final = 0xC65F
ICC_IAR1_EL1: Final = 0xC660
ICC_EOIR1_EL1: Final = 0xC661
ICC_HPPIR1_EL1: Final = 0xC662
ICC_BPR1_EL1: Final = 0xC663
ICC_CTLR_EL1: Final = 0xC664
ICC_SRE_EL1: Final = 0xC665
ICC_IGRPEN0_EL1: Final = 0xC666
ICC_IGRPEN1_EL1: Final = 0xC667

# ICC_CTLR_EL1: A3V (affinity 3 may be non-zero), IDbits 0 (16 bits), PRIbits 4 (five bits). PMHE is RAZ/WI: 1-of-N
# selection does not look at priorities.
_CTLR_FIXED: Final = 1 << 15 | 4 << 8
_CTLR_CBPR: Final = 1 << 0
_CTLR_EOIMODE: Final = 1 << 1
# Only system registers, no memory-mapped interface, no bypass: DIB, DFB and SRE are RAO/WI.
_SRE: Final = 0b111
_SGI_IRM: Final = 1 << 40


class CpuInterfaces:
    """The ICC_* registers of every CPU of one GIC."""

    def __init__(self, gic: Gicv3) -> None:
        self._gic = gic
        self.readers: Final[dict[int, Callable[[Cpu], int]]] = {
            ICC_IAR1_EL1: self._acknowledge1,
            ICC_IAR0_EL1: self._acknowledge0,
            ICC_HPPIR0_EL1: lambda cpu: cpu.highest if cpu.highest_group() == GROUP0 else SPURIOUS,
            ICC_HPPIR1_EL1: lambda cpu: cpu.highest if cpu.highest_group() == GROUP1 else SPURIOUS,
            ICC_RPR_EL1: lambda cpu: cpu.running,
            ICC_PMR_EL1: lambda cpu: cpu.pmr,
            ICC_BPR0_EL1: lambda cpu: cpu.bpr0,
            ICC_BPR1_EL1: lambda cpu: min(cpu.bpr0 + 1, 7) if cpu.cbpr else cpu.bpr1,
            ICC_AP0R0_EL1: lambda cpu: cpu.ap0,
            ICC_AP1R0_EL1: lambda cpu: cpu.ap1,
            ICC_CTLR_EL1: lambda cpu: _CTLR_FIXED | cpu.eoi_split << 1 | cpu.cbpr,
            ICC_SRE_EL1: lambda cpu: _SRE,
            ICC_IGRPEN0_EL1: lambda cpu: cpu.enables & 1,
            ICC_IGRPEN1_EL1: lambda cpu: cpu.enables >> 1,
        }
        self.writers: Final[dict[int, Callable[[Cpu, int], None]]] = {
            ICC_EOIR1_EL1: self._end1,
            ICC_EOIR0_EL1: self._end0,
            ICC_SGI1R_EL1: lambda cpu, value: self._generate_sgi(cpu, value, GROUP1),
            ICC_SGI0R_EL1: lambda cpu, value: self._generate_sgi(cpu, value, GROUP0),
            # The other security state's group 1 does not exist here: accepted, without effect.
            ICC_ASGI1R_EL1: lambda cpu, value: None,
            ICC_DIR_EL1: self._deactivate,
            ICC_PMR_EL1: self._write_pmr,
            ICC_BPR0_EL1: self._write_bpr0,
            ICC_BPR1_EL1: self._write_bpr1,
            ICC_AP0R0_EL1: self._write_ap0,
            ICC_AP1R0_EL1: self._write_ap1,
            ICC_CTLR_EL1: self._write_ctlr,
            ICC_SRE_EL1: lambda cpu, value: None,
            ICC_IGRPEN0_EL1: lambda cpu, value: self._write_enable(cpu, GROUP0, value & 1),
            ICC_IGRPEN1_EL1: lambda cpu, value: self._write_enable(cpu, GROUP1, value & 1),
        }

    @staticmethod
    def _acknowledge1(cpu: Cpu) -> int:
        return cpu.acknowledge1() if cpu.irq else SPURIOUS

    @staticmethod
    def _acknowledge0(cpu: Cpu) -> int:
        group_priority = cpu.priority & cpu.mask0
        if cpu.highest_group() != GROUP0 or cpu.priority >= cpu.pmr or group_priority >= cpu.running:
            return SPURIOUS
        return cpu.acknowledge0()

    def _end1(self, cpu: Cpu, value: int) -> None:
        intid = value & 0xFFFFFF
        lowest = (cpu.ap0 | cpu.ap1) & -(cpu.ap0 | cpu.ap1)
        # An EOI that does not match the running priority's group is UNPREDICTABLE (4.6.1): ignored whole.
        if intid < self._gic.intids and cpu.ap1 & lowest and not cpu.ap0 & lowest:
            cpu.ap1 ^= lowest
            self._drop(cpu, intid)

    def _end0(self, cpu: Cpu, value: int) -> None:
        intid = value & 0xFFFFFF
        lowest = (cpu.ap0 | cpu.ap1) & -(cpu.ap0 | cpu.ap1)
        if intid < self._gic.intids and cpu.ap0 & lowest:
            cpu.ap0 ^= lowest
            self._drop(cpu, intid)

    def _drop(self, cpu: Cpu, intid: int) -> None:
        active = cpu.ap0 | cpu.ap1
        cpu.running = ((active & -active).bit_length() - 1) << 3 if active else 0xFF
        if not cpu.eoi_split:
            self._gic.deactivate(cpu, intid)
        cpu.evaluate()

    def _deactivate(self, cpu: Cpu, value: int) -> None:
        intid = value & 0xFFFFFF
        # With EOImode clear a write to DIR is UNPREDICTABLE: ignored.
        if cpu.eoi_split and intid < self._gic.intids:
            self._gic.deactivate(cpu, intid)
            cpu.evaluate()

    def _generate_sgi(self, sender: Cpu, value: int, group: int) -> None:
        bit = 1 << (value >> 24 & 0xF)
        if value & _SGI_IRM:
            targets = [cpu for cpu in self._gic.cpus if cpu is not sender]
        else:
            # Aff3.Aff2.Aff1.(RS * 16 + bit of the list); RS is zero on CPUs with Aff0 below 16.
            cluster = (value >> 48 & 0xFF) << 24 | (value >> 32 & 0xFF) << 16 | (value >> 16 & 0xFF) << 8
            cluster |= (value >> 44 & 0xF) << 4
            wanted = value & 0xFFFF
            by_affinity = self._gic.by_affinity
            targets = []
            while wanted:
                low = wanted & -wanted
                wanted ^= low
                target = by_affinity.get(cluster | low.bit_length() - 1)
                if target is not None:
                    targets.append(target)
        for cpu in targets:
            if cpu.sink is not None:
                cpu.sink.stir()
            cpu.settle()
            bank = cpu.private
            # 4.8.7: the register's group must be the one the target has configured for this SGI.
            if (GROUP1 if bank.group & bit else GROUP0) == group:
                bank.latch |= bit
                bank.refresh()
                cpu.evaluate()

    @staticmethod
    def _write_pmr(cpu: Cpu, value: int) -> None:
        cpu.pmr = value & PRIORITY_MASK
        cpu.evaluate()

    @staticmethod
    def _write_bpr0(cpu: Cpu, value: int) -> None:
        cpu.bpr0 = max(value & 7, MIN_BPR0)
        cpu.derive()
        cpu.evaluate()

    @staticmethod
    def _write_bpr1(cpu: Cpu, value: int) -> None:
        if not cpu.cbpr:
            cpu.bpr1 = max(value & 7, MIN_BPR1)
            cpu.derive()
            cpu.evaluate()

    @staticmethod
    def _write_ap0(cpu: Cpu, value: int) -> None:
        cpu.ap0 = value & 0xFFFFFFFF
        cpu.derive()
        cpu.evaluate()

    @staticmethod
    def _write_ap1(cpu: Cpu, value: int) -> None:
        cpu.ap1 = value & 0xFFFFFFFF
        cpu.derive()
        cpu.evaluate()

    @staticmethod
    def _write_ctlr(cpu: Cpu, value: int) -> None:
        cpu.cbpr = bool(value & _CTLR_CBPR)
        cpu.eoi_split = bool(value & _CTLR_EOIMODE)
        cpu.derive()
        cpu.evaluate()

    def _write_enable(self, cpu: Cpu, group: int, enable: int) -> None:
        self._gic.settle_all()
        cpu.enables = cpu.enables | group if enable else cpu.enables & ~group
        cpu.groups = cpu.enables & self._gic.enables
        self._gic.participation_changed()
        cpu.evaluate()
