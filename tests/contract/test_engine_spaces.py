"""Address spaces that come and go: after TLBI no engine may still know what was, whichever space is the current one.

A guest switches between more address spaces than an engine keeps apart, and reads and runs a page in each, by random.
What it sees must be what the tables say, or have said since the last TLBI that covers it (D8.13).
"""

from __future__ import annotations

import mmap
import random
from collections.abc import Callable

import pytest

from avmm.hypervisor import Reg, sysreg
from avmm.memory import GRANULE, Region
from tests.contract.test_engine_abi import ELR_EL1, HVC, RAM, VECTORS, Guest, boot, engine
from tests.contract.test_engine_smp import MAIR_EL1, SCTLR_EL1, TCR_EL1

__all__ = ["boot", "engine"]  # fixtures

SPSR_EL1 = sysreg(3, 0, 4, 0, 0)
EL0T_MASKED = 0x3C0
TABLES = 0x8000_0000
SPACES, PAGES, CONTENTS = 9, 4, 8  # of each space's pages the last is global
CONTENT = TABLES + SPACES * 0x3000
LOWER_SYNC = 0x400

MSR_TTBR0_X1, ISB, ERET, DSB = 0xD5182001, 0xD5033FDF, 0xD69F03E0, 0xD5033B9F
MSR_TCR_X7, LDR_X6_X0 = 0xD5182047, 0xF9400006
LDTR_X6_X0, MOVZ_X5, SVC = 0xF8400806, 0xD2800005, 0xD4000001
SET_TCR, LOAD = RAM + 0x800, RAM + 0x80C  # code of the guest
WORD = 0x100  # where a content's page has its number, besides the code that tells it

VMALLE1, VAE1, ASIDE1, VAAE1, VALE1, VAALE1 = 0, 1, 2, 3, 5, 7
#: Which instruction, and is it broadcast?
TLBI = [(op, shareable) for op in (VMALLE1, VAE1, ASIDE1, VAAE1, VALE1, VAALE1) for shareable in (False, True)]

BLOCK, PAGE, TABLE = 1, 3, 3
SHAREABLE, ACCESSED, EL0_READS, NOT_GLOBAL = 3 << 8, 1 << 10, 3 << 6, 1 << 11
UXN, PXN = 1 << 54, 1 << 53

#: TCR_EL1: 39 bits and 4 KiB below, nothing above; and with the same above, where TG1's 4 KiB is 2.
T0SZ, T1SZ, EPD1, A1, TBI0 = 25, 25 << 16, 1 << 23, 1 << 22, 1 << 37
TCR = T0SZ | 1 << 8 | 1 << 10 | 3 << 12 | EPD1 | 2 << 32
TCR_BOTH = TCR & ~EPD1 | T1SZ | 1 << 24 | 1 << 26 | 3 << 28 | 2 << 30
UPPER = 0xFFFF_FF80_0000_0000
TTBR1_EL1 = sysreg(3, 0, 2, 0, 1)


class Spaces:
    """The guest, its tables, and what it may see in each page of each space."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        size = -(-(CONTENT - TABLES + CONTENTS * 0x1000) // GRANULE) * GRANULE
        self.region = Region(TABLES, mmap.mmap(-1, size))
        guest.hypervisor.map(self.region)
        for number in range(CONTENTS):
            self.store(CONTENT + 0x1000 * number, (MOVZ_X5 | number << 5) | SVC << 32)
            self.store(CONTENT + 0x1000 * number + WORD, number)
        self.now = [[0] * PAGES for _ in range(SPACES)]
        self.may = [[{0} for _ in range(PAGES)] for _ in range(SPACES)]
        for space in range(SPACES):
            level1 = TABLES + 0x3000 * space
            self.store(level1, (level1 + 0x1000) | TABLE)
            self.store(level1 + 8, RAM & -(1 << 30) | BLOCK | SHAREABLE | ACCESSED | UXN)
            self.store(level1 + 0x1000, (level1 + 0x2000) | TABLE)
            for page in range(PAGES):
                self.describe(space, page, 0)
        guest.poke(VECTORS + LOWER_SYNC, LDTR_X6_X0, HVC)
        for index, (op, shareable) in enumerate(TLBI):
            register = 31 if op == VMALLE1 else 4
            word = 0xD5088000 | (3 if shareable else 7) << 8 | op << 5 | register
            guest.poke(RAM + 0x100 + 0x20 * index, word, DSB, ISB, HVC)
        guest.poke(SET_TCR, MSR_TCR_X7, ISB, HVC, LDR_X6_X0, HVC)
        for register, value in (
            (MAIR_EL1, 0xFF),
            (TCR_EL1, TCR),
            (sysreg(3, 0, 2, 0, 0), self.ttbr(0)),
            (SCTLR_EL1, 0x30D0_0800 | 1 << 12 | 1 << 2 | 1),
        ):
            guest.vcpu.set_sysreg(register, value)

    def store(self, gpa: int, value: int) -> None:
        self.region.buffer[gpa - TABLES : gpa - TABLES + 8] = value.to_bytes(8, "little")

    def ttbr(self, space: int) -> int:
        """TTBR0_EL1, with an ASID for each."""
        return TABLES + 0x3000 * space | (space + 1) << 48

    def describe(self, space: int, page: int, content: int) -> None:
        flags = PAGE | SHAREABLE | ACCESSED | EL0_READS | PXN | (NOT_GLOBAL if page < PAGES - 1 else 0)
        self.store(TABLES + 0x3000 * space + 0x2000 + 8 * (page + 1), (CONTENT + 0x1000 * content) | flags)
        self.now[space][page] = content
        self.may[space][page].add(content)

    def change(self, space: int, page: int, content: int) -> None:
        """A new page there; where it is global, everywhere."""
        for other in range(SPACES) if page == PAGES - 1 else [space]:
            self.describe(other, page, content)

    def tlbi(self, index: int, space: int, page: int) -> None:
        op, _ = TLBI[index]
        self.guest.run(RAM + 0x100 + 0x20 * index, {4: (space + 1) << 48 | page + 1})
        for s in range(SPACES):
            for p in range(PAGES):
                is_global = p == PAGES - 1
                by_asid = s == space or is_global
                covered = {VMALLE1: True, ASIDE1: s == space and not is_global, VAAE1: p == page, VAALE1: p == page}
                if covered.get(op, p == page and by_asid):
                    self.may[s][p] = {self.now[s][p]}

    def visit(self, space: int, page: int, switch: bool = True) -> None:
        """Read and run the page; without ``switch`` TTBR0 must already be the space's, and is not written."""
        va = 0x1000 * (page + 1)
        vcpu = self.guest.vcpu
        vcpu.set_sysreg(ELR_EL1, va)
        vcpu.set_sysreg(SPSR_EL1, EL0T_MASKED)
        self.guest.run(RAM if switch else RAM + 4, {0: va + WORD, 1: self.ttbr(space)})
        assert vcpu.get_reg(5) in self.may[space][page], (space, page)
        assert vcpu.get_reg(6) in self.may[space][page], (space, page)

    def misses(self) -> int:
        return self.guest.vcpu.counters().get("tlb_misses", 0)


