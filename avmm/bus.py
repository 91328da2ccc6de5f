"""The physical address bus: which device answers a guest physical address.

A device's registers are synchronous and run on the vCPU thread under the VM's lock: no await, no I/O that may
block.
Offsets are relative to the device's own window; a device does not care where it lives.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Protocol

from avmm.errors import GuestFault


class Device(Protocol):
    """A register file. ``size`` is 1, 2, 4 or 8 bytes; offset + size lies inside the window."""

    def read(self, offset: int, size: int) -> int:
        """The value of the register at ``offset``: an unsigned integer of ``size`` bytes."""
        ...

    def write(self, offset: int, size: int, value: int) -> None:
        """Store ``value`` (unsigned, ``size`` bytes) into the register at ``offset``."""
        ...


class Bus:
    """A map from address windows to devices."""

    def __init__(self) -> None:
        self._bases: list[int] = []
        self._windows: list[tuple[int, int, Device, str]] = []  # base, end, device, name
        self._hit: tuple[int, int, Device, str] | None = None

    def add(self, base: int, size: int, device: Device, name: str) -> None:
        """Place ``device`` at ``base``. Raises ValueError when the window overlaps another."""
        end = base + size
        for other_base, other_end, _, other in self._windows:
            if base < other_end and other_base < end:
                raise ValueError(f"{name} at {base:#x} overlaps {other} at {other_base:#x}")
        at = bisect_right(self._bases, base)
        self._bases.insert(at, base)
        self._windows.insert(at, (base, end, device, name))

    def read(self, address: int, size: int) -> int:
        """Read ``size`` bytes at ``address``. Raises GuestFault where no device is."""
        base, _, device, _ = self.window(address, size)
        return device.read(address - base, size)

    def write(self, address: int, size: int, value: int) -> None:
        """Write ``size`` bytes at ``address``. Raises GuestFault where no device is."""
        base, _, device, _ = self.window(address, size)
        device.write(address - base, size, value)

    def window(self, address: int, size: int) -> tuple[int, int, Device, str]:
        """The window (base, end, device, name) that holds all of ``address``..+``size``."""
        hit = self._hit  # accesses come in runs to one device
        if hit is not None and hit[0] <= address and address + size <= hit[1]:
            return hit
        at = bisect_right(self._bases, address) - 1
        if at >= 0:
            hit = self._windows[at]
            if address + size <= hit[1]:
                self._hit = hit
                return hit
        raise GuestFault(f"no device at guest address {address:#x}", address)
