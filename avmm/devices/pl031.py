"""PL031, the real-time clock (Arm DDI 0224): seconds since 1970, following the host's clock at an offset."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from avmm.devices.primecell import WINDOW, identification
from avmm.fdt import CLOCK_PHANDLE, LEVEL, Node, Placement, cells
from avmm.irq import IrqLine

PL031_SIZE: Final = WINDOW

_DR: Final = 0x00
_MR: Final = 0x04
_LR: Final = 0x08
_CR: Final = 0x0C
_IMSC: Final = 0x10
_RIS: Final = 0x14
_MIS: Final = 0x18
_ICR: Final = 0x1C
_ID: Final = identification(0x31, 0x10, 0x04, 0x00)

_WORD: Final = 0xFFFFFFFF
# The host's clock can be set, and jumps when the host has slept; an alarm looks at it at least this often (seconds).
_LONGEST_SLEEP: Final = 30.0
_STATE_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class Pl031State:
    """``offset`` is guest minus host seconds; ``due`` the host second of the next match, None when it has passed."""

    version: int
    offset: int
    match: int
    load: int
    imsc: int
    ris: int
    due: int | None


class Pl031:
    """A PL031 whose interrupt output is ``irq``; a bus device with a window of :data:`PL031_SIZE` bytes.

    ``now`` gives the host's wall clock in seconds since 1970. :meth:`run` raises the alarm while a guest waits for
    one. Registers are used with ``lock`` held; the other methods take it.
    """

    def __init__(self, lock: threading.RLock, irq: IrqLine, now: Callable[[], float] = time.time) -> None:
        self._lock: Final = lock
        self._irq: Final = irq
        self._now: Final = now
        self._level = False
        self._alarm: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None
        self._reset_registers()

    def _reset_registers(self) -> None:
        self._offset = self._match = self._load = self._imsc = self._ris = 0
        self._due: int | None = None  # a match that nobody has asked for is not looked for

    def read(self, offset: int, size: int) -> int:
        """See :class:`avmm.bus.Device`."""
        if offset == _DR:
            value = self._seconds()
        elif offset == _MR:
            value = self._match
        elif offset == _LR:
            value = self._load
        elif offset == _CR:
            value = 1  # always running: writing zero has no effect on this clock
        elif offset == _IMSC:
            value = self._imsc
        elif offset == _RIS:
            self._check()
            value = self._ris
        elif offset == _MIS:
            self._check()
            value = self._ris & self._imsc
        else:
            value = _ID.get(offset, 0)
        return value & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """See :class:`avmm.bus.Device`."""
        value &= _WORD
        if offset == _MR:
            self._match = value
            self._arm()
        elif offset == _LR:
            self._load = value
            self._offset = value - int(self._now())
            self._arm()
        elif offset == _IMSC:
            self._imsc = value & 1
        elif offset == _ICR:
            self._check()
            self._ris &= ~value
        else:
            return
        self._check()
        self._wake()

    def _seconds(self) -> int:
        return int(self._now()) + self._offset & _WORD

    def _arm(self) -> None:
        """The counter is 32 bits wide: a match value that lies behind is reached after it has wrapped."""
        self._due = int(self._now()) + (self._match - self._seconds() & _WORD)

    def _check(self) -> None:
        if self._due is not None and self._now() >= self._due:
            self._due = None
            self._ris = 1
        level = bool(self._ris & self._imsc)
        if level is not self._level:
            self._level = level
            self._irq.set(level)

    def _wake(self) -> None:
        if self._alarm is not None:
            loop, changed = self._alarm
            loop.call_soon_threadsafe(changed.set)

    async def run(self) -> None:
        """Raise the alarm in time, for ever. Sleeps without a timer while no alarm is set and unmasked."""
        changed = asyncio.Event()
        with self._lock:
            self._alarm = (asyncio.get_running_loop(), changed)
        try:
            while True:
                changed.clear()
                with self._lock:
                    self._check()
                    waiting = self._due is not None and self._imsc
                    delay = min(self._due - self._now(), _LONGEST_SLEEP) if self._due is not None and waiting else None
                try:
                    async with asyncio.timeout(delay):
                        await changed.wait()
                except TimeoutError:
                    continue
        finally:
            self._alarm = None

    def reset(self) -> None:
        """Registers to their reset values: the clock shows the host's time again."""
        with self._lock:
            self._reset_registers()
            self._check()
            self._wake()

    def save(self) -> Pl031State:
        """The state for a snapshot."""
        with self._lock:
            return Pl031State(_STATE_VERSION, self._offset, self._match, self._load, self._imsc, self._ris, self._due)

    def restore(self, state: Pl031State) -> None:
        """Back to a saved state; the clock goes on with the host's time, the line is put back without an edge."""
        if state.version != _STATE_VERSION:
            raise ValueError(f"PL031 state version {state.version} is not {_STATE_VERSION}")
        with self._lock:
            self._offset, self._match, self._load = state.offset, state.match, state.load
            self._imsc, self._ris, self._due = state.imsc, state.ris, state.due
            self._level = bool(self._ris & self._imsc)
            self._irq.restore(self._level)
            self._wake()

    @staticmethod
    def fdt_node(placement: Placement) -> Node:
        """The device-tree node. Without its clocks Linux does not bind a PrimeCell."""
        return Node(
            f"pl031@{placement.base:x}",
            {
                "compatible": ["arm,pl031", "arm,primecell"],
                "reg": placement.reg,
                "interrupts": placement.interrupts(LEVEL),
                "clocks": cells(CLOCK_PHANDLE),
                "clock-names": "apb_pclk",
            },
        )
