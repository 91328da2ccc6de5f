"""Self-tests of everything avmm assumes of a host and its hypervisor: what ``avmm doctor`` runs.

What the header of Apple's framework promises, other people's VMMs contradict in places; each assumption is a probe of a
few A64 instructions, so that a machine where one does not hold says so itself. softhv is put through the same.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. ``ok`` is None where nothing is expected: it is only told."""

    topic: str
    name: str
    found: str
    ok: bool | None = None
    expected: str = ""

    def __str__(self) -> str:
        mark = {True: "ok ", False: "BAD", None: "   "}[self.ok]
        line = f"{mark} {self.name}: {self.found}"
        return f"{line}  [expected: {self.expected}]" if self.ok is False and self.expected else line
