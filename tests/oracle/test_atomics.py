"""LDSMAX and LDSMIN on less than 64 bits, which Unicorn gets wrong, against the Arm ARM's own words."""

from __future__ import annotations

import pytest

from tests.oracle.compare import Comparison
from tests.oracle.machine import BASE, SCRATCH, Outcome, Registers

pytestmark = pytest.mark.oracle

AT = SCRATCH + 0x100


def signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> bits - 1 else value


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("order", [0, 1, 2, 3], ids=["", "l", "a", "al"])
@pytest.mark.parametrize("greatest", [True, False], ids=["ldsmax", "ldsmin"])
def test_signed_maximum_and_minimum(comparison: Comparison, greatest: bool, order: int, bits: int) -> None:
    """The new value is the greater (smaller) as signed integers, the old one comes zero extended (C6.2.160)."""
    size = {8: 0, 16: 1, 32: 2}[bits]
    opcode = 0b100 if greatest else 0b101
    word = size << 30 | 0x3820_0000 | order << 22 | 1 << 16 | opcode << 12 | 0 << 5 | 2  # op w1, w2, [x0]
    top = 1 << bits - 1
    interesting = [0, 1, top - 1, top, top + 1, 2 * top - 1]
    offset = AT - BASE
    for old in interesting:
        for operand in interesting:
            comparison.subject.ram[offset : offset + 8] = (0xAAAA_AAAA_AAAA_AAAA & -2 * top | old).to_bytes(8, "little")
            x = [0x5555_5555_5555_5555] * 31
            x[0], x[1] = AT, 0x3333_3333_3333_3333 & -2 * top | operand
            result = comparison.alone([word], Registers(x, sp=SCRATCH, nzcv=0))
            pick = max if greatest else min
            expected = pick(signed(old, bits), signed(operand, bits)) & 2 * top - 1
            left = int.from_bytes(comparison.subject.ram[offset : offset + 8], "little")
            assert result.outcome is Outcome.DONE
            assert result.x[2] == old
            assert left == 0xAAAA_AAAA_AAAA_AAAA & -2 * top | expected
