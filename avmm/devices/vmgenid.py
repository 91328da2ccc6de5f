"""The VM generation ID: 16 bytes of memory that are new in each twin, and an interrupt that says so.

A Linux guest from 6.10 on reseeds its random number generator then (drivers/virt/vmgenid.c, and its device-tree binding
microsoft,vmgenid). Older ones do not look: there avmm's agent reseeds it before the first command, and without the
agent it has new numbers with the next reseeding, within a minute.
"""

from __future__ import annotations

import os
from typing import Final

from avmm.fdt import EDGE, Node, Placement
from avmm.irq import IrqLine
from avmm.memory import GuestMemory

ID_SIZE: Final = 16


class VmGenId:
    """An ID in ``memory``, at ``address``, where RAM is that no guest uses as such."""

    def __init__(self, irq: IrqLine, memory: GuestMemory, address: int) -> None:
        self._irq = irq
        self._memory = memory
        self._address = address

    def renew(self, *, tell: bool) -> None:
        """A new ID; ``tell``: the guest has seen another one."""
        self._memory.write(self._address, os.urandom(ID_SIZE))
        if tell:
            self._irq.pulse()

    @staticmethod
    def fdt_node(placement: Placement) -> Node:
        """The device-tree node."""
        return Node(
            f"vmgenid@{placement.base:x}",
            {"compatible": "microsoft,vmgenid", "reg": placement.reg, "interrupts": placement.interrupts(EDGE)},
        )
