"""Interrupt state as bitmaps, and each CPU's highest priority pending interrupt (IHI 0069, 4.8).

Bit n of every bitmap is INTID n: INTIDs 0..31 (SGIs, PPIs) live in one private bank per CPU, the SPIs in one shared
bank. A candidate is found with a handful of integer operations, and priorities are compared among candidates only.
"""

from __future__ import annotations

from typing import Final

from avmm.irq import IrqSink

#: Five priority bits, as on most implementations: 32 levels, the low three bits read as zero.
PRIORITY_MASK: Final = 0xF8
#: The running priority of an idle CPU interface.
IDLE_PRIORITY: Final = 0xFF
#: The special INTID "nothing to acknowledge" (2.2.1).
SPURIOUS: Final = 1023
#: Number of private INTIDs: 16 SGIs and 16 PPIs.
PRIVATE: Final = 32
#: SGIs are always edge-triggered (2.2).
SGI_MASK: Final = 0xFFFF

GROUP0: Final = 1
GROUP1: Final = 2

# Smallest binary points for five priority bits (4.8.2): group priority is bits [7:3] either way.
MIN_BPR0: Final = 2
MIN_BPR1: Final = 3


class Bank:
    """The state of the INTIDs whose bits are set in ``valid``.

    ``latch`` holds what is pending by an edge or by a write to ISPENDR, ``line`` the input levels; a level-sensitive
    interrupt is pending while either is set. ``ready`` is derived: pending, enabled and not active.
    """

    __slots__ = ("active", "edge", "enabled", "group", "latch", "line", "priority", "ready", "valid")

    def __init__(self, first: int, end: int) -> None:
        self.valid: Final = (1 << end) - (1 << first)
        self.line = 0
        self.priority = bytearray(end)
        self.reset()

    def reset(self) -> None:
        """Registers to their reset values. Lines are inputs: they keep their level."""
        self.latch = self.enabled = self.active = self.group = self.ready = 0
        self.edge = self.valid & SGI_MASK
        self.priority[:] = bytes(len(self.priority))

    def pending(self) -> int:
        """The bitmap ISPENDR shows."""
        return self.latch | self.line & ~self.edge

    def refresh(self) -> None:
        """Recompute ``ready`` after any other bitmap has changed."""
        self.ready = (self.latch | self.line & ~self.edge) & self.enabled & ~self.active


class Cpu:
    """One CPU interface: its private bank, its ICC_* state and its IRQ output.

    ``routes`` has the SPIs that are sent here. ``groups`` has GROUP0 and GROUP1 where both the distributor and this
    interface enable the group. ``highest`` and ``priority`` describe the highest priority pending interrupt.
    """

    __slots__ = (
        "affinity", "ap0", "ap1", "asleep", "bpr0", "bpr1", "cbpr", "enables", "eoi_split", "groups", "highest",
        "index", "irq", "mask0", "mask1", "offered", "pmr", "priority", "private", "routes", "running", "shared",
        "sink",
    )  # fmt: skip

    def __init__(self, index: int, affinity: int, shared: Bank) -> None:
        self.index = index
        self.affinity = affinity
        self.shared = shared
        self.private = Bank(0, PRIVATE)
        self.sink: IrqSink | None = None
        self.routes = 0
        self.irq = False
        self.offered = False  # the sink may answer ICC_IAR1_EL1 by itself
        self.reset_interface()
        self.asleep = True

    def reset_interface(self) -> None:
        """The ICC_* registers to their reset values; the caller evaluates."""
        self.pmr = self.ap0 = self.ap1 = self.enables = self.groups = 0
        self.cbpr = self.eoi_split = False
        self.bpr0 = MIN_BPR0
        self.bpr1 = MIN_BPR1
        self.highest = SPURIOUS
        self.priority = IDLE_PRIORITY
        self.derive()

    def derive(self) -> None:
        """Recompute what follows from the binary points and the active priorities."""
        # 4.8.2: group 0 uses BPR0; group 1 BPR1, whose split lies one bit lower, or BPR0 when CBPR is set.
        self.mask0 = -(2 << self.bpr0)
        self.mask1 = self.mask0 if self.cbpr else -(1 << self.bpr1)
        active = self.ap0 | self.ap1
        self.running = ((active & -active).bit_length() - 1) << 3 if active else IDLE_PRIORITY

    def settle(self) -> None:
        """See whether the guest has acknowledged what was offered to it.

        Before anything that has to do with it changes: an edge after an acknowledge is another interrupt.
        """
        if self.offered:
            self.offered = False
            if self.sink is not None and self.sink.retract():
                self.acknowledge1()

    def acknowledge0(self) -> int:
        """Group 0's highest priority pending interrupt becomes active; its INTID."""
        group_priority = self.priority & self.mask0
        self.ap0 |= 1 << (group_priority >> 3)
        return self._activate(group_priority)

    def acknowledge1(self) -> int:
        """The interrupt that the IRQ output is up for becomes active; its INTID."""
        group_priority = self.priority & self.mask1
        self.ap1 |= 1 << (group_priority >> 3)
        return self._activate(group_priority)

    def _activate(self, group_priority: int) -> int:
        # A level-sensitive interrupt stays pending underneath while its line is high.
        intid = self.highest
        bit = 1 << intid
        bank = self.private if intid < PRIVATE else self.shared
        bank.active |= bit
        bank.latch &= ~bit
        bank.ready &= ~bit
        self.running = group_priority
        self.evaluate()
        return intid

    def evaluate(self) -> None:
        """Find the highest priority pending interrupt and drive the IRQ output."""
        while self.offered:
            self.settle()
        private = self.private
        shared = self.shared
        ready = private.ready | shared.ready & self.routes
        irq = False
        if ready:
            group1 = private.group | shared.group
            if self.groups == GROUP1:
                ready &= group1
            elif self.groups == GROUP0:
                ready &= ~group1
            elif not self.groups:
                ready = 0
        if ready:
            best = ready & -ready
            intid = best.bit_length() - 1
            priority = (private if intid < PRIVATE else shared).priority[intid]
            ready ^= best
            while ready:  # equal priorities: the lowest INTID wins
                bit = ready & -ready
                ready ^= bit
                other = bit.bit_length() - 1
                other_priority = (private if other < PRIVATE else shared).priority[other]
                if other_priority < priority:
                    intid, priority, best = other, other_priority, bit
            self.highest = intid
            self.priority = priority
            if group1 & best:
                irq = priority < self.pmr and priority & self.mask1 < self.running
        else:
            self.highest = SPURIOUS
            self.priority = IDLE_PRIORITY
        sink = self.sink
        if sink is None:
            self.irq = irq
            return
        if irq:  # before it hears of it: who sleeps may wake at once
            self.offered = True
            sink.offer(self.highest)
        if irq is not self.irq:
            self.irq = irq
            sink.irq_changed(irq)

    def highest_group(self) -> int:
        """GROUP0 or GROUP1 of the highest priority pending interrupt; 0 when there is none."""
        if self.highest == SPURIOUS:
            return 0
        return GROUP1 if (self.private.group | self.shared.group) >> self.highest & 1 else GROUP0
