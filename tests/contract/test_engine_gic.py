"""The GIC inside the engine, register access by register access, against ours outside, which QEMU's has judged."""

from __future__ import annotations

import mmap
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from avmm.devices.gicv3 import Gicv3
from avmm.devices.gicv3 import cpu_interface as icc
from avmm.hypervisor import ExitKind, Reg, Vcpu, open_hypervisor
from avmm.irq import IrqChip
from avmm.memory import Region

RAM, GICD, GICR, STRIDE = 0x4000_0000, 0x0800_0000, 0x080A_0000, 0x2_0000
HVC = 0xD4000002
ISR_EL1, MPIDR_EL1 = 0xC608, 0xC005
EL1H_MASKED = 0x3C5
VBAR_EL1, ESR_EL1 = 0xC600, 0xC290

#: What the guest does: one instruction each, with the address in x0 and the value in x1.
LOADS = {1: 0x39400001, 2: 0x79400001, 4: 0xB9400001, 8: 0xF9400001}
STORES = {1: 0x39000001, 2: 0x79000001, 4: 0xB9000001, 8: 0xF9000001}
READ = [
    icc.ICC_PMR_EL1, icc.ICC_IAR0_EL1, icc.ICC_HPPIR0_EL1, icc.ICC_BPR0_EL1, icc.ICC_AP0R0_EL1, icc.ICC_AP1R0_EL1,
    icc.ICC_RPR_EL1, icc.ICC_IAR1_EL1, icc.ICC_HPPIR1_EL1, icc.ICC_BPR1_EL1, icc.ICC_CTLR_EL1, icc.ICC_SRE_EL1,
    icc.ICC_IGRPEN0_EL1, icc.ICC_IGRPEN1_EL1,
]  # fmt: skip
UNDEFINED_READ, UNDEFINED_WRITE = [icc.ICC_EOIR1_EL1, icc.ICC_DIR_EL1], [icc.ICC_IAR1_EL1, icc.ICC_RPR_EL1]


def mrs(encoding: int) -> int:
    return 0xD5200001 | (encoding & 0xFFFF) << 5


def msr(encoding: int) -> int:
    return 0xD5000001 | (encoding & 0xFFFF) << 5


class Sink:
    """The vCPU's end of our own GIC: it takes no offer."""

    def irq_changed(self, level: bool) -> None: ...

    def stir(self) -> None: ...

    def offer(self, intid: int) -> None: ...

    def retract(self) -> bool:
        return False


