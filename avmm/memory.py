"""Guest RAM as its users see it: bounds-checked, by guest physical address (GPA).

Only ``hypervisor/`` and ``vm.py`` know how RAM is mapped; everybody else gets a :class:`GuestMemory`.
Every access is checked against the regions, because addresses come from the guest.

    memory.write(0x4000_0000, b"...")
    view = memory.view(gpa, length)          # a writable memoryview, no copy
"""

from __future__ import annotations

import contextlib
import mmap
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

from avmm.errors import GuestFault

#: Hypervisor mappings come in multiples of this many bytes (Apple's stage 2 granule).
GRANULE = 0x4000


@dataclass(frozen=True, slots=True)
class Region:
    """One contiguous piece of RAM: ``base`` is its GPA; ``buffer`` the host memory behind it."""

    base: int
    buffer: mmap.mmap

    @property
    def size(self) -> int:
        """Length in bytes."""
        return len(self.buffer)


def split(views: list[memoryview], at: int) -> tuple[list[memoryview], list[memoryview]]:
    """A list of buffers cut in two: the first ``at`` bytes, and the rest. Raises ValueError when there are fewer."""
    for index, view in enumerate(views):
        if at < len(view):
            if not at:
                return views[:index], views[index:]
            return [*views[:index], view[:at]], [view[at:], *views[index + 1 :]]
        at -= len(view)
    if at:
        raise ValueError(f"{at} bytes too few")
    return views, []


class GuestMemory:
    """The guest's RAM: one or more regions that do not overlap.

    ``on_host_write(gpa, length)`` is told of every write made through :meth:`write` and of ranges passed
    to :meth:`wrote`, so that an engine can drop translations of code that has changed underneath it.
    ``on_discard(region, offset, length)`` gives whole pages of a region back to the host.
    """

    def __init__(self) -> None:
        self._regions: list[Region] = []
        self._views: list[memoryview] = []
        self._bases: list[int] = []
        self.on_host_write: Callable[[int, int], None] = lambda gpa, length: None
        self.on_discard: Callable[[Region, int, int], None] = lambda region, offset, length: None

    @property
    def regions(self) -> tuple[Region, ...]:
        """All regions, by rising base."""
        return tuple(self._regions)

    def add(self, region: Region) -> None:
        """Add a region. Raises ValueError when it overlaps another or is not granule-aligned."""
        if region.base % GRANULE or region.size % GRANULE or not region.size:
            raise ValueError(f"RAM region at {region.base:#x} is not a multiple of {GRANULE:#x}")
        for other in self._regions:
            if region.base < other.base + other.size and other.base < region.base + region.size:
                raise ValueError(f"RAM regions at {region.base:#x} and {other.base:#x} overlap")
        at = bisect_right(self._bases, region.base)
        self._regions.insert(at, region)
        self._views.insert(at, memoryview(region.buffer))
        self._bases.insert(at, region.base)

    def view(self, gpa: int, length: int) -> memoryview:
        """A writable view of ``length`` bytes at ``gpa``, inside one region.

        Raises GuestFault when any byte lies outside RAM. Whoever writes through the view calls
        :meth:`wrote` afterwards.
        """
        at = bisect_right(self._bases, gpa) - 1
        if at >= 0 and length >= 0:
            offset = gpa - self._bases[at]
            view = self._views[at]
            if offset + length <= len(view):
                return view[offset : offset + length]
        raise GuestFault(f"guest address {gpa:#x}+{length:#x} is outside RAM", gpa)

    def read(self, gpa: int, length: int) -> bytes:
        """``length`` bytes at ``gpa``. Raises GuestFault outside RAM."""
        return bytes(self.view(gpa, length))

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Store ``data`` at ``gpa`` and tell the engine. Raises GuestFault outside RAM."""
        self.view(gpa, len(data))[:] = data
        self.on_host_write(gpa, len(data))

    def wrote(self, gpa: int, length: int) -> None:
        """Say that ``length`` bytes at ``gpa`` were written through a view."""
        self.on_host_write(gpa, length)

    def discard(self, gpa: int, length: int) -> int:
        """Give the host's memory behind a range back, as far as that is whole pages of the host: how many bytes. What
        is there afterwards is anything. Raises GuestFault outside RAM."""
        self.view(gpa, length).release()
        at = bisect_right(self._bases, gpa) - 1
        first = -(-(gpa - self._bases[at]) // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (gpa - self._bases[at] + length) // mmap.PAGESIZE * mmap.PAGESIZE
        if last <= first:
            return 0
        self.on_discard(self._regions[at], first, last - first)
        self.on_host_write(self._bases[at] + first, last - first)
        return last - first

    def close(self) -> None:
        """Give up every region. One of which somebody still holds a view is unmapped with the last such view."""
        for view in self._views:
            view.release()
        for region in self._regions:
            with contextlib.suppress(BufferError):
                region.buffer.close()
        self._regions.clear()
        self._views.clear()
        self._bases.clear()
