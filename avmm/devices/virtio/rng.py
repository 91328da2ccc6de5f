"""virtio-rng, an entropy source (virtio 1.2, 5.4): one queue of buffers to be filled with random bytes."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final

from avmm.devices.virtio.transport import Queue, VirtioDevice

#: Bytes given for one request: a guest may offer gigabytes, and the event loop has other things to do.
_REQUEST_MAX: Final = 1 << 16


class Rng(VirtioDevice):
    """``entropy(n)`` gives n random bytes, at once: ``os.urandom``, or a seeded source where runs must be the same."""

    device_id = 4
    name = "rng"
    queue_sizes = (64,)

    def __init__(self, entropy: Callable[[int], bytes]) -> None:
        super().__init__()
        self._entropy = entropy
        self.served = 0

    def workers(self, queues: Sequence[Queue]) -> list[Coroutine[Any, Any, None]]:
        """See :class:`VirtioDevice`."""
        return [self._serve(queues[0])]

    async def _serve(self, queue: Queue) -> None:
        async for chain in queue:
            written = chain.write(self._entropy(min(chain.write_length, _REQUEST_MAX)))
            self.served += written
            queue.push(chain, written)
