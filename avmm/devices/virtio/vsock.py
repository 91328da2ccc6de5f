"""virtio-vsock, sockets between guest and host (virtio 1.2, 5.10): a queue each way, and one for events.

A packet for the guest goes into its buffers as they come, stream data cut to their size. When the guest takes none, its
own packets are not taken either, so that nothing piles up (5.10.6.1.1).
"""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, Protocol

from avmm.devices.virtio.queue import Chain
from avmm.devices.virtio.transport import Queue, VirtioDevice
from avmm.errors import GuestError
from avmm.memory import split

_HEADER_SIZE: Final = 44  # struct virtio_vsock_hdr (5.10.6)
_LENGTH_AT: Final = 24
_CONFIG: Final = struct.Struct("<Q")  # guest_cid (5.10.4)
_EVENT: Final = struct.Struct("<I")
_TRANSPORT_RESET: Final = 0

#: Bytes of one packet of the guest's, at most; Linux sends 64 KiB.
PACKET_MAX: Final = 1 << 20
#: Packets for the guest that may wait before its own have to.
_BACKLOG: Final = 256
_BATCH: Final = 64


class VsockPacket(Protocol):
    """A packet for the guest: stream data (``payload``), or none."""

    payload: memoryview

    def header(self, cid: int, length: int) -> bytes:
        """The 44 bytes in front of ``length`` bytes of the payload."""
        ...


class VsockBackend(Protocol):
    """The protocol behind the device: :class:`avmm.backends.vsock.protocol.Vsock`. All on the event loop."""

    cid: int
    output: deque[Any]
    on_output: Callable[[], None]

    def packet(self, header: bytes, payload: memoryview) -> None:
        """A packet of the guest's; the payload is a view that is good until this returns."""
        ...

    def reset(self) -> None:
        """The guest has forgotten its connections."""
        ...


class Vsock(VirtioDevice):
    """The device of the guest whose address is ``backend.cid``."""

    device_id = 19
    name = "vsock"
    queue_sizes = (256, 256, 16)

    def __init__(self, backend: VsockBackend) -> None:
        super().__init__()
        self._backend = backend
        self._some = asyncio.Event()  # something is to be delivered, or to be forgotten
        self._drained = asyncio.Event()
        self._drained.set()
        self._event = asyncio.Event()  # the guest is to be told that its connections are gone
        self._told = asyncio.Event()  # and knows it: new ones may be made
        self._told.set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._forget = False

    def config(self) -> bytes:
        """See :class:`VirtioDevice`."""
        return _CONFIG.pack(self._backend.cid)

    def workers(self, queues: Sequence[Queue]) -> list[Coroutine[Any, Any, None]]:
        """See :class:`VirtioDevice`."""
        self._loop = asyncio.get_running_loop()
        self._backend.on_output = self._some.set
        if self._backend.output:
            self._some.set()
        return [self._deliver(queues[0]), self._take(queues[1]), self._report(queues[2])]

    async def _take(self, queue: Queue) -> None:
        """What the guest sends."""
        async for first in queue:
            chain: Chain | None = first
            done: list[tuple[Chain, int]] = []
            self._forget_if_told()
            while chain is not None:
                try:
                    header, payload = _packet(chain)
                except GuestError as error:
                    queue.fail(chain, error)
                    break
                self._backend.packet(header, payload)
                done.append((chain, 0))
                del payload
                full = len(self._backend.output) > _BACKLOG
                chain = queue.get_nowait() if len(done) < _BATCH and not full else None
            queue.push_all(done)
            del first, chain, done
            if len(self._backend.output) > _BACKLOG:
                self._drained.clear()
                self._some.set()
                await self._drained.wait()

    async def _deliver(self, queue: Queue) -> None:
        """What is for the guest."""
        backend = self._backend
        while True:
            while not backend.output:
                self._drained.set()
                self._some.clear()
                await self._some.wait()
            await self._told.wait()
            chain: Chain | None = await queue.get()
            self._forget_if_told()
            done: list[tuple[Chain, int]] = []
            while chain is not None and backend.output:
                room = chain.write_length - _HEADER_SIZE
                packet: VsockPacket = backend.output[0]
                if room < (1 if packet.payload else 0):
                    queue.fail(chain, GuestError("a vsock buffer without room for a packet"))
                    chain = None
                    break
                length = min(room, len(packet.payload))
                done.append((chain, _fill(chain, packet.header(backend.cid, length), packet.payload[:length])))
                if length < len(packet.payload):
                    packet.payload = packet.payload[length:]
                else:
                    backend.output.popleft()
                chain = queue.get_nowait() if backend.output and len(done) < _BATCH else None
            if chain is not None:
                queue.unpop((chain,))
            queue.push_all(done)
            del chain, done
            if len(backend.output) <= _BACKLOG // 2:
                self._drained.set()

    async def _report(self, queue: Queue) -> None:
        """Events: that all connections are gone (5.10.6.7)."""
        while True:
            await self._event.wait()
            chain = await queue.get()
            core = chain.queue
            before = core.offered
            queue.push(chain, chain.write(_EVENT.pack(_TRANSPORT_RESET)))
            # The driver offers the buffer again when it has done what the event asks for.
            while queue.core is core and core.offered == before:
                if core.ask_for_more():
                    await queue.doorbell.wait()
            self._event.clear()
            self._told.set()

    def _forget_if_told(self) -> None:
        if self._forget:
            self._forget = False
            self._backend.reset()
            self._event.clear()
            self._told.set()
            self._drained.set()

    # State: connections do not outlive their VM, and the guest is told so.

    def reset(self) -> None:
        """See :class:`VirtioDevice`."""
        self._forget = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._forget_if_told)

    def restore(self, state: None) -> None:
        """See :class:`VirtioDevice`."""
        self._forget = False
        self._event.set()
        self._told.clear()


def _packet(chain: Chain) -> tuple[bytes, memoryview]:
    """The header and the payload in ``chain``. Raises GuestError."""
    length = chain.read_length - _HEADER_SIZE
    if not 0 <= length <= PACKET_MAX:
        raise GuestError(f"a vsock packet of {length} bytes")
    first, *rest = chain.readable
    if len(first) < _HEADER_SIZE:
        header, rest = split(chain.readable, _HEADER_SIZE)
        head = b"".join(header)
    else:
        head = bytes(first[:_HEADER_SIZE])
        if len(first) > _HEADER_SIZE:
            rest = [first[_HEADER_SIZE:], *rest]
    size = int.from_bytes(head[_LENGTH_AT : _LENGTH_AT + 4], "little")
    if size > length:
        raise GuestError(f"a vsock packet of {size} bytes in {length}")
    whole = rest[0] if len(rest) == 1 else memoryview(b"".join(rest))
    return head, whole[:size]


def _fill(chain: Chain, header: bytes, payload: memoryview) -> int:
    """Both into the buffers of ``chain``; the bytes written."""
    view = chain.writable[0]
    whole = len(header) + len(payload)
    if len(view) < whole:
        return chain.write(header + payload)
    view[: len(header)] = header
    view[len(header) : whole] = payload
    return whole
