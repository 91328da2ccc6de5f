"""What is not in the decode table is UNDEFINED: random words, and words a few bits away from valid ones.

Where Unicorn executes such a word, the feature it belongs to has to be listed as absent in exceptions.py.
"""

from __future__ import annotations

import random

import pytest

from tests.oracle.cases import Case, Row, Table, Values, encoding, is_system
from tests.oracle.compare import BATCH, Comparison, disassemble
from tests.oracle.exceptions import absence
from tests.oracle.machine import SCRATCH, Outcome

pytestmark = pytest.mark.oracle


def neighbour(row: Row, rng: random.Random) -> int:
    """An encoding of ``row`` with one to three of its fixed bits flipped."""
    fixed = [bit for bit in range(32) if row.mask >> bit & 1]
    word = encoding(row, rng)
    for bit in rng.sample(fixed, rng.randrange(1, 4)):
        word ^= 1 << bit
    return word


def reserved(table: Table, rng: random.Random, count: int) -> list[int]:
    """Words that no row decodes."""
    words: list[int] = []
    while len(words) < count:
        word = neighbour(rng.choice(table.rows), rng) if rng.random() < 0.8 else rng.getrandbits(32)
        if table.find(word) is None:
            words.append(word)
    return words


def test_words_of_no_row_are_undefined(comparison: Comparison, pytestconfig: pytest.Config) -> None:
    rng = random.Random(f"{pytestconfig.getoption('--oracle-seed')} reserved")
    values = Values(rng)
    executed_here: list[int] = []
    executed_there: list[int] = []
    words = reserved(comparison.table, rng, 100 * pytestconfig.getoption("--oracle-cases"))
    for start in range(0, len(words), BATCH):
        cases = []
        for word in words[start : start + BATCH]:
            before = values.registers(0)
            before.x = [SCRATCH + 0x8000] * 31
            before.sp = SCRATCH + 0x8000
            cases.append(Case("reserved", [word], before, memory=False, vectors=False))
        executed_here += comparison.not_undefined(cases)
        # Unicorn is not asked about what it has and we have not (some of it aborts it), nor about SYS (acts on itself).
        comparable = [case for case in cases if absence(case.words[0]) is None and not is_system(case.words[0])]
        executed_there += [case.words[0] for case in comparison.survivors(comparable)]
    assert not executed_here, disassemble(executed_here[:10], 0)
    assert not executed_there, disassemble(executed_there[:10], 0)


def test_undefined_leaves_everything_as_it_was(comparison: Comparison) -> None:
    rng = random.Random(7)
    before = Values(rng).registers(0)
    result = comparison.alone([0x0000_0000], before)
    assert result.outcome is Outcome.UNDEFINED
    assert (result.x, result.sp, result.nzcv, result.v) == (before.x, before.sp, before.nzcv, before.v)
