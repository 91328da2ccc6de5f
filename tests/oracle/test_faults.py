"""Data accesses that fault: at the end of mapped memory against Unicorn, misaligned ones against the Arm ARM."""

from __future__ import annotations

import random
from itertools import islice

import pytest

from tests.oracle.cases import (
    Case,
    Row,
    Table,
    Values,
    is_atomic,
    is_exclusive,
    is_memory,
    is_vector,
)
from tests.oracle.compare import Comparison
from tests.oracle.exceptions import skip_of_case, skip_of_row
from tests.oracle.machine import BASE, END, PROGRAMS_MIDDLE, SCRATCH, Outcome, Registers
from tests.oracle.sequences import is_literal, is_monitored
from tests.oracle.subject import SCTLR

pytestmark = pytest.mark.oracle


def is_store_exclusive(word: int) -> bool:
    """STXR, STXP and their releasing forms."""
    return is_monitored(word) and word >> 22 & 1 == 0


#: All but literals, which cannot be aimed, and store exclusives, which access nothing while the monitor is open.
MEMORY_ROWS = [
    row
    for row in Table().rows
    if is_memory(row.value) and not is_literal(row.value) and not is_store_exclusive(row.value)
]
DATA_ABORT, SP_ALIGNMENT = 0x25, 0x26  # ESR_EL1.EC
TRANSLATION_LEVEL_2, ALIGNMENT = 0b000110, 0b100001  # DFSC (D17.2.37)
PAGE = 4096


def at_the_end(row: Row, word: int, values: Values, rng: random.Random) -> Case:
    """An access that ends at, crosses or begins at the end of memory, give or take what the encoding adds."""
    before = values.registers(0)
    before.x = [value if rng.random() < 0.5 else rng.randrange(64) for value in before.x]
    steady = is_exclusive(word) or is_atomic(word)
    address = END - rng.randrange(-16, 80)
    if steady or word >> 5 & 31 == 31:
        address &= ~15
    if word >> 5 & 31 == 31:
        before.sp = address
    else:
        before.x[word >> 5 & 31] = address
    return Case(row.name, [word], before, memory=True, vectors=is_vector(word))


@pytest.mark.parametrize("row", MEMORY_ROWS, ids=[row.name for row in MEMORY_ROWS])
def test_access_at_the_end_of_memory(comparison: Comparison, row: Row, pytestconfig: pytest.Config) -> None:
    """The same accesses fault, and none has changed a register; a pair that crosses has not stored its first half."""
    if skip_of_row(row.name) is not None:
        pytest.skip("not compared")
    rng = random.Random(f"{pytestconfig.getoption('--oracle-seed')} end {row.name}")
    values = Values(rng)
    words = islice(comparison.table.words(row, rng), pytestconfig.getoption("--oracle-cases"))
    comparison.reset_scratch(rng)
    cases = [at_the_end(row, word, values, rng) for word in words]
    report = comparison.run(case for case in cases if skip_of_case(case) is None)
    assert not report.mismatches, "\n".join(map(str, report.mismatches))
    assert report.compared


@pytest.mark.parametrize(
    ("word", "at", "far"),
    [
        (0xF9400001, END - 4, END),  # ldr x1, [x0]
        (0xF9000001, END - 4, END),  # str x1, [x0]
        (0xF9400001, END, END),
        (0xF9400001, END + 0x123, END + 0x123),
        (0xA9400801, END - 8, END),  # ldp x1, x2, [x0]
        (0xA9000801, END - 8, END),  # stp x1, x2, [x0]
        (0xA9C10801, END - 24, END),  # ldp x1, x2, [x0, #16]!
        (0xA8810801, END - 8, END),  # stp x1, x2, [x0], #16
        (0x3DC00001, END - 8, END),  # ldr q1, [x0]
        (0x3D800001, END - 8, END),  # str q1, [x0]
        (0xAD000801, END - 16, END),  # stp q1, q2, [x0]
        (0x4C002001, END - 48, END),  # st1 {v1.16b-v4.16b}, [x0]
        (0x4CDF2001, END - 48, END),  # ld1 {v1.16b-v4.16b}, [x0], #64
        (0x4C000001, END - 32, END),  # st4 {v1.16b-v4.16b}, [x0]
    ],
)
def test_fault_is_precise(comparison: Comparison, word: int, at: int, far: int) -> None:
    """FAR is the first byte that faults, the syndrome says how, and neither registers nor memory have changed."""
    last_page = slice(END - PAGE - BASE, END - BASE)
    contents = random.Random(1).randbytes(PAGE)
    comparison.subject.ram[last_page] = contents
    before = registers(at)
    result = comparison.alone([word], before)
    assert result.outcome is Outcome.FAULT
    assert result.far == far
    assert result.esr >> 26 == DATA_ABORT
    assert result.esr & 0x3F == TRANSLATION_LEVEL_2
    assert result.esr >> 6 & 1 == (word >> 22 & 1 == 0)  # WnR: bit 22 is L in all of these
    assert result.pc == PROGRAMS_MIDDLE
    assert (result.x, result.v) == (before.x, before.v)
    assert comparison.subject.ram[last_page] == contents