@pytest.fixture
def spaces(boot: Callable[..., Guest]) -> Spaces:
    return Spaces(boot(MSR_TTBR0_X1, ISB, ERET))


@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_seen_that_was_forgotten(spaces: Spaces, seed: int) -> None:
    dice = random.Random(seed)
    some = dice.sample(range(SPACES), 3)  # which are come back to often
    for _ in range(3000):
        space = dice.choice(some) if dice.random() < 0.8 else dice.randrange(SPACES)
        page = dice.randrange(PAGES)
        match dice.randrange(8):
            case 0:
                spaces.change(space, page, dice.randrange(CONTENTS))
            case 1:
                spaces.tlbi(dice.randrange(len(TLBI)), space, page)
            case _:
                spaces.visit(space, page)


def test_coming_back_costs_no_walk(spaces: Spaces) -> None:
    """But EL1's own two pages of code, which are in TTBR0's half here and not kept."""
    before = 0
    for _ in range(3):  # the last time all is warm
        before = spaces.misses()
        for space in range(3):
            for page in range(PAGES):
                spaces.visit(space, page)
    assert spaces.misses() - before <= 3 * 2


@pytest.mark.parametrize("op", [VAE1, ASIDE1])
def test_the_asid_is_of_the_table_that_tcr_names(spaces: Spaces, op: int) -> None:
    """By A1 it becomes TTBR1's: since then what is seen has that ASID, and TLBI by it forgets it (D8.13.3)."""
    upper = SPACES  # a number of space whose ASID no space has
    spaces.guest.vcpu.set_sysreg(TTBR1_EL1, spaces.ttbr(upper))
    spaces.visit(0, 0)
    spaces.guest.run(SET_TCR, {7: TCR | A1})
    spaces.visit(0, 0, switch=False)
    spaces.change(0, 0, 1)
    spaces.tlbi(TLBI.index((op, False)), upper, 0)
    spaces.may[0][0] = {1}
    spaces.visit(0, 0, switch=False)


@pytest.mark.parametrize(
    ("before", "after", "va"),
    [
        pytest.param(TCR_BOTH, TCR_BOTH | EPD1, UPPER, id="EPD1"),
        pytest.param(TCR_BOTH, TCR_BOTH & ~T1SZ | 32 << 16, UPPER, id="T1SZ"),
        pytest.param(TCR | TBI0, TCR, 0x5A << 56, id="TBI0"),
    ],
)
def test_what_tcr_no_longer_allows_is_a_fault(spaces: Spaces, before: int, after: int, va: int) -> None:
    """At once, as it was seen a moment ago: of a global page, which no change of ASID makes an engine forget."""
    spaces.guest.vcpu.set_sysreg(TTBR1_EL1, spaces.ttbr(0))
    va += 0x1000 * PAGES + WORD
    loaded, fault = LOAD + 8, VECTORS + 0x200 + 4
    for tcr, ends_at in (before, loaded), (after, fault), (before, loaded):
        spaces.guest.run(SET_TCR, {7: tcr})
        spaces.guest.run(LOAD, {0: va})
        assert spaces.guest.vcpu.get_reg(Reg.PC) == ends_at, hex(tcr)
