"""What is not compared, and why: where Unicorn is wrong, newer than us or unable. Counted, and printed by every run.

A row is named by a glob over the decode table's row names. ``when`` narrows it to some words or states;
the references are to the Arm ARM (DDI 0487).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from tests.oracle.cases import Case, is_system


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


SKIPS: tuple[Skip, ...] = (
    Skip("*", "system instructions act on what the two sides do not share", lambda case: is_system(case.words[-1])),
)


def skip_of_row(row: str) -> Skip | None:
    """Why no case of ``row`` is compared, if so."""
    return next((skip for skip in SKIPS if skip.covers(row)), None)


def skip_of_case(case: Case) -> Skip | None:
    """Why ``case`` is not compared, if so."""
    return next((skip for skip in SKIPS if skip.covers(case.row, case)), None)
