"""virtio-blk, a disk (virtio 1.2, 5.2): one queue, any number of its requests in work at a time, done in any order.

What the page cache holds is read at once, and what is small is written into it at once; everything else goes to the
backend's threads, straight between the host and the guest's buffers. A request the host cannot serve is answered with
an error, never with wrong or missing data.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Coroutine, Sequence
from typing import Any, Final, Protocol

from avmm.aio import cancel
from avmm.devices.virtio.queue import CHAIN_MAX, Chain
from avmm.devices.virtio.transport import Queue, VirtioDevice
from avmm.errors import GuestError
from avmm.memory import split

SECTOR: Final = 512

# Feature bits (5.2.3).
_F_SEG_MAX: Final = 1 << 2
_F_RO: Final = 1 << 5
_F_BLK_SIZE: Final = 1 << 6
_F_FLUSH: Final = 1 << 9
_F_DISCARD: Final = 1 << 13
_F_WRITE_ZEROES: Final = 1 << 14

# Request types and statuses (5.2.6).
_IN, _OUT, _FLUSH, _GET_ID, _DISCARD, _WRITE_ZEROES = 0, 1, 4, 8, 11, 13
_OK, _IOERR, _UNSUPP = 0, 1, 2

_REQUEST: Final = struct.Struct("<I4xQ")  # type, sector
_SEGMENT: Final = struct.Struct("<QII")  # sector, number of sectors, flags: of discard and write zeroes
_UNMAP: Final = 1
_ID_SIZE: Final = 20
# struct virtio_blk_config (5.2.4): capacity, size_max, seg_max, geometry, blk_size, topology, writeback, num_queues,
# discard: sectors, segments, alignment; write zeroes: sectors, segments, may unmap.
_CONFIG: Final = struct.Struct("<QIIHBBIBBHIBxHIIIIIB3x")

#: Bytes of one request, at most; and how many are read at once where the page cache has them: copying more takes longer
#: than two wakes of a thread, and would hold up the event loop.
REQUEST_MAX: Final = 64 << 20
INLINE_MAX: Final = 1 << 20
#: Bytes that are read before the vCPU goes on, or written on the event loop: as long as a wake takes, at most.
NOW_MAX: Final = 32 << 10
_ZERO_SECTORS_MAX: Final = 1 << 21  # a gigabyte in one segment
_ZERO_SEGMENTS_MAX: Final = 16


class BlockBackend(Protocol):
    """What is behind a disk: :class:`avmm.backends.drive.Drive`. Offsets and lengths in bytes; failures are OSError."""

    size: int
    read_only: bool

    def read_now(self, offset: int, views: list[memoryview]) -> bool: ...
    def write_now(self, offset: int, views: list[memoryview]) -> bool: ...
    async def readv(self, offset: int, views: list[memoryview]) -> None: ...
    async def writev(self, offset: int, views: list[memoryview]) -> None: ...
    async def flush(self) -> None: ...
    async def discard(self, offset: int, length: int) -> None: ...
    async def write_zeroes(self, offset: int, length: int, unmap: bool) -> None: ...


class Blk(VirtioDevice):
    """A disk whose content is ``backend``'s; ``serial`` is what the guest sees as its serial number."""

    device_id = 2
    queue_sizes = (CHAIN_MAX,)

    def __init__(self, backend: BlockBackend, serial: str) -> None:
        super().__init__()
        self.name = serial
        self._backend = backend
        self._serial = serial.encode()[:_ID_SIZE].ljust(_ID_SIZE, b"\0")
        self.features = _F_SEG_MAX | _F_BLK_SIZE | _F_FLUSH
        self.features |= _F_RO if backend.read_only else _F_DISCARD | _F_WRITE_ZEROES
        self._config = _CONFIG.pack(
            backend.size // SECTOR, 0, CHAIN_MAX - 2, 0, 0, 0, SECTOR, 0, 0, 0, 0, 0, 1,
            _ZERO_SECTORS_MAX, _ZERO_SEGMENTS_MAX, 4096 // SECTOR, _ZERO_SECTORS_MAX, _ZERO_SEGMENTS_MAX, 1,
        )  # fmt: skip

    def config(self) -> bytes:
        """See :class:`VirtioDevice`."""
        return self._config

    def serve_now(self, chain: Chain) -> int | None:
        """See :class:`VirtioDevice`: a small read from the page cache, which is sooner done than handed over."""
        request = _Request(chain)
        if request.kind == _IN and request.length <= NOW_MAX and self._read_now(request):
            return request.finish(_OK)
        self.serves_now = False  # nor most likely the next, until the worker finds one that could have been
        request.forget()
        return None

    def workers(self, queues: Sequence[Queue]) -> list[Coroutine[Any, Any, None]]:
        """See :class:`VirtioDevice`."""
        return [self._serve(queues[0])]

    async def _serve(self, queue: Queue) -> None:
        working: set[asyncio.Task[None]] = set()
        try:
            async for chain in queue:
                try:
                    request = _Request(chain)
                except GuestError as error:
                    queue.fail(chain, error)
                    continue
                if request.kind == _IN and request.length <= INLINE_MAX and self._read_now(request):
                    self.serves_now = request.length <= NOW_MAX
                    queue.push(chain, request.finish(_OK))
                elif request.kind == _OUT and request.length <= NOW_MAX and self._write_now(request):
                    queue.push(chain, request.finish(_OK))
                else:
                    task = asyncio.create_task(self._perform(queue, request))
                    working.add(task)
                    task.add_done_callback(working.discard)
        finally:
            # The backend does not let go of what its threads are at work on: guest memory is ours until they are done.
            await cancel(*working)

    async def _perform(self, queue: Queue, request: _Request) -> None:
        try:
            status = await self._status(request)
        except OSError:
            status = _IOERR
        except asyncio.CancelledError:
            request.forget()
            request.chain.queue.drop(request.chain)
            raise
        queue.push(request.chain, request.finish(status))

    def _read_now(self, request: _Request) -> bool:
        try:
            return self._inside(request) and self._backend.read_now(request.offset, request.data)
        except OSError:
            return False  # asked again, it will say so again

    def _write_now(self, request: _Request) -> bool:
        # A driver that cannot flush expects more of a write: see _status().
        good = not self._backend.read_only and self._negotiated(_F_FLUSH) and self._inside(request)
        return good and self._backend.write_now(request.offset, request.data)

    async def _status(self, request: _Request) -> int:
        backend, kind = self._backend, request.kind
        if kind == _IN:
            if not self._inside(request):
                return _IOERR
            await backend.readv(request.offset, request.data)
        elif kind == _GET_ID:
            for view, data in zip(request.data, _pieces(self._serial, request.data), strict=True):
                view[: len(data)] = data
        elif kind == _FLUSH:
            await backend.flush()
        elif kind not in (_OUT, _DISCARD, _WRITE_ZEROES):
            return _UNSUPP
        elif backend.read_only:
            return _IOERR
        else:
            status = await self._change(request)
            if status != _OK:
                return status
            if not self._negotiated(_F_FLUSH):
                await backend.flush()  # 5.2.6.2: a driver that cannot flush expects every write to be stable
        return _OK

    async def _change(self, request: _Request) -> int:
        if request.kind == _OUT:
            if not self._inside(request):
                return _IOERR
            await self._backend.writev(request.offset, request.data)
            return _OK
        allowed = _UNMAP if request.kind == _WRITE_ZEROES else 0
        if request.length % _SEGMENT.size or not 0 < request.length <= _ZERO_SEGMENTS_MAX * _SEGMENT.size:
            return _IOERR
        for sector, count, flags in _SEGMENT.iter_unpack(b"".join(request.data)):
            if flags & ~allowed:
                return _UNSUPP
            if count > _ZERO_SECTORS_MAX or (sector + count) * SECTOR > self._backend.size:
                return _IOERR
            if request.kind == _DISCARD:
                await self._backend.discard(sector * SECTOR, count * SECTOR)
            else:
                await self._backend.write_zeroes(sector * SECTOR, count * SECTOR, bool(flags & _UNMAP))
        return _OK

    def _inside(self, request: _Request) -> bool:
        """Whole sectors, all of them on the disk."""
        return (
            not request.length % SECTOR
            and request.length <= REQUEST_MAX
            and request.offset + request.length <= self._backend.size
        )

    def _negotiated(self, feature: int) -> bool:
        return self.transport is not None and bool(self.transport.driver_features & feature)


