"""GICv3, the interrupt controller: distributor, redistributors and CPU interfaces (Arm IHI 0069).

What it does: SGIs, PPIs and up to 960 SPIs; level and edge; 32 priority levels with preemption; affinity and 1-of-N
routing; both EOI modes; group 1 on each vCPU's IRQ input. Group 0 interrupts have all their state and can be
acknowledged by polling, but nothing drives an FIQ input. No LPIs, no ITS, no message-based SPIs.

Registers and system registers are used with the VM's lock held; lines take it themselves.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Final

from avmm.devices.gicv3.cpu_interface import CpuInterfaces
from avmm.devices.gicv3.interrupts import GROUP0, GROUP1, PRIVATE, Bank, Cpu
from avmm.devices.gicv3.registers import GICR_STRIDE, Distributor, Redistributors
from avmm.irq import IrqLine, IrqSink

_ROUTER_IRM: Final = 1 << 31
_STATE_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class BankState:
    """One bank's bitmaps and priorities."""

    latch: int
    line: int
    edge: int
    enabled: int
    active: int
    group: int
    priority: bytes


@dataclass(frozen=True, slots=True)
class CpuState:
    """One vCPU's redistributor and CPU interface."""

    affinity: int
    private: BankState
    asleep: bool
    pmr: int
    bpr0: int
    bpr1: int
    cbpr: bool
    eoi_split: bool
    enables: int
    ap0: int
    ap1: int


@dataclass(frozen=True, slots=True)
class GicState:
    """The whole controller, input levels included."""

    version: int
    enables: int
    shared: BankState
    router: tuple[int, ...]
    cpus: tuple[CpuState, ...]


