"""What is not compared, and why: where Unicorn is wrong, newer than us or unable. Counted, and printed by every run.

A row is named by a glob over the decode table's row names. ``when`` narrows it to some words or states;
the references are to the Arm ARM (DDI 0487).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from tests.oracle.cases import Case


@dataclass(frozen=True)
class Skip:
    """Cases that are not compared. Without ``when`` it is the whole row."""

    rows: str
    reason: str
    when: Callable[[Case], bool] | None = None

    def covers(self, row: str, case: Case | None = None) -> bool:
        """Whether this skips ``case``, or (without one) all of ``row``."""
        if not fnmatchcase(row, self.rows):
            return False
        return self.when is None or (case is not None and self.when(case))


def branches_to_itself(case: Case) -> bool:
    """B, BL, B.cond, CBZ and TBZ with an offset of zero."""
    word = case.words[-1]
    immediate = word >> 26 & 0x1F == 0b00101 and word & 0x3FF_FFFF == 0
    conditional = (word >> 24 == 0x54 or word >> 25 & 0x3F == 0b011010) and word >> 5 & 0x7FFFF == 0
    return immediate or conditional or (word >> 25 & 0x3F == 0b011011 and word >> 5 & 0x3FFF == 0)


SKIPS: tuple[Skip, ...] = (
    Skip("*", "a branch to itself does not end", branches_to_itself),
    Skip("hvc", "Unicorn's CPU has no EL2 to call"),
    Skip("eret", "returns to wherever the last exception came from: see test_system"),
    Skip("msr_ssbs", "Unicorn's CPU has no FEAT_SSBS"),
    Skip("msr_dit", "Unicorn's CPU has no FEAT_DIT"),
    Skip("wf[ei]", "exits to the host here, does nothing there: see the engine's contract"),
    *(
        Skip(rows, "acts on translation, caches or masks, which the two sides do not share: see test_system")
        for rows in ("ic_*", "dc_*", "at_*", "tlbi_*", "msr_pan", "msr_spsel", "m[rs][rs]_daif*", "m[rs][rs]")
    ),
    *(
        Skip(rows, "Unicorn compares without regard to the sign (C6.2.160, C6.2.164): see test_atomics")
        for rows in ("ldsm[axin]*8", "ldsm[axin]*16", "ldsm[axin]*32")
    ),
)


@dataclass(frozen=True)
class Absent:
    """Instructions of a feature that Unicorn's CPU has and ours does not advertise: here they are UNDEFINED."""

    feature: str
    mask: int
    value: int


ABSENT: tuple[Absent, ...] = (
    Absent("FP16: scalar", 0x5EC0_0000, 0x1EC0_0000),
    Absent("FP16: three registers", 0x8F60_C400, 0x0E40_0400),
    Absent("FP16: two registers", 0x8F7E_0C00, 0x0E78_0800),
    Absent("FP16: across lanes and pairs", 0x8F3E_0C00, 0x0E30_0800),
    Absent("FP16: by element", 0x8FC0_0400, 0x0F00_0000),
    Absent("FP16: fixed point", 0x8FF0_E400, 0x0F10_E400),
    Absent("FP16: immediate", 0x9FF8_FC00, 0x0F00_FC00),
    Absent("FHM", 0x8F60_CC00, 0x0E20_CC00),
    Absent("FHM: by element", 0x8FC0_3400, 0x0F80_0000),
    Absent("FCMA", 0xBF20_C400, 0x2E00_C400),
    Absent("FCMA: by element", 0xBF00_9400, 0x2F00_1000),
    Absent("FRINTTS", 0xFFBE_7C00, 0x1E28_4000),
    Absent("FRINTTS: vector", 0x9FBF_EC00, 0x0E21_E800),
    Absent("JSCVT", 0xFFFF_FC00, 0x1E7E_0000),
    Absent("SHA512, SHA3, SM3, SM4", 0xFF00_0000, 0xCE00_0000),
    Absent("PAuth: loads", 0xFF20_0400, 0xF820_0400),
    Absent("PAuth: one register", 0xFFFF_0000, 0xDAC1_0000),
    Absent("PAuth: PACGA", 0xFFE0_FC00, 0x9AC0_3000),
    Absent("PAuth: branches", 0xFE1F_F800, 0xD61F_0800),
    Absent("RCPC2", 0x3F20_0C00, 0x1900_0000),
    Absent("SVE", 0x1E00_0000, 0x0400_0000),
    Absent("none: Unicorn takes ERET with any Rn (C6.2.119)", 0xFFFF_FC1F, 0xD69F_0000),
)


def absence(word: int) -> Absent | None:
    """The feature ``word`` belongs to that is not there."""
    return next((absent for absent in ABSENT if word & absent.mask == absent.value), None)


def skip_of_row(row: str) -> Skip | None:
    """Why no case of ``row`` is compared, if so."""
    return next((skip for skip in SKIPS if skip.covers(row)), None)


def skip_of_case(case: Case) -> Skip | None:
    """Why ``case`` is not compared, if so."""
    return next((skip for skip in SKIPS if skip.covers(case.row, case)), None)
