"""Cases: random encodings of the rows of softhv's decode table, and states in which they have something to do."""

from __future__ import annotations

import itertools
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from avmm.hypervisor._softhv import ffi, lib
from tests.oracle.machine import SCRATCH, SCRATCH_SIZE, Registers

MASK64 = (1 << 64) - 1
CLREX = 0xD503_3F5F


@dataclass(frozen=True)
class Row:
    """One encoding class: ``pattern`` has 32 characters, bit 31 first."""

    name: str
    pattern: str
    mask: int
    value: int

    def matches(self, word: int) -> bool:
        """Whether ``word`` is of this class, earlier rows aside."""
        return word & self.mask == self.value

    @cached_property
    def fields(self) -> tuple[tuple[int, int], ...]:
        """(low bit, width) of every run of one letter."""
        found, at = [], 32
        for letter, run in itertools.groupby(self.pattern):
            width = len(list(run))
            at -= width
            if letter not in "01":
                found.append((at, width))
        return tuple(found)


class Table:
    """The decode table. The first row that matches wins."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        insn = ffi.new("softhv_insn_t *")
        while lib.softhv_insn(len(self.rows), insn):
            pattern = ffi.string(insn.pattern).decode().replace(" ", "")
            self.rows.append(Row(ffi.string(insn.name).decode(), pattern, insn.mask, insn.value))
        self._shadows = {
            row.name: [other for other in self.rows[:index] if not (other.value ^ row.value) & other.mask & row.mask]
            for index, row in enumerate(self.rows)
        }

    def find(self, word: int) -> Row | None:
        """The row that decodes ``word``; None: UNDEFINED."""
        return next((row for row in self.rows if row.matches(word)), None)

    def words(self, row: Row, rng: random.Random) -> Iterator[int]:
        """Random encodings that ``row`` decodes; ends when it finds none."""
        shadows = self._shadows[row.name]
        misses = 0
        while misses < 500:
            word = encoding(row, rng)
            if any(other.matches(word) for other in shadows):
                misses += 1
                continue
            misses = 0
            yield word


def encoding(row: Row, rng: random.Random) -> int:
    """A random encoding; fields are all zeros or all ones more often than chance has it, registers repeat."""
    word = row.value
    register = rng.randrange(32)
    for low, width in row.fields:
        dice = rng.random()
        if width == 5 and dice < 0.1:
            value = register
        elif width == 5 and dice < 0.18:
            value = 31
        elif width > 1 and dice < 0.26:
            value = 0 if dice < 0.22 else (1 << width) - 1
        else:
            value = rng.getrandbits(width)
        word |= value << low
    return word


# ---- States --------------------------------------------------------------------------------------------------------

FLOATS64 = [
    0, 1 << 63, 1, 0x000F_FFFF_FFFF_FFFF, 0x0010_0000_0000_0000, 0x3FF0_0000_0000_0000, 0xBFF0_0000_0000_0000,
    0x3FE0_0000_0000_0000, 0x4000_0000_0000_0000, 0x7FEF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000, 0xFFF0_0000_0000_0000,
    0x7FF8_0000_0000_0000, 0xFFF8_0000_DEAD_BEEF, 0x7FF0_0000_0000_0001, 0xFFF4_0000_0000_0000, 0x43E0_0000_0000_0000,
    0x41DF_FFFF_FFC0_0000, 0x41EF_FFFF_FFE0_0000, 0xC3E0_0000_0000_0000, 0x3FDF_FFFF_FFFF_FFFF, 0x4340_0000_0000_0001,
    0x3810_0000_0000_0000, 0x47EF_FFFF_F000_0000, 0x3690_0000_0000_0000, 0x40EF_FFE0_0000_0000,
]  # fmt: skip
FLOATS32 = [
    0, 1 << 31, 1, 0x007F_FFFF, 0x0080_0000, 0x3F80_0000, 0xBF80_0000, 0x3F00_0000, 0x4000_0000, 0x7F7F_FFFF,
    0x7F80_0000, 0xFF80_0000, 0x7FC0_0000, 0xFFC1_2345, 0x7F80_0001, 0xFFA0_0000, 0x4F00_0000, 0x4EFF_FFFF, 0x5F00_0000,
    0xCF00_0000, 0x3EFF_FFFF, 0x4B00_0001, 0x3880_0000, 0x477F_E000, 0x3300_0000, 0x3FC0_0000,
]  # fmt: skip
FLOATS16 = [
    0, 0x8000, 1, 0x03FF, 0x0400, 0x3C00, 0xBC00, 0x3800, 0x4000, 0x7BFF, 0x7C00, 0xFC00, 0x7E00, 0xFE12, 0x7C01,
    0xFD00, 0x77FF, 0x7800, 0x6400, 0x3801,
]  # fmt: skip
INTEGERS = [
    0, 1, 2, 3, 7, 8, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, 0x1_0000_0000,
    MASK64 >> 1, 1 << 63, MASK64, MASK64 - 1, 0xFFFF_FFFF_8000_0000, 0xFFFF_FFFF_7FFF_FFFF, 31, 32, 63, 64,
]  # fmt: skip


class Values:
    """A pool of awkward and of random operands, from which a state is cut cheaply."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._x = [self._integer() for _ in range(4096)]
        self._v = b"".join(self._vector() for _ in range(4096))

    def _integer(self) -> int:
        rng = self._rng
        match rng.randrange(5):
            case 0:
                return rng.choice(INTEGERS)
            case 1:
                return rng.getrandbits(rng.randrange(1, 65))
            case 2:
                return (1 << 64) - rng.getrandbits(rng.randrange(1, 64)) & MASK64
            case _:
                return rng.getrandbits(64)

    def _vector(self) -> bytes:
        rng = self._rng
        match rng.randrange(8):
            case 0 | 1:
                return struct.pack("<2Q", *(self._float(64, 52, FLOATS64) for _ in range(2)))
            case 2 | 3:
                return struct.pack("<4I", *(self._float(32, 23, FLOATS32) for _ in range(4)))
            case 4:
                return struct.pack("<8H", *(self._float(16, 10, FLOATS16) for _ in range(8)))
            case 5:
                return struct.pack("<2Q", rng.choice(INTEGERS), rng.choice(INTEGERS))
            case 6:
                return bytes(rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.getrandbits(8))) for _ in range(16))
            case _:
                return rng.randbytes(16)

    def _float(self, width: int, fraction: int, special: list[int]) -> int:
        """A float's bits: special, anything, or of a magnitude near one, where sums cancel and conversions round."""
        rng = self._rng
        match rng.randrange(4):
            case 0 | 1:
                return rng.choice(special)
            case 2:
                return rng.getrandbits(width)
            case _:
                bias = (1 << width - fraction - 2) - 1
                exponent = bias + rng.randrange(-12, 13)
                low = rng.choice((0, rng.getrandbits(fraction), (1 << fraction) - 1))
                return rng.getrandbits(1) << width - 1 | exponent << fraction | low

    def registers(self, fpcr_bits: int) -> Registers:
        """A fresh state; ``fpcr_bits`` of FPCR are random in half of them, zero in the others."""
        rng = self._rng
        x, v = rng.randrange(4096 - 32), rng.randrange(4096 - 32)
        return Registers(
            x=self._x[x : x + 31],
            sp=self._x[x + 31] & ~15,
            nzcv=rng.getrandbits(4) << 28,
            fpcr=rng.getrandbits(32) & fpcr_bits if rng.random() < 0.5 else 0,
            fpsr=rng.getrandbits(32) & 0x0800_009F if rng.random() < 0.3 else 0,
            v=self._v[16 * v : 16 * v + 512],
        )


