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


def skip_of_row(row: str) -> Skip | None:
    """Why no case of ``row`` is compared, if so."""
    return next((skip for skip in SKIPS if skip.covers(row)), None)


def skip_of_case(case: Case) -> Skip | None:
    """Why ``case`` is not compared, if so."""
    return next((skip for skip in SKIPS if skip.covers(case.row, case)), None)