class Both:
    """Two vCPUs with the engine's GIC, and ours with the same done to it."""

    def __init__(self) -> None:
        self.hypervisor = open_hypervisor("softhv,interpreter")
        self.region = Region(RAM, mmap.mmap(-1, 0x10000))
        self.hypervisor.map(self.region)
        self.chip: IrqChip = self.hypervisor.gic(GICD, GICR)
        self.threads = [ThreadPoolExecutor(1) for _ in range(2)]
        self.vcpus = [self.on(index, partial(self._vcpu, index)) for index in range(2)]
        self.ours = Gicv3(threading.RLock(), 2)
        for index in range(2):
            self.ours.connect(index, 0x8000_0000 | index, Sink())
        self.programs: dict[int, int] = {}

    def on(self, index: int, call: Callable[[], Vcpu]) -> Vcpu:
        return self.threads[index].submit(call).result()

    def _vcpu(self, index: int) -> Vcpu:
        vcpu = self.hypervisor.create_vcpu()
        vcpu.set_sysreg(MPIDR_EL1, 0x8000_0000 | index)
        vcpu.set_sysreg(VBAR_EL1, RAM + 0x8000)
        return vcpu

    def do(self, index: int, instruction: int, x0: int = 0, x1: int = 0) -> int | None:
        """Have vCPU ``index`` run it; x1 then, None when it is undefined."""
        at = self.programs.setdefault(instruction, RAM + 8 * len(self.programs))
        for where, word in (at, instruction), (at + 4, HVC), (RAM + 0x8200, HVC):
            self.region.buffer[where - RAM : where - RAM + 4] = word.to_bytes(4, "little")
        return self.threads[index].submit(self._do, self.vcpus[index], at, x0, x1).result()

    def _do(self, vcpu: Vcpu, at: int, x0: int, x1: int) -> int | None:
        vcpu.set_reg(Reg.CPSR, EL1H_MASKED)
        vcpu.set_reg(0, x0)
        vcpu.set_reg(1, x1)
        vcpu.set_reg(Reg.PC, at)
        assert vcpu.run() == ExitKind.HVC
        if vcpu.get_reg(Reg.PC) == RAM + 0x8204:
            assert vcpu.get_sysreg(ESR_EL1) >> 26 == 0
            return None
        return vcpu.get_reg(1)

    def store(self, index: int, base: int, at: int, size: int, value: int) -> None:
        """A store by vCPU ``index`` into a window of the GIC's."""
        self.do(index, STORES[size], base + at, value)
        (self.ours.distributor if base == GICD else self.ours.redistributors).write(at, size, value)

    def msr(self, index: int, register: int, value: int) -> None:
        """Write an ICC register of vCPU ``index``."""
        self.do(index, msr(register), x1=value)
        assert self.ours.write_sysreg(index, register, value)

    def order(self) -> None:
        """A state in which interrupts come, whatever there was before."""
        self.store(0, GICD, 0, 4, 3)
        for index in range(2):
            self.store(index, GICR, STRIDE * index + 0x14, 4, 0)  # awake
            frame = STRIDE * index + 0x1_0000
            for base, at in (GICR, frame), (GICD, 4):
                self.store(index, base, at + 0x080, 4, 0xFFFFFFFF)  # group 1
                self.store(index, base, at + 0x100, 4, 0xFFFFFFFF)  # enabled
                self.store(index, base, at + 0x380, 4, 0xFFFFFFFF)  # not active
            for register in icc.ICC_AP0R0_EL1, icc.ICC_AP1R0_EL1, icc.ICC_CTLR_EL1:
                self.msr(index, register, 0)
            self.msr(index, icc.ICC_PMR_EL1, 0xFF)
            self.msr(index, icc.ICC_IGRPEN1_EL1, 1)

    def irq(self, index: int) -> bool:
        value = self.do(index, mrs(ISR_EL1))
        assert value is not None
        return bool(value & 0x80)

    def close(self) -> None:
        for thread, vcpu in zip(self.threads, self.vcpus, strict=True):
            thread.submit(vcpu.close).result()
            thread.shutdown()
        self.hypervisor.close()
        self.region.buffer.close()


def offset(chance: random.Random) -> int:
    """Where something is, in a distributor or an SGI frame, mostly of the first 64 INTIDs."""
    bank = chance.choice([0x080, 0x100, 0x180, 0x200, 0x280, 0x300, 0x380])
    return chance.choice(
        [
            bank + 4 * chance.randrange(2),
            bank + 4 * chance.randrange(32),
            0x400 + 4 * chance.randrange(16),
            0x400 + chance.randrange(64),
            0xC00 + 4 * chance.randrange(4),
        ]
    )


