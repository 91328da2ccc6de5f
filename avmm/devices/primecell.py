"""What Arm's PrimeCell peripherals have in common: the identification registers at the end of their 4 KiB window."""

from __future__ import annotations

from typing import Final

#: Size of a PrimeCell's register window in bytes.
WINDOW: Final = 0x1000

_ID_BASE: Final = 0xFE0
_PCELL_ID: Final = (0x0D, 0xF0, 0x05, 0xB1)


def identification(*peripheral_id: int) -> dict[int, int]:
    """Registers by offset: PeriphID0..3 as given, then PCellID0..3. Linux's amba bus reads them to find its driver."""
    return {_ID_BASE + 4 * n: value for n, value in enumerate((*peripheral_id, *_PCELL_ID))}
