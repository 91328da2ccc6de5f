"""virtio-fs, a folder of the host (virtio 1.2, 5.11): FUSE requests in, answers out, through whoever serves them.

What the backend can answer at once it does on the event loop; the rest goes to its threads, any number of requests at a
time, straight between the host's files and the guest's buffers.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, Protocol

from avmm.aio import cancel
from avmm.devices.virtio.queue import CHAIN_MAX, Chain
from avmm.devices.virtio.transport import Queue, VirtioDevice
from avmm.errors import GuestError

TAG_MAX: Final = 36

_CONFIG: Final = struct.Struct(f"<{TAG_MAX}sI")  # tag, request queues (5.11.4)


class FsBackend(Protocol):
    """Who serves the requests: :class:`avmm.backends.share.server.Share`."""

    def serve(self, readable: list[memoryview], writable: list[memoryview]) -> int | Callable[[], int]:
        """Answer into ``writable``: how many bytes; or a call that will, and may block. Raises ValueError for what is
        no request."""
        ...

    async def finish(self, work: Callable[[], int]) -> int:
        """What ``work()`` returns, once it is done."""
        ...

    def save(self) -> Any: ...
    def restore(self, state: Any) -> None: ...


class Fs(VirtioDevice):
    """A file system served by ``backend``, which the guest mounts by its ``tag``: up to :data:`TAG_MAX` bytes."""

    device_id = 26
    # One for requests that go first (5.11.2), one for all others.
    queue_sizes = (64, CHAIN_MAX)

    def __init__(self, backend: FsBackend, tag: str) -> None:
        super().__init__()
        self.name = f"fs-{tag}"
        self._backend = backend
        self._config = _CONFIG.pack(tag.encode(), 1)

    def config(self) -> bytes:
        """See :class:`VirtioDevice`."""
        return self._config

    def workers(self, queues: Sequence[Queue]) -> list[Coroutine[Any, Any, None]]:
        """See :class:`VirtioDevice`."""
        return [self._serve(queue) for queue in queues]

    def save(self) -> Any:
        """See :class:`VirtioDevice`."""
        return self._backend.save()

    def restore(self, state: Any) -> None:
        """See :class:`VirtioDevice`."""
        self._backend.restore(state)

    async def _serve(self, queue: Queue) -> None:
        working: set[asyncio.Task[None]] = set()
        try:
            async for chain in queue:
                try:
                    answer = self._backend.serve(chain.readable, chain.writable)
                except ValueError as error:
                    queue.fail(chain, GuestError(str(error)))
                    continue
                if isinstance(answer, int):
                    queue.push(chain, answer)
                    continue
                task = asyncio.create_task(self._finish(queue, chain, answer))
                working.add(task)
                task.add_done_callback(working.discard)
        finally:
            # The backend does not let go of what its threads are at work on: guest memory is ours until they are done.
            await cancel(*working)

    async def _finish(self, queue: Queue, chain: Chain, work: Callable[[], int]) -> None:
        try:
            written = await self._backend.finish(work)
        except asyncio.CancelledError:
            chain.queue.drop(chain)
            raise
        queue.push(chain, written)
