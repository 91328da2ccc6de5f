"""virtio-balloon (virtio 1.2, 5.5): pages the guest gives back, on request (inflate) or as it frees them (reporting).

Either way the host takes the page's memory away; the guest may touch it again at any time, and finds something else in
it. No page is ever lost by a guest that breaks the rules, other than those it names.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from avmm.devices.virtio.queue import Chain
from avmm.devices.virtio.transport import Queue, VirtioDevice
from avmm.errors import GuestError

#: Bytes of a page of the balloon, whatever the guest's own are (5.5.6).
PAGE: Final = 4096

# Feature bits (5.5.3).
_F_STATS_VQ: Final = 1 << 1
_F_DEFLATE_ON_OOM: Final = 1 << 2
_F_PAGE_REPORTING: Final = 1 << 5

_CONFIG: Final = struct.Struct("<IIII")  # pages wanted, pages there are, free page hint command, poison value (5.5.4)
_ACTUAL: Final = range(4, 8)  # what the driver writes
_STAT: Final = struct.Struct("<HQ")  # tag, value (5.5.6.3)
_STATS_MAX: Final = 64

#: Page numbers in one request; Linux sends 256.
_NUMBERS_MAX: Final = 1 << 16
#: Bytes given back before the event loop is let go on.
_TURN: Final = 4 << 20


class BalloonBackend(Protocol):
    """The host's side: :class:`avmm.backends.balloon.Balloon`. On the event loop, but for ``wanted``."""

    wanted: int  # bytes the guest is to give up

    def connect(self, changed: Callable[[], None]) -> None:
        """``changed()`` is to be called when ``wanted`` has changed."""
        ...

    def guest_gave(self, actual: int) -> None:
        """The guest has given up ``actual`` bytes in all. Any thread."""
        ...

    def returned(self, length: int) -> None:
        """``length`` bytes went back to the host."""
        ...

    async def asked(self) -> None:
        """Return when somebody wants statistics."""
        ...

    def answered(self, values: dict[int, int]) -> None:
        """The guest's statistics by tag."""
        ...


@dataclass(frozen=True, slots=True)
class BalloonState:
    """Bytes wanted of the guest, and pages it says it has given."""

    wanted: int
    actual: int


class Balloon(VirtioDevice):
    """A balloon as large as ``backend`` wants it."""

    device_id = 5
    name = "balloon"
    features = _F_STATS_VQ | _F_DEFLATE_ON_OOM | _F_PAGE_REPORTING
    # Inflate, deflate, statistics, reporting: the last two move up where one before them is not negotiated (5.5.2).
    queue_sizes = (128, 128, 16, 64)

    def __init__(self, backend: BalloonBackend) -> None:
        super().__init__()
        self._backend = backend
        self._actual = bytearray(4)
        backend.connect(self._changed)

    def config(self) -> bytes:
        """See :class:`VirtioDevice`."""
        return _CONFIG.pack(self._backend.wanted // PAGE, int.from_bytes(self._actual, "little"), 0, 0)

    def write_config(self, offset: int, data: bytes) -> None:
        """See :class:`VirtioDevice`."""
        for at, value in enumerate(data, offset):
            if at in _ACTUAL:
                self._actual[at - _ACTUAL.start] = value
        self._backend.guest_gave(int.from_bytes(self._actual, "little") * PAGE)

    def workers(self, queues: Sequence[Queue]) -> list[Coroutine[Any, Any, None]]:
        """See :class:`VirtioDevice`."""
        return [
            self._inflate(queues[0]),
            self._deflate(queues[1]),
            self._third(queues[2]),
            self._report(queues[3]),
        ]

    def reset(self) -> None:
        """See :class:`VirtioDevice`: a driver that begins anew has all its pages."""
        self._actual = bytearray(4)
        self._backend.guest_gave(0)

    def save(self) -> BalloonState:
        """See :class:`VirtioDevice`."""
        return BalloonState(self._backend.wanted, int.from_bytes(self._actual, "little"))

    def restore(self, state: BalloonState) -> None:
        """See :class:`VirtioDevice`."""
        self._backend.wanted = state.wanted
        self._actual = bytearray(state.actual.to_bytes(4, "little"))
        self._backend.guest_gave(state.actual * PAGE)

    def _changed(self) -> None:
        if self.transport is not None:
            self.transport.config_changed()

    async def _inflate(self, queue: Queue) -> None:
        async for chain in queue:
            try:
                spans = _runs(_page_numbers(chain))
            except GuestError as error:
                queue.fail(chain, error)
                continue
            await self._give_back(queue, chain, spans)

    async def _deflate(self, queue: Queue) -> None:
        async for chain in queue:
            queue.push(chain)  # the guest may use its pages as soon as it likes (5.5.6.1): nothing to be done here

    async def _third(self, queue: Queue) -> None:
        async for chain in queue:
            assert self.transport is not None
            if not self.transport.driver_features & _F_STATS_VQ:
                await self._give_back(queue, chain, chain.spans)
                continue
            # The driver leaves its statistics here, and new ones when it gets the buffer back (5.5.6.3). Meanwhile the
            # buffer is not ours: a device that is to pause has nothing in flight.
            data = chain.read(_STATS_MAX * _STAT.size)
            queue.unpop([chain])
            self._backend.answered(dict(_STAT.iter_unpack(data[: len(data) // _STAT.size * _STAT.size])))
            await self._backend.asked()
            queue.push(await queue.get())

    async def _report(self, queue: Queue) -> None:
        async for chain in queue:
            await self._give_back(queue, chain, chain.spans)

    async def _give_back(self, queue: Queue, chain: Chain, spans: Sequence[tuple[int, int]]) -> None:
        assert self.transport is not None
        done = 0
        try:
            for gpa, length in spans:
                for at in range(0, length, _TURN):
                    self._backend.returned(self.transport.discard(gpa + at, min(length - at, _TURN)))
                    done += 1
                    if done % 4 == 0:
                        await asyncio.sleep(0)
        except GuestError as error:
            queue.fail(chain, error)
        except asyncio.CancelledError:
            chain.queue.drop(chain)
            raise
        else:
            queue.push(chain)


def _page_numbers(chain: Chain) -> list[int]:
    if chain.read_length > 4 * _NUMBERS_MAX or chain.read_length % 4:
        raise GuestError(f"a balloon request of {chain.read_length} bytes")
    return [number for (number,) in struct.iter_unpack("<I", chain.read(chain.read_length))]


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """Page numbers in any order as (GPA, length)."""
    found: list[tuple[int, int]] = []
    for number in sorted(set(numbers)):
        at = number * PAGE
        if found and sum(found[-1]) == at:
            found[-1] = (found[-1][0], found[-1][1] + PAGE)
        else:
            found.append((at, PAGE))
    return found