# ---- Programs ------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A program of a few instructions and the state it starts from. The last word is the one under test."""

    row: str
    words: list[int]
    before: Registers
    memory: bool
    vectors: bool
    straight: bool = True  # runs every word; else it runs up to its end, with branches in it


def is_memory(word: int) -> bool:
    """Loads and stores: op0 is x1x0 (Arm ARM C4.1)."""
    return word >> 27 & 1 == 1 and word >> 25 & 1 == 0


def is_vector(word: int) -> bool:
    """SIMD and FP: data processing with op0 x111, loads and stores with V set."""
    return word >> 25 & 7 == 7 or (is_memory(word) and word >> 26 & 1 == 1)


def is_exclusive(word: int) -> bool:
    """Exclusives, ordered accesses and compare-and-swap."""
    return word >> 24 & 0x3F == 0b001000


def is_atomic(word: int) -> bool:
    """LSE atomics and LDAPR."""
    return word >> 24 & 0x3F == 0b111000 and word >> 21 & 1 == 1 and word >> 10 & 3 == 0


def is_register_offset(word: int) -> bool:
    """A load or store at base plus register."""
    return word >> 27 & 7 == 7 and word >> 24 & 3 == 0 and word >> 21 & 1 == 1 and word >> 10 & 3 == 2


