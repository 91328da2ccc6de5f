"""What the compiler keeps from one instruction to the next: the SHA-256 state, addends of accesses, what set NZCV."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from avmm.memory import GRANULE
from tests.oracle.cases import Case, Values
from tests.oracle.compare import Comparison
from tests.oracle.machine import BASE, END, SCRATCH, Outcome

pytestmark = pytest.mark.oracle

PAGE = 4096
DIFFERENT, CROSSING, MISSING = 26, 27, 28  # x registers: an address in a page of its own, at the end of one, of none
ROUNDS, OTHER_ROUNDS = 0x5E004000, 0x5E005000  # SHA256H, SHA256H2
OF_THREE = [
    *(ROUNDS, OTHER_ROUNDS, 0x5E006000),  # and SHA256SU1
    *(0x5E000000, 0x5E001000, 0x5E002000, 0x5E003000),  # SHA1C, SHA1P, SHA1M, SHA1SU0
    *(0x4EA08400, 0x6E201C00, 0x6EE08400, 0x4EA01C00),  # ADD .4S, EOR, SUB .2D, ORR
]
OF_TWO = [
    *(0x5E282800, 0x5E280800, 0x5E281800),  # SHA256SU0, SHA1H, SHA1SU1
    *(0x6E200800, 0x4E200800, 0x4EA00800, 0x4E201800, 0x2E200800),  # REV32, REV64 (.16B, .4S), REV16, REV32 .8B
    *(0x4E284800, 0x4E286800),  # AESE, AESMC
    *(0x4E002000, 0x6E303800),  # TBL and UADDLV, which are calls
]
OTHERS = [
    0x4E081C00,  # MOV Vd.D[0], Xn
    0x4C407000 | DIFFERENT << 5,  # LD1 .16B, a call that ends all copies
    0x5F20E400,  # SCVTF Dd, Dn, #32, another
    0x3DC00000 | DIFFERENT << 5,  # LDR Qd
    0x3D800000 | DIFFERENT << 5,  # STR Qd
    0x3DC00000 | CROSSING << 5,
    0x6D400000 | CROSSING << 5 | 7 << 10,  # LDP Dd, D7
    0xB4000040,  # CBZ Xd, over the next one
]


def rounds(rng: random.Random, registers: int) -> list[int]:
    """Four rounds as a compiler writes them, with something between and registers that may be the same."""
    abcd, efgh, words, copy = (rng.randrange(registers) for _ in range(4))
    move = 0x4EA01C00 | abcd << 16 | abcd << 5 | copy
    both = [ROUNDS | words << 16 | efgh << 5 | abcd, OTHER_ROUNDS | words << 16 | copy << 5 | efgh]
    if rng.random() < 0.3:
        both.reverse()
    program = [move, *both]
    while rng.random() < 0.4:
        program.insert(rng.randrange(4), other(rng, registers))
    return program


def other(rng: random.Random, registers: int) -> int:
    d, n, m = (rng.randrange(registers) for _ in range(3))
    kind = rng.random()
    if kind < 0.5:
        return rng.choice(OF_THREE) | m << 16 | n << 5 | d
    if kind < 0.7:
        return rng.choice(OF_TWO) | n << 5 | d
    return rng.choice(OTHERS) | d


def sha(rng: random.Random, values: Values) -> Case:
    """Halves of rounds that belong together and such that do not, with calls, faults and branches among them."""
    registers = rng.choice((3, 4, 8, 16))
    words: list[int] = []
    while len(words) < 40:
        words += rounds(rng, registers) if rng.random() < 0.6 else [other(rng, registers)]
        if rng.random() < 0.005:
            words.append(0x3DC00000 | MISSING << 5)
    words.append(0xD503201F)  # NOP, for a branch to end at
    before = values.registers(0)
    before.x[DIFFERENT] = SCRATCH + 16 * rng.randrange(PAGE // 16)
    before.x[CROSSING] = SCRATCH + PAGE * rng.randrange(1, 8) - rng.randrange(1, 16)
    before.x[MISSING] = END
    return Case("sha", words, before, memory=True, vectors=True, straight=False)


def indexed(rng: random.Random, values: Values) -> Case:
    """Accesses of a base and an index, of one address often, of every size, across pages and to where nothing is."""
    bases, indexes = (DIFFERENT, CROSSING), (20, 21, 22)
    words: list[int] = []
    while len(words) < 30:
        base, index, register = rng.choice(bases), rng.choice(indexes), rng.randrange(4)
        what = rng.random()
        if what < 0.75:  # LDR or STR of a size, with UXTW, LSL or SXTW of the index, scaled or not
            loads, size, extend = rng.randrange(2), rng.randrange(4), rng.choice((2, 3, 3, 3, 6))
            scaled = rng.randrange(2) << 12
            word = 0x38200800 | size << 30 | loads << 22 | index << 16 | extend << 13 | scaled | base << 5
            words.append(word | (rng.choice(indexes) if loads and rng.random() < 0.05 else register))
            if rng.random() < 0.5:  # and back, as in x[i] += y
                words += [0x0B000000 | register << 5 | register, word & ~(1 << 22) | register]
        elif what < 0.85:
            words.append(0x91000400 | index << 5 | index)  # ADD Xn, Xn, #1
        elif what < 0.95:
            words.append(0xD50B7420 | base)  # DC ZVA
        else:
            words.append(0xF8616840 if rng.random() < 0.1 else 0xEB000000 | base << 5 | 31)  # LDR X0, [X2, X1]; CMP
    before = values.registers(0)
    before.x[DIFFERENT] = SCRATCH + rng.randrange(PAGE)
    before.x[CROSSING] = SCRATCH + GRANULE * rng.randrange(1, 4) - rng.randrange(1, 80)
    for index in indexes:
        before.x[index] = rng.choice((0, 1, 6, rng.randrange(16), rng.randrange(2 * PAGE)))
    if rng.random() < 0.2:
        before.x[rng.choice(indexes)] = rng.choice((END - SCRATCH, -2 & (1 << 64) - 1, 1 << 40 | 5))
    return Case("indexed", words, before, memory=True, vectors=False)


def flags(rng: random.Random, values: Values) -> Case:
    """What sets NZCV, then changes of its operands and loads, which spoil the host's flags, then what wants NZCV."""
    words: list[int] = []
    while len(words) < 40:
        d, n, m = (rng.choice((0, 1, 2, 3, 31)) for _ in range(3))
        registers, wide = m << 16 | n << 5 | d, rng.randrange(2) << 31
        what = rng.random()
        if what < 0.3:  # ADDS, SUBS, ANDS
            words.append(rng.choice((0x2B000000, 0x6B000000, 0x6A000000)) | wide | registers)
        elif what < 0.4:  # ADDS, SUBS of an immediate
            words.append(rng.choice((0x31000000, 0x71000000)) | wide | rng.randrange(4) << 10 | (n & 3) << 5 | d)
        elif what < 0.6:  # LDR, or EOR
            words.append(rng.choice((0xF9400000 | DIFFERENT << 5 | d, 0xCA000000 | registers)))
        elif what < 0.75:  # ADC, SBC, ADCS, SBCS
            words.append(rng.choice((0x1A000000, 0x5A000000, 0x3A000000, 0x7A000000)) | wide | registers)
        elif what < 0.9:  # CSEL, CSINC
            words.append(rng.choice((0x1A800000, 0x1A800400)) | wide | rng.randrange(14) << 12 | registers)
        else:  # B.cond, CBZ over the next one
            words.append(rng.choice((0x54000040 | rng.randrange(14), 0xB4000040 | d)))
    words += [0xD503201F, 0xF9400000 | (MISSING if rng.random() < 0.2 else DIFFERENT) << 5]  # NOP, LDR X0
    before = values.registers(0)
    before.x[DIFFERENT] = SCRATCH + 16 * rng.randrange(PAGE // 16)
    before.x[MISSING] = END
    return Case("flags", words, before, memory=True, vectors=False, straight=False)


@pytest.mark.parametrize("make", [sha, indexed, flags])
def test_in_programs(
    comparison: Comparison, pytestconfig: pytest.Config, make: Callable[[random.Random, Values], Case]
) -> None:
    rng = random.Random(f"{pytestconfig.getoption('--oracle-seed')} {make.__name__}")
    values = Values(rng)
    comparison.reset_scratch(rng)
    count = 8 * int(pytestconfig.getoption("--oracle-cases"))
    report = comparison.run(make(rng, values) for _ in range(count))
    assert not report.mismatches, "\n".join(map(str, report.mismatches))
    assert report.compared == count


@pytest.mark.parametrize(
    "load", [0xF8408442, 0xF8408C42, 0xA8C10443, 0xA8C10841], ids=["post", "pre", "first", "second"]
)
def test_a_base_that_is_loaded_with_writeback_ends_a_group(comparison: Comparison, load: int) -> None:
    """LDR X2, [X2], #8 is CONSTRAINED UNPREDICTABLE (Arm ARM K1.2): whatever X2 holds then is an address to look up."""
    rng = random.Random(load)
    before = Values(rng).registers(0)
    before.x[2] = SCRATCH
    for number in range(3, 16):
        before.x[number] = END + 0x10000
    first = [0xF9400040, *(0x91000400 | n << 5 | n for n in range(3, 16)), 0xF9400441]  # LDR, ADDs, LDR of the group
    second = [0xF9400040, load, 0xF9400042, 0xF9400443]  # LDR X0, [X2]; ...; LDR X2, [X2]; LDR X3, [X2, #8]
    contents = (END + 0x20000).to_bytes(8, "little") * 8
    comparison.subject.ram[SCRATCH - BASE : SCRATCH - BASE + len(contents)] = contents
    result = comparison.alone(first + second, before)
    assert result.outcome is Outcome.FAULT
