"""GICv3 on several CPUs, lines, routing and what QEMU does differently; the rest is in test_gicv3_qemu.py."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import pytest

from avmm.devices.gicv3 import GICR_STRIDE, Gicv3
from avmm.devices.gicv3.cpu_interface import (
    ICC_AP0R0_EL1,
    ICC_AP1R0_EL1,
    ICC_ASGI1R_EL1,
    ICC_BPR0_EL1,
    ICC_BPR1_EL1,
    ICC_CTLR_EL1,
    ICC_DIR_EL1,
    ICC_EOIR0_EL1,
    ICC_EOIR1_EL1,
    ICC_HPPIR0_EL1,
    ICC_HPPIR1_EL1,
    ICC_IAR0_EL1,
    ICC_IAR1_EL1,
    ICC_IGRPEN0_EL1,
    ICC_IGRPEN1_EL1,
    ICC_PMR_EL1,
    ICC_RPR_EL1,
    ICC_SGI0R_EL1,
    ICC_SGI1R_EL1,
    ICC_SRE_EL1,
)

VTIMER = 27
SPURIOUS = 1023
IRM = 1 << 31


@dataclass
class Sink:
    level: bool = False
    changes: list[bool] = field(default_factory=list)
    offered: int | None = None
    taken: bool = False

    def irq_changed(self, level: bool) -> None:
        assert level is not self.level
        self.level = level
        self.changes.append(level)

    def stir(self) -> None: ...

    def offer(self, intid: int) -> None:
        self.offered = intid

    def retract(self) -> bool:
        taken, self.offered, self.taken = self.taken, None, False
        return taken

    def take(self) -> int | None:
        """ICC_IAR1_EL1 is read: the answer, where one is on offer."""
        if self.offered is None:
            return None
        self.taken = True
        intid, self.offered = self.offered, None
        return intid


class Machine:
    """A GIC as Linux sets it up: everything in group 1 and enabled, priority 0xa0, all CPUs awake."""

    def __init__(self, vcpus: int = 1) -> None:
        self.gic = Gicv3(threading.RLock(), vcpus)
        self.sinks = [Sink() for _ in range(vcpus)]
        for index, sink in enumerate(self.sinks):
            self.gic.connect(index, 0x8000_0000 | index // 16 << 8 | index % 16, sink)
        self.gicd(0, 2)
        for word in range(1, 8):
            self.gicd(0x80 + 4 * word, 0xFFFFFFFF)
            self.gicd(0x100 + 4 * word, 0xFFFFFFFF)
        for offset in range(0x420, 0x500, 4):
            self.gicd(offset, 0xA0A0A0A0)
        for index in range(vcpus):
            self.gicr(index, 0x14, 0)
            self.gicr(index, 0x10080, 0xFFFFFFFF)
            self.gicr(index, 0x10100, 0xFFFFFFFF)
            for offset in range(0x10400, 0x10420, 4):
                self.gicr(index, offset, 0xA0A0A0A0)
            self.msr(ICC_PMR_EL1, 0xF0, index)
            self.msr(ICC_IGRPEN1_EL1, 1, index)

    def gicd(self, offset: int, value: int, size: int = 4) -> None:
        self.gic.distributor.write(offset, size, value)

    def gicr(self, index: int, offset: int, value: int) -> None:
        self.gic.redistributors.write(index * GICR_STRIDE + offset, 4, value)

    def mrs(self, encoding: int, index: int = 0) -> int:
        value = self.gic.read_sysreg(index, encoding)
        assert value is not None
        return value

    def msr(self, encoding: int, value: int, index: int = 0) -> None:
        assert self.gic.write_sysreg(index, encoding, value)

    def route(self, intid: int, value: int) -> None:
        self.gicd(0x6000 + 8 * intid, value, 8)

    def edge(self, intid: int) -> None:
        register = 0xC00 + intid // 16 * 4
        self.gicd(register, self.gic.distributor.read(register, 4) | 2 << intid % 16 * 2)

    def levels(self) -> list[bool]:
        return [sink.level for sink in self.sinks]


def test_level_interrupt_comes_again_after_eoi_while_its_line_is_high() -> None:
    machine = Machine()
    line = machine.gic.ppi(0, VTIMER)
    line.set(True)
    assert machine.mrs(ICC_IAR1_EL1) == VTIMER
    assert not machine.sinks[0].level
    machine.msr(ICC_EOIR1_EL1, VTIMER)
    assert machine.sinks[0].level
    assert machine.mrs(ICC_IAR1_EL1) == VTIMER
    line.set(False)
    machine.msr(ICC_EOIR1_EL1, VTIMER)
    assert machine.sinks[0].changes == [True, False, True, False]
    assert machine.mrs(ICC_IAR1_EL1) == SPURIOUS


def test_level_interrupt_goes_away_with_its_line() -> None:
    machine = Machine()
    line = machine.gic.spi(1)
    line.set(True)
    line.set(True)
    assert machine.sinks[0].level
    line.set(False)
    assert not machine.sinks[0].level
    assert machine.mrs(ICC_IAR1_EL1) == SPURIOUS


def test_edge_interrupt_is_latched_and_comes_once_per_edge() -> None:
    machine = Machine()
    machine.edge(40)
    line = machine.gic.spi(8)
    line.pulse()
    assert machine.sinks[0].level
    assert machine.mrs(ICC_IAR1_EL1) == 40
    line.pulse()  # while active: remembered, once
    line.pulse()
    assert not machine.sinks[0].level
    machine.msr(ICC_EOIR1_EL1, 40)
    assert machine.mrs(ICC_IAR1_EL1) == 40
    machine.msr(ICC_EOIR1_EL1, 40)
    assert machine.mrs(ICC_IAR1_EL1) == SPURIOUS
    line.set(True)
    line.set(True)  # no edge
    assert machine.mrs(ICC_IAR1_EL1) == 40
    machine.msr(ICC_EOIR1_EL1, 40)
    assert not machine.sinks[0].level


def test_restoring_a_line_is_not_an_edge() -> None:
    machine = Machine()
    machine.edge(40)
    line = machine.gic.spi(8)
    line.restore(True)
    assert not machine.sinks[0].level
    line.set(False)
    line.set(True)
    assert machine.sinks[0].level
    level = machine.gic.spi(9)
    machine.mrs(ICC_IAR1_EL1)
    machine.msr(ICC_EOIR1_EL1, 40)
    level.restore(True)
    assert machine.mrs(ICC_IAR1_EL1) == 41


def test_higher_priority_preempts_and_equal_priority_does_not() -> None:
    machine = Machine()
    machine.gicd(0x400 + 50, 0x40, 1)
    machine.gic.spi(1).set(True)
    assert machine.mrs(ICC_IAR1_EL1) == 33
    machine.gic.spi(2).set(True)
    assert not machine.sinks[0].level
    assert machine.mrs(ICC_IAR1_EL1) == SPURIOUS
    assert machine.mrs(ICC_HPPIR1_EL1) == 34
    machine.gic.spi(18).set(True)
    assert machine.sinks[0].level
    assert machine.mrs(ICC_IAR1_EL1) == 50
    assert machine.mrs(ICC_RPR_EL1) == 0x40
    machine.msr(ICC_EOIR1_EL1, 50)
    assert machine.mrs(ICC_RPR_EL1) == 0xA0


def test_binary_point_and_mask_decide_about_signalling() -> None:
    machine = Machine()
    machine.msr(ICC_BPR1_EL1, 7)  # group priority: bit 7 alone
    machine.gicd(0x400 + 50, 0x80, 1)
    machine.gic.spi(1).set(True)
    assert machine.mrs(ICC_IAR1_EL1) == 33
    machine.gic.spi(18).set(True)
    assert not machine.sinks[0].level
    machine.msr(ICC_EOIR1_EL1, 33)
    assert machine.mrs(ICC_IAR1_EL1) == 50  # ahead of 33, which is pending again
    machine.msr(ICC_EOIR1_EL1, 50)
    assert machine.sinks[0].level
    machine.msr(ICC_PMR_EL1, 0x80)
    assert not machine.sinks[0].level
    machine.msr(ICC_PMR_EL1, 0x88)
    assert machine.mrs(ICC_IAR1_EL1) == 50


def test_eoi_mode_1_separates_priority_drop_and_deactivation() -> None:
    machine = Machine()
    machine.msr(ICC_CTLR_EL1, 2)
    assert machine.mrs(ICC_CTLR_EL1) & 2
    line = machine.gic.ppi(0, VTIMER)
    line.set(True)
    assert machine.mrs(ICC_IAR1_EL1) == VTIMER
    machine.msr(ICC_EOIR1_EL1, VTIMER)
    assert machine.mrs(ICC_RPR_EL1) == 0xFF
    assert not machine.sinks[0].level
    machine.msr(ICC_DIR_EL1, VTIMER)
    assert machine.sinks[0].level


@pytest.mark.parametrize(
    ("value", "targets"),
    [
        (1 << 1, {1}),
        (0b1011, {0, 1, 3}),
        (1 << 40, set(range(1, 20))),  # IRM: all but the sender
        (1 << 16 | 0b1001, {16, 19}),  # Aff1 1
        (1 << 16 | 0b10000, set()),  # no such CPU
        (1 << 32 | 1, set()),  # Aff2 1
        (1 << 48 | 1, set()),  # Aff3 1
        (1 << 44 | 1, set()),  # RS 1
    ],
)
def test_sgi_targets(value: int, targets: set[int]) -> None:
    machine = Machine(20)
    machine.msr(ICC_SGI1R_EL1, 5 << 24 | value)
    assert {index for index, level in enumerate(machine.levels()) if level} == targets
    for index in targets:
        assert machine.mrs(ICC_IAR1_EL1, index) == 5
        machine.msr(ICC_EOIR1_EL1, 5, index)
    assert not any(machine.levels())


def test_sgi_needs_the_right_group() -> None:
    machine = Machine()
    machine.msr(ICC_SGI0R_EL1, 3 << 24 | 1)
    machine.msr(ICC_ASGI1R_EL1, 3 << 24 | 1)
    assert not machine.sinks[0].level
    machine.msr(ICC_SGI1R_EL1, 3 << 24 | 1)
    assert machine.sinks[0].level


def test_spi_follows_its_route() -> None:
    machine = Machine(18)
    line = machine.gic.spi(1)
    line.set(True)
    assert machine.levels().index(True) == 0
    machine.route(33, 1 << 8 | 1)
    assert [index for index, level in enumerate(machine.levels()) if level] == [17]
    machine.gicd(0x6000 + 8 * 33, 2)  # the low word alone
    assert [index for index, level in enumerate(machine.levels()) if level] == [2]
    machine.route(33, 5 << 8)  # nobody
    assert not any(machine.levels())
    machine.route(33, 1)
    assert machine.mrs(ICC_IAR1_EL1, 1) == 33
    machine.route(33, 0)
    machine.msr(ICC_EOIR1_EL1, 33, 1)  # deactivated on one CPU, pending on the other
    assert [index for index, level in enumerate(machine.levels()) if level] == [0]


def test_one_of_n_picks_one_cpu_that_takes_part() -> None:
    machine = Machine(4)
    for intid in (33, 34, 35):
        machine.route(intid, IRM)
    for number in (1, 2, 3):
        machine.gic.spi(number).set(True)
    assert sum(machine.levels()) == 3
    machine.msr(ICC_IGRPEN1_EL1, 0, 1)
    machine.msr(ICC_IGRPEN1_EL1, 0, 3)
    machine.gicr(2, 0x14, 2)
    assert machine.levels() == [True, False, False, False]
    seen = set()
    for _ in range(3):
        intid = machine.mrs(ICC_IAR1_EL1)
        seen.add(intid)
        machine.gic.spi(intid - 32).set(False)
        machine.msr(ICC_EOIR1_EL1, intid)
    assert seen == {33, 34, 35}
    machine.msr(ICC_IGRPEN1_EL1, 0)
    machine.gic.spi(1).set(True)
    assert not any(machine.levels())
    machine.msr(ICC_IGRPEN1_EL1, 1, 3)
    assert machine.levels() == [False, False, False, True]


def test_one_of_n_goes_by_the_interrupts_group() -> None:
    machine = Machine(2)
    machine.gicd(0, 3)
    machine.msr(ICC_IGRPEN1_EL1, 0, 1)
    machine.msr(ICC_IGRPEN0_EL1, 1, 1)
    machine.route(33, IRM)
    machine.gic.spi(1).set(True)
    assert machine.levels() == [True, False]
    machine.gicd(0x84, ~(1 << 1) & 0xFFFFFFFF)
    assert machine.levels() == [False, False]
    assert machine.mrs(ICC_HPPIR0_EL1, 1) == 33


def test_sleeping_redistributor_still_wakes_its_cpu() -> None:
    machine = Machine()
    machine.gicr(0, 0x14, 2)
    assert machine.gic.redistributors.read(0x14, 4) == 6
    machine.gic.ppi(0, VTIMER).set(True)
    assert machine.sinks[0].level


def test_group_0_signals_nothing_and_can_be_polled() -> None:
    machine = Machine()
    machine.gicd(0, 3)
    machine.gicd(0x84, ~(1 << 1) & 0xFFFFFFFF)  # INTID 33 in group 0
    machine.gic.spi(1).set(True)
    assert machine.mrs(ICC_HPPIR0_EL1) == SPURIOUS
    machine.gic.spi(2).set(True)
    # A group that only ICC_IGRPEN0 disables does not hide the other one (QEMU 7.2 lets it).
    assert machine.sinks[0].level
    assert machine.mrs(ICC_HPPIR1_EL1) == 34
    machine.msr(ICC_IGRPEN0_EL1, 1)
    assert machine.mrs(ICC_HPPIR0_EL1) == 33
    assert not machine.sinks[0].level  # 33 is first, and goes to FIQ
    assert machine.mrs(ICC_IAR1_EL1) == SPURIOUS
    assert machine.mrs(ICC_IAR0_EL1) == 33
    machine.gic.spi(1).set(False)
    machine.msr(ICC_EOIR1_EL1, 33)  # the wrong register: nothing happens
    assert machine.mrs(ICC_RPR_EL1) == 0xA0
    machine.msr(ICC_EOIR0_EL1, 33)
    assert machine.sinks[0].level
    assert machine.mrs(ICC_IAR1_EL1) == 34


def test_eoi_with_the_other_group_running() -> None:
    machine = Machine()
    for register in (ICC_AP0R0_EL1, ICC_AP1R0_EL1):
        machine.msr(register, 1 << 4)
    assert machine.mrs(ICC_RPR_EL1) == 0x20
    machine.msr(ICC_EOIR1_EL1, 33)  # group 0 runs first at the same priority
    assert machine.mrs(ICC_AP1R0_EL1) == 1 << 4
    machine.msr(ICC_EOIR0_EL1, 33)
    assert machine.mrs(ICC_AP0R0_EL1) == 0
    machine.msr(ICC_EOIR1_EL1, 33)
    assert machine.mrs(ICC_RPR_EL1) == 0xFF


def test_priorities_have_five_bits() -> None:
    machine = Machine()
    machine.gicd(0x420, 0xFFFFFFFF)
    assert machine.gic.distributor.read(0x420, 4) == 0xF8F8F8F8
    assert machine.gic.distributor.read(0x423, 1) == 0xF8
    machine.msr(ICC_PMR_EL1, 0xFF)
    assert machine.mrs(ICC_PMR_EL1) == 0xF8
    assert machine.mrs(ICC_CTLR_EL1) >> 8 & 7 == 4


def test_common_binary_point() -> None:
    machine = Machine()
    machine.msr(ICC_BPR0_EL1, 4)
    machine.msr(ICC_BPR1_EL1, 6)
    machine.msr(ICC_CTLR_EL1, 1)
    assert machine.mrs(ICC_BPR1_EL1) == 5
    machine.msr(ICC_BPR1_EL1, 3)  # ignored
    machine.msr(ICC_CTLR_EL1, 0)
    assert machine.mrs(ICC_BPR1_EL1) == 6
    machine.msr(ICC_BPR1_EL1, 0)
    assert machine.mrs(ICC_BPR1_EL1) == 3


def test_undefined_system_registers() -> None:
    gic = Machine().gic
    assert gic.read_sysreg(0, ICC_EOIR1_EL1) is None
    assert gic.read_sysreg(0, ICC_SGI1R_EL1) is None
    assert gic.read_sysreg(0, 0xC645) is None  # AP0R1: needs more priority bits
    assert gic.read_sysreg(0, 0xC000) is None
    assert not gic.write_sysreg(0, ICC_IAR1_EL1, 0)
    assert not gic.write_sysreg(0, 0xC080, 0)
    assert gic.write_sysreg(0, ICC_SRE_EL1, 0)
    assert gic.read_sysreg(0, ICC_SRE_EL1) == 7


@pytest.mark.parametrize("intid", [0, 31, 256, 1019, 1020, 1023, 0xFFFFFF])
def test_stray_eoi_is_ignored(intid: int) -> None:
    machine = Machine()
    machine.msr(ICC_EOIR1_EL1, intid)
    machine.msr(ICC_DIR_EL1, intid)
    assert machine.mrs(ICC_RPR_EL1) == 0xFF


def test_typer_of_the_last_redistributor() -> None:
    machine = Machine(18)
    read = machine.gic.redistributors.read
    typers = [read(index * GICR_STRIDE + 8, 8) for index in range(18)]
    assert [typer >> 4 & 1 for typer in typers] == [0] * 17 + [1]
    assert typers[17] >> 32 == 0x101
    assert read(17 * GICR_STRIDE + 12, 4) == 0x101
    assert machine.gic.redistributors_size == 18 * GICR_STRIDE


def test_reset_keeps_lines_and_tells_the_cpus() -> None:
    machine = Machine()
    machine.gic.spi(1).set(True)
    machine.gic.reset()
    assert not machine.sinks[0].level
    assert machine.gic.distributor.read(0x204, 4) == 2  # the line is still high
    machine.gic.reset_cpu(0)


def test_reset_of_one_cpu_interface() -> None:
    machine = Machine(2)
    machine.gic.ppi(1, VTIMER).set(True)
    machine.gic.reset_cpu(1)
    assert not machine.sinks[1].level
    assert machine.mrs(ICC_PMR_EL1, 1) == 0
    machine.msr(ICC_PMR_EL1, 0xF0, 1)
    machine.msr(ICC_IGRPEN1_EL1, 1, 1)
    assert machine.sinks[1].level
    assert machine.mrs(ICC_PMR_EL1, 0) == 0xF0


def test_restored_controller_signals_what_is_pending() -> None:
    machine = Machine(2)
    machine.edge(40)
    machine.gic.spi(8).pulse()
    machine.gic.ppi(1, VTIMER).set(True)
    state = machine.gic.save()
    twin = Machine(2)
    twin.gic.restore(state)
    assert twin.levels() == [True, True]
    assert twin.mrs(ICC_IAR1_EL1) == 40
    assert twin.mrs(ICC_IAR1_EL1, 1) == VTIMER
    with pytest.raises(ValueError, match="other vCPUs"):
        Machine(1).gic.restore(state)


def test_arguments_are_checked() -> None:
    lock = threading.RLock()
    for vcpus, intids in ((0, 256), (1, 32), (1, 100), (1, 1024)):
        with pytest.raises(ValueError):
            Gicv3(lock, vcpus, intids)
    gic = Gicv3(lock, 2)
    with pytest.raises(ValueError):
        gic.spi(224)
    with pytest.raises(ValueError):
        gic.ppi(0, 15)
    with pytest.raises(ValueError, match="affinity"):
        gic.connect(0, 0x8000_0001, Sink())
