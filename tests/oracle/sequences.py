"""Random programs of tens of instructions: what one instruction leaves behind for the next.

x28 points into the middle of SCRATCH and moves with writeback, x26 stays 64-byte aligned for what faults unaligned,
x27 holds a small index, x25 counts the rounds of a loop; nothing else writes these four.
"""

from __future__ import annotations

import random
from itertools import islice

from tests.oracle.cases import (
    CLREX,
    Case,
    Values,
    is_atomic,
    is_branch,
    is_compare_and_swap,
    is_exclusive,
    is_memory,
    is_register_offset,
    is_vector,
)
from tests.oracle.compare import BATCH, Comparison, Mismatch, Report
from tests.oracle.exceptions import skip_of_case, skip_of_row
from tests.oracle.machine import SCRATCH, Registers

COUNTER, ALIGNED, INDEX, BASE = 25, 26, 27, 28
RESERVED = {COUNTER, ALIGNED, INDEX, BASE}
SHAPES = ("straight", "branches", "loop")

#: Branches whose offset starts at bit 5: the fixed bits, and those that may be anything.
CONDITIONAL = ((0x5400_0000, 0xF), (0x3400_0000, 0x8100_001F), (0x3600_0000, 0x81F8_001F))
UNCONDITIONAL = 0x1400_0000
SUB_COUNTER_1, CBNZ_COUNTER = 0xD100_0739, 0xB500_0019


class Programs:
    """Makes programs out of instructions that run to their end whatever the registers hold."""

    def __init__(self, comparison: Comparison, rng: random.Random) -> None:
        self._rng = rng
        self._values = Values(rng)
        self._fpcr_bits = comparison.fpcr_bits
        table = comparison.table
        candidates = []
        for row in table.rows:
            if is_branch(row.value) or skip_of_row(row.name) is not None:
                continue
            for word in islice(table.words(row, rng), 16):
                aimed = aim(word)
                if aimed is None or table.find(aimed) is not row:
                    continue
                case = Case(row.name, [aimed], self._registers(), is_memory(aimed), is_vector(aimed))
                if skip_of_case(case) is None:
                    candidates.append(case)
        self._words = [
            case.words[0]
            for start in range(0, len(candidates), BATCH)
            for case in comparison.survivors(candidates[start : start + BATCH])
        ]

    def _registers(self) -> Registers:
        rng = self._rng
        before = self._values.registers(self._fpcr_bits)
        before.x[BASE] = SCRATCH + 0x8000 + rng.randrange(0x1000)
        before.x[ALIGNED] = SCRATCH + 0x4000 + 64 * rng.randrange(64)
        before.x[INDEX] = rng.randrange(0x200)
        before.sp = SCRATCH + 0x6000
        return before

    def program(self, length: int, shape: str) -> Case:
        """A program of ``length`` instructions that runs to its end, and a state to start from.

        ``shape`` is one of SHAPES; a loop has branches in its body, and two to five rounds.
        """
        rng = self._rng
        exclusive = rng.choice((0, 1, 2, 3, 6, 7))
        words = [CLREX]  # the monitor is the one thing left over from the program before
        while len(words) < length:
            if shape != "straight" and rng.random() < 0.15:
                words.append(self._branch(length - len(words)))
            else:
                words.append(self._plain(exclusive))
        before = self._registers()
        if shape == "loop":
            before.x[COUNTER] = rng.randrange(2, 6)
            words.append(SUB_COUNTER_1)
            words.append(CBNZ_COUNTER | (1 - len(words) & 0x7FFFF) << 5)  # to what follows CLREX
        return Case("sequence", words, before, memory=True, vectors=True, straight=shape == "straight")

    def _plain(self, exclusive: int) -> int:
        """An instruction. All exclusives of a program are of one size: mixing them is unpredictable (B2.9.5)."""
        while True:
            word = self._rng.choice(self._words)
            if not is_monitored(word) or (word >> 21 & 1) << 2 | word >> 30 == exclusive:
                return word

    def _branch(self, left: int) -> int:
        """A branch forward by up to seven instructions, not beyond the end."""
        rng = self._rng
        offset = rng.randrange(1, min(8, left) + 1)
        if rng.random() < 0.2:
            return UNCONDITIONAL | offset
        fixed, free = rng.choice(CONDITIONAL)
        return fixed | rng.getrandbits(32) & free | offset << 5


def aim(word: int) -> int | None:
    """``word`` with its address registers replaced by the reserved ones; None when it writes one of those."""
    target, second, third = word & 31, word >> 10 & 31, word >> 16 & 31
    if not is_memory(word) or is_literal(word):
        return None if target in RESERVED else word
    if RESERVED & {target, second, third}:
        return None
    steady = is_exclusive(word) or is_atomic(word)
    word = word & ~(31 << 5) | (ALIGNED if steady else BASE) << 5
    if is_register_offset(word):
        word = word & ~(31 << 16) | INDEX << 16 | 3 << 13  # LSL or SXTX
    elif is_structure_with_index(word):
        word = word & ~(31 << 16) | INDEX << 16
    return word


def is_monitored(word: int) -> bool:
    """Load and store exclusive."""
    return is_exclusive(word) and word >> 23 & 1 == 0 and not is_compare_and_swap(word)


def is_literal(word: int) -> bool:
    """A load from a PC-relative address."""
    return word >> 27 & 7 == 3 and word >> 24 & 3 == 0


def is_structure_with_index(word: int) -> bool:
    """LD1..LD4, ST1..ST4 with post-index by a register."""
    return word >> 31 == 0 and word >> 23 & 0x7F in (0b0011001, 0b0011011) and word >> 16 & 31 != 31


def shrink(comparison: Comparison, case: Case, seed: str) -> Mismatch | None:
    """The shortest beginning of a straight program that still differs."""
    for length in range(1, len(case.words) + 1):
        comparison.reset_scratch(random.Random(seed))
        begin = Case(case.row, case.words[:length], case.before, case.memory, case.vectors)
        report = comparison.run([begin])
        if report.mismatches:
            return report.mismatches[0]
    return None


def run(comparison: Comparison, count: int, seed: str, shape: str) -> Report:
    """Compare ``count`` programs; a straight one that differs is cut to its shortest beginning that does."""
    rng = random.Random(f"{seed} sequences {shape}")
    programs = Programs(comparison, rng)
    report = Report()
    for number in range(count):
        case = programs.program(rng.randrange(10, 51), shape)
        comparison.reset_scratch(random.Random(f"{seed} {number}"))
        one = comparison.run([case])
        report.outcomes += one.outcomes
        if one.mismatches:
            smallest = shrink(comparison, case, f"{seed} {number}") if case.straight else None
            report.mismatches.append(smallest or one.mismatches[0])
            if len(report.mismatches) == 3:
                break
    return report
