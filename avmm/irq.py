"""Interrupt lines: the one thing devices and interrupt controllers share.

A device holds an :class:`IrqLine` and knows nothing of who listens. An :class:`IrqChip` hands lines out and
tells each vCPU's :class:`IrqSink` when the level of its IRQ input changes.
"""

from __future__ import annotations

from typing import Protocol


class IrqLine(Protocol):
    """One input of an interrupt controller. Every method may be called from any thread."""

    def set(self, level: bool) -> None:
        """Drive the line. A rise is an edge for edge-triggered interrupts."""
        ...

    def pulse(self) -> None:
        """Raise and lower: one edge."""
        ...

    def restore(self, level: bool) -> None:
        """Put a saved level back without making an edge."""
        ...


class IrqSink(Protocol):
    """The IRQ input of one vCPU, as its interrupt controller sees it."""

    def irq_changed(self, level: bool) -> None:
        """The input is now ``level``. Called under the VM's lock, on any thread."""
        ...

    def stir(self) -> None:
        """The input is likely to rise very soon. Called as :meth:`irq_changed`."""
        ...

    def offer(self, intid: int) -> None:
        """The vCPU may answer its next read of ICC_IAR1_EL1 with this by itself. Called as :meth:`irq_changed`."""
        ...

    def retract(self) -> bool:
        """Take the offer back; True when the vCPU has taken it already. Called as :meth:`irq_changed`."""
        ...


class IrqChip(Protocol):
    """An interrupt controller: ours (GICv3) or the hypervisor's own.

    ``inside``: it is the hypervisor's. The virtual timer interrupts and a WFI waits inside the guest then.
    """

    @property
    def inside(self) -> bool: ...

    def connect(self, index: int, mpidr: int, sink: IrqSink) -> None:
        """Attach vCPU ``index`` whose MPIDR_EL1 affinity is ``mpidr``. Before the VM runs."""
        ...

    def spi(self, number: int) -> IrqLine:
        """Shared peripheral interrupt ``number`` (0 is INTID 32)."""
        ...

    def ppi(self, index: int, intid: int) -> IrqLine:
        """Private peripheral interrupt ``intid`` (16..31) of vCPU ``index``."""
        ...

    def read_sysreg(self, index: int, encoding: int) -> int | None:
        """An ICC_* register trapped on vCPU ``index``; None when ``encoding`` is not one of ours.

        ``encoding`` is op0<<14 | op1<<11 | CRn<<7 | CRm<<3 | op2.
        """
        ...

    def write_sysreg(self, index: int, encoding: int, value: int) -> bool:
        """Write an ICC_* register; False when ``encoding`` is not one of ours."""
        ...

    def reset_cpu(self, index: int) -> None:
        """vCPU ``index`` starts: its CPU interface gets its reset values. Any thread."""
        ...

    def settle(self, index: int) -> None:
        """vCPU ``index`` has taken an offer (:meth:`IrqSink.offer`). Under the VM's lock."""
        ...
