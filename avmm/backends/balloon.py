"""A VM's balloon as the host uses it: how much memory the guest is to give up, and what the guest says of its own.

::

    await vm.balloon.resize(256 << 20)          # bytes taken from the guest; 0 gives them back
    (await vm.balloon.stats())["available"]
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from avmm.errors import ConfigError, WaitTimeout

#: Names of what a guest tells (virtio 1.2, 5.5.6.4): memory in bytes, events as numbers since its start.
_NAMES: Final = (
    "swap_in", "swap_out", "major_faults", "minor_faults", "free", "total", "available", "disk_caches",
    "hugetlb_allocations", "hugetlb_failures",
)  # fmt: skip
_PAGE: Final = 4096


class Balloon:
    """The balloon of a guest with ``memory`` bytes. All on the event loop, but for what says otherwise."""

    def __init__(self, memory: int) -> None:
        self._memory = memory
        #: Bytes the guest is to give up; :meth:`resize` sets it.
        self.wanted = 0
        #: Bytes it says it has given up.
        self.actual = 0
        #: Bytes that went back to the host since the start, some of them many times.
        self.returned_bytes = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed: Callable[[], None] = lambda: None
        self._moved = asyncio.Event()
        self._asked = asyncio.Event()
        self._answers: list[asyncio.Future[dict[str, int]]] = []

    async def resize(self, size: int, timeout: float | None = None) -> None:
        """Ask the guest to give up ``size`` bytes in all, and wait until it has: for ever, if it cannot, so give a
        ``timeout``, in seconds. Raises WaitTimeout; what was asked for stays asked for."""
        if not 0 <= size < self._memory:
            raise ConfigError(f"a balloon in {self._memory} bytes of memory is not {size} bytes large")
        self.wanted = size // _PAGE * _PAGE
        self._changed()
        try:
            async with asyncio.timeout(timeout):
                while self.actual != self.wanted:
                    self._moved.clear()
                    await self._moved.wait()
        except TimeoutError:
            raise WaitTimeout(
                f"the guest has given up {self.actual} bytes, not {self.wanted}; has it a balloon driver, and so much "
                "memory to spare?", elapsed=timeout or 0.0,
            ) from None  # fmt: skip

    async def stats(self, timeout: float | None = 10.0) -> dict[str, int]:
        """What the guest says of its memory, by name, in bytes (faults and swapping: since its start). Raises
        WaitTimeout when it does not answer."""
        answer = asyncio.get_running_loop().create_future()
        self._answers.append(answer)
        self._asked.set()
        try:
            async with asyncio.timeout(timeout):
                found: dict[str, int] = await answer
                return found
        except TimeoutError:
            raise WaitTimeout("the guest does not tell of its memory", elapsed=timeout or 0.0) from None
        finally:
            if answer in self._answers:
                self._answers.remove(answer)

    # What a balloon device needs (avmm.devices.virtio.balloon.BalloonBackend).

    def connect(self, changed: Callable[[], None]) -> None:
        """``changed()`` is to be called when ``wanted`` has changed."""
        self._changed = changed
        self._loop = asyncio.get_running_loop()

    def guest_gave(self, actual: int) -> None:
        """The guest has given up ``actual`` bytes in all. Any thread."""
        self.actual = actual
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._moved.set)

    def returned(self, length: int) -> None:
        """``length`` bytes went back to the host."""
        self.returned_bytes += length

    async def asked(self) -> None:
        """Return when somebody wants statistics."""
        await self._asked.wait()
        self._asked.clear()

    def answered(self, values: dict[int, int]) -> None:
        """The guest's statistics by tag."""
        found = {_NAMES[tag]: value for tag, value in values.items() if tag < len(_NAMES)}
        if self._asked.is_set():
            return  # those of before the question
        for answer in self._answers:
            if not answer.done():
                answer.set_result(found)
        self._answers.clear()
