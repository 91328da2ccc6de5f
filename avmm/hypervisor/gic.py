"""The hypervisor's own GICv3 as a board's interrupt controller: softhv's, or that of macOS 15."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final

from avmm.errors import EngineError
from avmm.irq import IrqLine, IrqSink

if TYPE_CHECKING:
    from avmm.hypervisor._native import NativeHypervisor

_PRIVATE: Final = 32


class HypervisorGic:
    """Implements :class:`avmm.irq.IrqChip`: SPI lines go to the hypervisor, all else stays in there."""

    inside: Final = True

    def __init__(self, hypervisor: NativeHypervisor) -> None:
        self._hypervisor = hypervisor
        self._spis: dict[int, Spi] = {}
        self._lock = threading.Lock()
        self._closed = False

    def connect(self, index: int, mpidr: int, sink: IrqSink) -> None:
        """Nothing to do: the hypervisor knows its vCPUs."""

    def spi(self, number: int) -> IrqLine:
        """Shared peripheral interrupt ``number`` (0 is INTID 32)."""
        first, count = self._hypervisor.spi_range()
        if not first <= _PRIVATE + number < first + count:
            raise EngineError(f"the hypervisor's GIC has no SPI {number}: its INTIDs are {first}..{first + count - 1}")
        return self._spis.setdefault(number, Spi(self, _PRIVATE + number))

    def drive(self, intid: int, level: bool) -> None:
        """Set an input. Any thread; nothing happens when the VM has ended, which devices may outlive."""
        with self._lock:
            if not self._closed:
                self._hypervisor.set_spi(intid, level)

    def close(self) -> None:
        """The VM is about to end."""
        with self._lock:
            self._closed = True

    def ppi(self, index: int, intid: int) -> IrqLine:
        """A line to nowhere: the hypervisor drives its timer's by itself."""
        return _Nowhere()

    def read_sysreg(self, index: int, encoding: int) -> int | None:
        """None: what the hypervisor does not answer is not there."""
        return None

    def write_sysreg(self, index: int, encoding: int, value: int) -> bool:
        """False, as above."""
        return False

    def reset_cpu(self, index: int) -> None:
        """Nothing we could do: a guest that turns a CPU on again sets its interface up, as Linux does."""

    def settle(self, index: int) -> None:
        """Nothing is ever offered."""

    def reset(self) -> None:
        """As at first, for devices whose lines are low. While no vCPU exists. Raises EngineError."""
        for line in self._spis.values():
            line.set(False)
        self._spis.clear()
        self._hypervisor.reset_gic()


class Spi:
    """One shared interrupt's input."""

    __slots__ = ("_gic", "_intid")

    def __init__(self, gic: HypervisorGic, intid: int) -> None:
        self._gic = gic
        self._intid = intid

    def set(self, level: bool) -> None:
        """Drive the line."""
        self._gic.drive(self._intid, level)

    def pulse(self) -> None:
        """Raise and lower the line."""
        self.set(True)
        self.set(False)

    def restore(self, level: bool) -> None:
        """Drive the line: there is no state of this GIC that could be put back first."""
        self.set(level)


class _Nowhere:
    def set(self, level: bool) -> None:
        pass

    def pulse(self) -> None:
        pass

    def restore(self, level: bool) -> None:
        pass