class Gicv3:
    """A GICv3 for ``vcpus`` CPUs with ``intids`` INTIDs (a multiple of 32 in 64..992; the first 32 are private).

    ``distributor`` and ``redistributors`` are bus devices (windows of ``GICD_SIZE`` and ``redistributors_size``
    bytes). Implements :class:`avmm.irq.IrqChip`.
    """

    inside: Final = False

    def __init__(self, lock: threading.RLock, vcpus: int, intids: int = 256) -> None:
        if vcpus < 1:
            raise ValueError(f"a GIC needs at least one vCPU, not {vcpus}")
        if intids % 32 or not 64 <= intids <= 992:
            raise ValueError(f"the number of INTIDs must be a multiple of 32 in 64..992, not {intids}")
        self.lock: Final = lock
        self.intids: Final = intids
        self.shared: Final = Bank(PRIVATE, intids)
        self.cpus: Final = [Cpu(n, n // 16 << 8 | n % 16, self.shared) for n in range(vcpus)]
        self.by_affinity: Final = {cpu.affinity: cpu for cpu in self.cpus}
        self.enables = 0
        self.router: Final = [0] * intids
        self.targets: Final[list[Cpu | None]] = [None] * intids
        self.distributor: Final = Distributor(self)
        self.redistributors: Final = Redistributors(self)
        self._one_of_n = 0  # SPIs with IROUTER.IRM set
        interfaces = CpuInterfaces(self)
        self._readers: Final = interfaces.readers
        self._writers: Final = interfaces.writers
        self._route_all()

    @property
    def redistributors_size(self) -> int:
        """Size of the GICR window in bytes."""
        return GICR_STRIDE * len(self.cpus)

    def connect(self, index: int, mpidr: int, sink: IrqSink) -> None:
        """Attach vCPU ``index`` whose MPIDR_EL1 is ``mpidr``. Before the VM runs."""
        with self.lock:
            self.settle_all()
            cpu = self.cpus[index]
            affinity = mpidr >> 8 & 0xFF000000 | mpidr & 0xFFFFFF
            if self.by_affinity.get(affinity, cpu) is not cpu:
                raise ValueError(f"two vCPUs have the affinity {affinity:#x}")
            if self.by_affinity.get(cpu.affinity) is cpu:
                del self.by_affinity[cpu.affinity]
            cpu.affinity = affinity
            cpu.sink = sink
            self.by_affinity[affinity] = cpu
            self._route_all()
            self.evaluate_all()

    def spi(self, number: int) -> IrqLine:
        """Shared peripheral interrupt ``number`` (0 is INTID 32)."""
        if not 0 <= number < self.intids - PRIVATE:
            raise ValueError(f"no SPI {number}: there are {self.intids - PRIVATE}")
        return Line(self, PRIVATE + number, None)

    def ppi(self, index: int, intid: int) -> IrqLine:
        """Private peripheral interrupt ``intid`` (16..31) of vCPU ``index``."""
        if not 16 <= intid < PRIVATE:
            raise ValueError(f"no PPI {intid}: PPIs are 16..31")
        return Line(self, intid, self.cpus[index])

    def read_sysreg(self, index: int, encoding: int) -> int | None:
        """An ICC_* register of vCPU ``index``; None where the access is UNDEFINED."""
        reader = self._readers.get(encoding)
        if reader is None:
            return None
        cpu = self.cpus[index]
        cpu.settle()
        return reader(cpu)

    def write_sysreg(self, index: int, encoding: int, value: int) -> bool:
        """Write an ICC_* register; False where the access is UNDEFINED."""
        writer = self._writers.get(encoding)
        if writer is None:
            return False
        cpu = self.cpus[index]
        cpu.settle()
        writer(cpu, value)
        return True

    def settle(self, index: int) -> None:
        """See whether vCPU ``index`` has acknowledged what was offered to it."""
        self.cpus[index].settle()

    def settle_all(self) -> None:
        """The same of every vCPU."""
        for cpu in self.cpus:
            if cpu.offered:
                cpu.settle()

    def deactivate(self, cpu: Cpu, intid: int) -> None:
        """Active to inactive; ``cpu`` is the one that asks and is evaluated by the caller."""
        bank = cpu.private if intid < PRIVATE else self.shared
        bank.active &= ~(1 << intid)
        bank.refresh()
        if intid >= PRIVATE:
            target = self.targets[intid]
            if target is not None and target is not cpu:
                target.evaluate()

    def evaluate_all(self) -> None:
        """Evaluate every CPU interface."""
        for cpu in self.cpus:
            cpu.evaluate()

    def route(self, intid: int, value: int) -> None:
        """IROUTER of SPI ``intid`` becomes ``value``; the caller evaluates."""
        bit = 1 << intid
        self.router[intid] = value
        if value & _ROUTER_IRM:
            self._one_of_n |= bit
            group = GROUP1 if self.shared.group & bit else GROUP0
            # Who takes part: awake, with the interrupt's group enabled (3.2.3). Spread by number, so that a device's
            # interrupts stay on one vCPU's caches.
            pool = [cpu for cpu in self.cpus if not cpu.asleep and cpu.enables & group]
            target = pool[intid % len(pool)] if pool else None
        else:
            self._one_of_n &= ~bit
            target = self.by_affinity.get(value >> 8 & 0xFF000000 | value & 0xFFFFFF)
        previous = self.targets[intid]
        if previous is not target:
            if previous is not None:
                previous.routes &= ~bit
            if target is not None:
                target.routes |= bit
            self.targets[intid] = target

    def participation_changed(self) -> None:
        """Choose again for every SPI with 1-of-N routing, and evaluate whoever gained or lost one."""
        waiting = self._one_of_n
        if not waiting:
            return
        while waiting:
            intid = (waiting & -waiting).bit_length() - 1
            waiting &= waiting - 1
            self.route(intid, self.router[intid])
        self.evaluate_all()

    def reset(self) -> None:
        """Everything to its reset value. Input lines keep their levels: they belong to the devices."""
        with self.lock:
            self.settle_all()
            self.enables = 0
            self.shared.reset()
            self.router[:] = [0] * self.intids
            for cpu in self.cpus:
                cpu.private.reset()
                cpu.reset_interface()
                cpu.asleep = True
            self._route_all()
            self.evaluate_all()

    def reset_cpu(self, index: int) -> None:
        """The CPU interface of one vCPU to its reset values, as when PSCI turns it on."""
        with self.lock:
            self.settle_all()
            cpu = self.cpus[index]
            cpu.reset_interface()
            self.participation_changed()
            cpu.evaluate()

    def save(self) -> GicState:
        """All state, for a snapshot."""
        with self.lock:
            self.settle_all()
            cpus = tuple(_save_cpu(cpu) for cpu in self.cpus)
            return GicState(_STATE_VERSION, self.enables, _save_bank(self.shared), tuple(self.router), cpus)

    def restore(self, state: GicState) -> None:
        """Back to a saved state. No edge is made; vCPUs hear of their IRQ input where it differs."""
        if state.version != _STATE_VERSION:
            raise ValueError(f"GIC state version {state.version} is not {_STATE_VERSION}")
        if len(state.router) != self.intids or [c.affinity for c in state.cpus] != [c.affinity for c in self.cpus]:
            raise ValueError("the GIC state is of a machine with other vCPUs or interrupts")
        with self.lock:
            self.settle_all()
            self.enables = state.enables
            _restore_bank(self.shared, state.shared)
            self.router[:] = state.router
            for cpu, saved in zip(self.cpus, state.cpus, strict=True):
                _restore_bank(cpu.private, saved.private)
                cpu.asleep, cpu.pmr, cpu.bpr0, cpu.bpr1 = saved.asleep, saved.pmr, saved.bpr0, saved.bpr1
                cpu.cbpr, cpu.eoi_split = saved.cbpr, saved.eoi_split
                cpu.ap0, cpu.ap1, cpu.enables = saved.ap0, saved.ap1, saved.enables
                cpu.groups = cpu.enables & self.enables
                cpu.derive()
            self._route_all()
            self.evaluate_all()

    def _route_all(self) -> None:
        for intid in range(PRIVATE, self.intids):
            self.route(intid, self.router[intid])


class Line:
    """One input: an :class:`avmm.irq.IrqLine` of a private (``cpu``) or shared interrupt."""

    __slots__ = ("_bank", "_bit", "_cpu", "_gic", "_intid", "_lock")

    def __init__(self, gic: Gicv3, intid: int, cpu: Cpu | None) -> None:
        self._gic = gic
        self._lock = gic.lock
        self._cpu = cpu
        self._bank = gic.shared if cpu is None else cpu.private
        self._intid = intid
        self._bit = 1 << intid

    def set(self, level: bool) -> None:
        """Drive the line."""
        with self._lock:  # every interrupt's way: few calls
            bank = self._bank
            bit = self._bit
            if bool(bank.line & bit) is level:
                return
            cpu = self._cpu or self._gic.targets[self._intid]
            if cpu is not None:
                if level and bank.enabled & bit and cpu.sink is not None:
                    cpu.sink.stir()  # waking takes as long as finding out what for
                if cpu.offered:
                    cpu.settle()
            bank.line ^= bit
            if bank.edge & bit:
                if not level:
                    return
                bank.latch |= bit
            bank.refresh()
            if cpu is not None:
                cpu.evaluate()

    def pulse(self) -> None:
        """Raise and lower the line."""
        with self._lock:
            self.set(True)
            self.set(False)

    def restore(self, level: bool) -> None:
        """Put a saved level back without making an edge."""
        with self._lock:
            cpu = self._cpu or self._gic.targets[self._intid]
            if cpu is not None:
                cpu.settle()
            bank = self._bank
            bank.line = bank.line | self._bit if level else bank.line & ~self._bit
            bank.refresh()
            if cpu is not None:
                cpu.evaluate()


def _save_bank(bank: Bank) -> BankState:
    return BankState(bank.latch, bank.line, bank.edge, bank.enabled, bank.active, bank.group, bytes(bank.priority))


def _save_cpu(cpu: Cpu) -> CpuState:
    return CpuState(
        cpu.affinity, _save_bank(cpu.private), cpu.asleep, cpu.pmr, cpu.bpr0, cpu.bpr1, cpu.cbpr, cpu.eoi_split,
        cpu.enables, cpu.ap0, cpu.ap1,
    )  # fmt: skip


def _restore_bank(bank: Bank, state: BankState) -> None:
    bank.latch, bank.line, bank.edge = state.latch, state.line, state.edge
    bank.enabled, bank.active, bank.group = state.enabled, state.active, state.group
    bank.priority[:] = state.priority
    bank.refresh()