class _Request:
    """A request taken apart: ``kind``, ``offset`` in bytes, the buffers of its ``data``, ``length`` bytes of them."""

    __slots__ = ("_status", "chain", "data", "kind", "length", "offset")

    def __init__(self, chain: Chain) -> None:
        room = chain.write_length
        if chain.read_length < _REQUEST.size or not room:
            raise GuestError("a disk request without a header, or without room for its status")
        self.chain = chain
        self.kind, sector = _REQUEST.unpack(chain.read(_REQUEST.size))
        self.offset = sector * SECTOR
        answer, status = split(chain.writable, room - 1)
        self._status = status[-1]
        if self.kind in (_IN, _GET_ID):
            self.data = answer
        else:
            self.data = split(chain.readable, _REQUEST.size)[1]
        self.length = sum(map(len, self.data))

    def finish(self, status: int) -> int:
        """Put the status where the driver looks for it, and let go of the buffers; how many bytes were written."""
        written = self.length + 1 if self.kind in (_IN, _GET_ID) else 1
        self._status[0] = status
        self.forget()
        return written

    def forget(self) -> None:
        """Let go of the buffers."""
        self.data = []
        del self._status


def _pieces(data: bytes, views: list[memoryview]) -> list[bytes]:
    """``data`` cut up to fit ``views``."""
    pieces, at = [], 0
    for view in views:
        pieces.append(data[at : at + len(view)])
        at += len(view)
    return pieces
