"""The host's end of a serial line: what the host types waits here for the UART, what the guest sends passes through.

``write`` runs on the vCPU thread for every character a guest prints, so it only appends; the loop is woken once per
batch, and a batch is what has gathered when the loop gets round to it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

#: How long output may gather before it is delivered, in seconds: a guest that prints a character at a time would
#: otherwise wake the loop, and take the interpreter's lock from the vCPU, for each of them.
GATHER = 0.001


class SerialLine:
    """Both directions of one line. Create it on the loop that will use it.

    ``deliver(data)`` is called on the loop with what the guest sent, in order.
    """

    def __init__(self, deliver: Callable[[bytes], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._deliver = deliver
        #: Called before each delivery, on the loop: whoever has output that was not written yet writes it now.
        self.collect: Callable[[], None] = lambda: None
        self._output: deque[bytes] = deque()  # appends and pops are atomic: both threads touch it
        self._gathering = False
        self._typed = bytearray()
        self._arrived = asyncio.Event()
        self._drained = asyncio.Event()
        self._drained.set()
        self._closed = False

    # ---- the guest's side (avmm.devices.pl011.SerialStream)

    def write(self, data: bytes) -> None:
        """Bytes from the guest. Any thread; never blocks."""
        self._output.append(data)
        if not self._gathering:
            self._gathering = True
            self._loop.call_soon_threadsafe(self._gather)

    async def read(self, limit: int) -> bytes:
        """At most ``limit`` bytes for the guest; waits until there are any."""
        while not self._typed:
            self._arrived.clear()
            self._drained.set()
            await self._arrived.wait()
        data = bytes(self._typed[:limit])
        del self._typed[:limit]
        return data

    # ---- the host's side

    def type(self, data: bytes) -> None:
        """Queue bytes for the guest; of one that is gone they are dropped."""
        if data and not self._closed:
            self._typed += data
            self._drained.clear()
            self._arrived.set()

    async def drain(self) -> None:
        """Return once the guest's UART has taken everything queued."""
        await self._drained.wait()

    def close(self) -> None:
        """The guest is gone: deliver the last output and let nobody wait any more."""
        self._closed = True
        self.flush()
        self._drained.set()

    def _gather(self) -> None:
        if not self._closed:
            self._loop.call_later(GATHER, self.flush)

    def flush(self) -> None:
        """Deliver what has gathered."""
        self._gathering = False  # before the rest: what is appended after the pops asks for another flush
        self.collect()
        pieces = []
        while self._output:
            pieces.append(self._output.popleft())
        if pieces:
            self._deliver(b"".join(pieces))