def step(both: Both, chance: random.Random) -> str:
    """Do one thing to both and compare what it gives."""
    ours, index = both.ours, chance.randrange(2)
    what = chance.choice(["gicd", "gicr", "router", "spi", "write", "write", "read", "ack", "ack", "sgi", "undefined"])
    value = chance.choice([0, 1, 0xFFFFFFFF, chance.getrandbits(32), 1 << chance.randrange(32), chance.getrandbits(64)])
    if what == "spi":
        number, level = chance.randrange(40), bool(chance.randrange(2))
        both.chip.spi(number).set(level)
        ours.spi(number).set(level)
        return f"spi {number} {level}"
    if what in ("gicd", "gicr", "router"):
        at = offset(chance)
        size = 1 if 0x400 <= at < 0x800 and at & 3 else chance.choice([4, 4, 4, 1])
        if what == "router":
            at, size = 0x6000 + 8 * chance.randrange(30, 70), 8
            value = chance.choice([0, 1, 2, 1 << 31, 1 << 31, value])
        elif chance.random() < 0.1:
            at, size = chance.choice([(0x0, 4), (0x4, 4), (0x8, 8), (0x14, 4), (0xFFE8, 4), (0xFFE0, 4)])
            value = chance.choice([0, 3, 3, 3, value])
        base = GICD
        if what == "gicr":
            at += STRIDE * chance.randrange(2) + chance.choice([0x1_0000, 0x1_0000, 0])
            base = GICR
        if chance.randrange(4) == 0:
            found = both.do(index, LOADS[size], base + at)
            expected = (ours.distributor if base == GICD else ours.redistributors).read(at, size)
            assert found == expected, (what, hex(at), size)
            return f"read {what} {at:#x} {size}"
        value &= (1 << 8 * size) - 1
        both.store(index, base, at, size, value)
        return f"write {what} {at:#x} {size} {value:#x}"
    if what == "undefined":
        assert both.do(index, mrs(chance.choice(UNDEFINED_READ))) is None
        assert both.do(index, msr(chance.choice(UNDEFINED_WRITE))) is None
        return what
    if what in ("read", "ack"):
        register = icc.ICC_IAR1_EL1 if what == "ack" else chance.choice(READ)
        found = both.do(index, mrs(register))
        assert found == ours.read_sysreg(index, register), hex(register)
        if what == "ack" and found is not None and found < 1020 and chance.randrange(3):
            both.msr(index, icc.ICC_EOIR1_EL1, found)
        return f"{what} {register:#x} {found}"
    register = {
        "sgi": chance.choice([icc.ICC_SGI1R_EL1, icc.ICC_SGI0R_EL1]),
        "write": chance.choice(
            [
                icc.ICC_PMR_EL1, icc.ICC_BPR0_EL1, icc.ICC_BPR1_EL1, icc.ICC_CTLR_EL1, icc.ICC_IGRPEN0_EL1,
                icc.ICC_IGRPEN1_EL1, icc.ICC_EOIR0_EL1, icc.ICC_EOIR1_EL1, icc.ICC_DIR_EL1, icc.ICC_AP0R0_EL1,
                icc.ICC_AP1R0_EL1, icc.ICC_SRE_EL1, icc.ICC_ASGI1R_EL1,
            ]
        ),
    }[what]  # fmt: skip
    if register == icc.ICC_PMR_EL1:
        value = chance.choice([0xFF, 0xF8, value])
    elif register in (icc.ICC_IGRPEN0_EL1, icc.ICC_IGRPEN1_EL1):
        value = chance.choice([1, 1, 1, 0])
    elif register in (icc.ICC_AP0R0_EL1, icc.ICC_AP1R0_EL1):
        value = chance.choice([0, value])
    elif register in (icc.ICC_EOIR0_EL1, icc.ICC_EOIR1_EL1, icc.ICC_DIR_EL1):
        value = chance.choice([chance.randrange(64), value])
    elif what == "sgi":
        value = chance.randrange(16) << 24 | chance.randrange(4) | chance.choice([0, 0, 1 << 40])
    both.msr(index, register, value)
    return f"msr {register:#x} {value:#x}"


@pytest.mark.parametrize("seed", range(8))
def test_the_engine_s_gic_is_ours(seed: int) -> None:
    """Both give every read the same answer and raise the same vCPU's IRQ input, whatever is written to them."""
    chance = random.Random(seed)
    both = Both()
    done: list[str] = []
    taken = 0
    try:
        for number in range(1500):
            if number % 25 == 0:
                both.order()
            done.append(step(both, chance))
            taken += done[-1].startswith("ack") and not done[-1].endswith("1023")
            for index in range(2):
                level = both.ours.cpus[index].irq
                assert both.irq(index) is level, done[-8:]
    finally:
        both.close()
    assert taken > 50  # or nothing has been compared