@pytest.mark.parametrize(
    ("word", "size"),
    [
        (0x485F7C01, 2),  # ldxrh w1, [x0]
        (0xC85F7C01, 8),  # ldxr x1, [x0]
        (0xC85FFC01, 8),  # ldaxr x1, [x0]
        (0xC87F0801, 16),  # ldxp x1, x2, [x0]
        (0x887F0801, 8),  # ldxp w1, w2, [x0]
        (0x88DFFC01, 4),  # ldar w1, [x0]
        (0xC8DFFC01, 8),  # ldar x1, [x0]
        (0x889FFC01, 4),  # stlr w1, [x0]
        (0xF8BFC001, 8),  # ldapr x1, [x0]
        (0xF8210002, 8),  # ldadd x1, x2, [x0]
        (0x78218002, 2),  # swph w1, w2, [x0]
        (0xC8A17C02, 8),  # cas x1, x2, [x0]
        (0x48227C04, 16),  # casp x2, x3, x4, x5, [x0]
    ],
)
def test_exclusives_and_atomics_must_be_aligned(comparison: Comparison, word: int, size: int) -> None:
    """Whatever SCTLR_EL1.A says (B2.5.2), when the access leaves its aligned 16 bytes or FEAT_LSE2 is not there."""
    for misalignment in (1, size // 2, size - 1):
        before = registers(SCRATCH + 0x100 + misalignment)
        result = comparison.alone([word], before)
        assert result.outcome is Outcome.FAULT
        assert result.esr & 0x3F == ALIGNMENT
        assert result.far == before.x[0]
        assert result.x == before.x
    aligned = comparison.alone([word], registers(SCRATCH + 0x100))
    assert aligned.outcome is Outcome.DONE


@pytest.mark.parametrize(
    "word",
    [
        0xF94003E1,  # ldr x1, [sp]
        0xF90003E1,  # str x1, [sp]
        0xA9BF7BFD,  # stp x29, x30, [sp, #-16]!
        0xF8408FE1,  # ldr x1, [sp, #8]!
        0x3DC003E1,  # ldr q1, [sp]
        0xC85F7FE1,  # ldxr x1, [sp]
        0x4C407FE1,  # ld1 {v1.2d}, [sp]
    ],
)
def test_stack_alignment(comparison: Comparison, word: int) -> None:
    """SCTLR_EL1.SA checks SP, not the address (D1.8.2)."""
    subject = comparison.subject
    sctlr = subject.vcpu.get_sysreg(SCTLR)
    subject.vcpu.set_sysreg(SCTLR, sctlr | 1 << 3)
    try:
        before = registers(0)
        before.sp = SCRATCH + 0x108
        result = comparison.alone([word], before)
        assert (result.esr >> 26, result.pc) == (SP_ALIGNMENT, PROGRAMS_MIDDLE)
        assert (result.x, result.sp, result.v) == (before.x, before.sp, before.v)
        before.sp = SCRATCH + 0x100
        assert comparison.alone([word], before).outcome is Outcome.DONE
    finally:
        subject.vcpu.set_sysreg(SCTLR, sctlr)


def registers(x0: int) -> Registers:
    """A state in which every register shows a change."""
    x = [0x1111_0000_0000 + n for n in range(31)]
    x[0] = x0
    return Registers(x, sp=SCRATCH, nzcv=0, v=random.Random(2).randbytes(512))