def is_compare_and_swap(word: int) -> bool:
    """CAS, and CASP with its register pairs."""
    return is_exclusive(word) and word >> 21 & 1 == 1 and (word >> 23 & 1 == 1 or word >> 31 == 0)


def is_branch(word: int) -> bool:
    """Branches, exception generation and system instructions: op0 is 101x (Arm ARM C4.1)."""
    return word >> 26 & 7 == 5


def is_system(word: int) -> bool:
    """MSR, MRS, SYS, hints and barriers."""
    return word >> 22 == 0b1101010100


def case(
    row: Row, word: int, values: Values, rng: random.Random, fpcr_bits: int, peek: Callable[[int, int], int]
) -> Case:
    """A state in which ``word`` has something to do, and what has to run before it.

    ``peek(address, size)`` reads SCRATCH as it is now.
    """
    before = values.registers(fpcr_bits)
    words = [word]
    if is_memory(word):
        words = [*point_into_scratch(word, before, rng), word]
        if is_compare_and_swap(word) and rng.random() < 0.5:
            expect_what_is_there(word, before, peek)
    return Case(row.name, words, before, is_memory(word), is_vector(word))


def expect_what_is_there(word: int, before: Registers, peek: Callable[[int, int], int]) -> None:
    """Let a compare-and-swap succeed (it may not, when its registers overlap)."""
    base, expected = word >> 5 & 31, word >> 16 & 31
    address = before.sp if base == 31 else before.x[base]
    pair = word >> 23 & 1 == 0
    size = 4 << (word >> 30 & 1) if pair else 1 << (word >> 30)
    if not SCRATCH <= address < SCRATCH + SCRATCH_SIZE - 16:
        return
    for number in range(2 if pair else 1):
        if expected + number < 31 and expected + number != base:
            before.x[expected + number] = peek(address + number * size, size)


def point_into_scratch(word: int, before: Registers, rng: random.Random) -> list[int]:
    """Aim a load or store at SCRATCH, most of the time; returns what has to run first."""
    base, other = word >> 5 & 31, word >> 16 & 31
    aligned = is_exclusive(word) or is_atomic(word)
    address = SCRATCH + 0x4000 + rng.randrange(0x4000)
    if aligned or rng.random() < 0.6:
        address &= ~15
    if rng.random() < 0.03:
        address = rng.choice((0, 0x1000, 1 << 40, 0xFFFF_0000_0000_0000, rng.getrandbits(64))) & ~15
    if base == 31:
        before.sp = address & ~15
    else:
        before.x[base] = address
    if is_register_offset(word) and other != 31 and (other != base or base == 31):
        index = rng.randrange(-0x200, 0x200)
        if word >> 13 & 3 == 2:  # a 32-bit index: the upper half is ignored
            index = index & 0xFFFF_FFFF if word >> 15 & 1 else index & 0x1FF
            index |= rng.getrandbits(32) << 32
        before.x[other] = index & MASK64
    if not is_exclusive(word) or word >> 23 & 1 or word >> 22 & 1:
        return []
    if word >> 21 & 1 and not word >> 31 & 1:  # CASP
        return []
    # A store exclusive: sometimes with the monitor open, sometimes closed by its own load.
    if rng.random() < 0.3 or base in (29, 30):
        return [CLREX]
    load = word & ~(0x1F << 16) & ~0x7FFF | 1 << 22 | 31 << 16 | 29 << 10 | base << 5 | 30
    if not word >> 21 & 1:
        load |= 31 << 10
    return [load]
