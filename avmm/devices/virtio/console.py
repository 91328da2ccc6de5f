"""virtio-console, several ports (virtio 1.2, 5.3): terminals (``hvcN`` in a Linux guest) and plain byte channels.

Both directions hold back instead of losing anything: what the host has for the guest waits until the guest has opened
the port and given buffers, and a guest that sends faster than the host reads waits for its buffers.
"""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from avmm.devices.virtio.queue import Chain, Virtqueue
from avmm.devices.virtio.transport import Queue, VirtioDevice
from avmm.errors import GuestError

_F_SIZE: Final = 1 << 0
_F_MULTIPORT: Final = 1 << 1

# Control messages (5.3.6.2): port, event, value.
_CONTROL: Final = struct.Struct("<IHH")
_DEVICE_READY, _DEVICE_ADD, _PORT_READY, _CONSOLE_PORT, _RESIZE, _PORT_OPEN, _PORT_NAME = 0, 1, 3, 4, 5, 6, 7
_CONFIG: Final = struct.Struct("<HHII")  # columns, rows, ports, emergency write (5.3.4)
_SIZE: Final = struct.Struct("<HH")

#: Bytes taken from a buffer of the guest, or asked of the host, at once.
_PIECE: Final = 1 << 16
#: Buffers of the guest filled before it is told, at most.
_BATCH: Final = 16


class PortBackend(Protocol):
    """The host's end of a port: :class:`avmm.backends.port.Port`. All on the event loop."""

    name: str
    terminal: bool

    async def input(self, limit: int) -> bytes:
        """Wait for input for the guest: 1..``limit`` bytes."""
        ...

    def output(self, data: bytes) -> bool:
        """Take output of the guest; False while the host is behind."""
        ...

    async def room(self) -> None:
        """Wait until the host has caught up."""
        ...

    def guest_opened(self, opened: bool) -> None:
        """A program of the guest has opened the port, or has closed it."""
        ...


@dataclass(frozen=True, slots=True)
class ConsoleState:
    """Which ports the guest has open, what it has not been told yet, and how much of each port's next chain has been
    taken."""

    opened: tuple[bool, ...]
    outbox: tuple[bytes, ...]
    size: tuple[int, int]
    taken: tuple[int, ...] = ()


class Console(VirtioDevice):
    """A console with one port for each of ``ports``; the first is what a driver without MULTIPORT finds."""

    device_id = 3
    name = "console"
    features = _F_SIZE | _F_MULTIPORT

    def __init__(self, ports: Sequence[PortBackend]) -> None:
        super().__init__()
        self._ports = list(ports)
        # Receive and transmit of port 0, the same of the control channel, then the other ports (5.3.2).
        self.queue_sizes = (64,) * (2 + 2 * len(self._ports))
        self._opened = [asyncio.Event() for _ in self._ports]
        self._outbox: deque[bytes] = deque()
        self._mail = asyncio.Event()
        self._size = (80, 25)
        #: Of each port's next chain: the queue it is in (None: the next there is), and how much of it has been taken.
        self._taken: list[tuple[Virtqueue | None, int]] = [(None, 0)] * len(self._ports)

    def config(self) -> bytes:
        """See :class:`VirtioDevice`."""
        return _CONFIG.pack(*self._size, len(self._ports), 0)

    def resize(self, port: int, columns: int, rows: int) -> None:
        """Tell the guest the size of the terminal at ``port``. On the event loop."""
        if port == 0:
            self._size = (columns, rows)
            if self.transport is not None:
                self.transport.config_changed()
        # In this order by 5.3.6.2, which older Linux kernels do not follow.
        self._send(port, _RESIZE, 0, _SIZE.pack(columns, rows))

    def workers(self, queues: Sequence[Queue]) -> list[Coroutine[Any, Any, None]]:
        """See :class:`VirtioDevice`."""
        work = [self._send_control(queues[2]), self._receive_control(queues[3])]
        for port in range(len(self._ports)):
            first = 0 if port == 0 else 2 + 2 * port
            work += [self._input(port, queues[first]), self._output(port, queues[first + 1])]
        return work

    async def _input(self, port: int, queue: Queue) -> None:
        while True:
            await self._opened[port].wait()
            data = memoryview(await self._ports[port].input(_PIECE))
            while data:
                # Linux gives buffers of a page: as many as are there go back at once.
                chain: Chain | None = await queue.get()
                done: list[tuple[Chain, int]] = []
                while chain is not None:
                    if done and chain.queue is not done[0][0].queue:  # reset meanwhile
                        queue.push_all(done)
                        done = []
                    written = chain.write(data)
                    data = data[written:]
                    done.append((chain, written))
                    chain = queue.get_nowait() if data and len(done) < _BATCH else None
                queue.push_all(done)

    async def _output(self, port: int, queue: Queue) -> None:
        async for chain in queue:
            if port == 0 and not self._multiport:
                self._open(0, True)
            # While the host is behind nothing is in flight, or a pause would have to wait for the host, too.
            whose, taken = self._taken[port]
            taken = self._pass_on(port, chain, taken if whose in (None, chain.queue) else 0)
            if taken < chain.read_length:
                self._taken[port] = (chain.queue, taken)
                queue.unpop([chain])
                await self._ports[port].room()
            else:
                self._taken[port] = (None, 0)
                queue.push(chain)

    def _pass_on(self, port: int, chain: Chain, taken: int) -> int:
        """What comes after the first ``taken`` bytes goes to the host, as far as it takes it; how far that is."""
        at = 0
        for view in chain.readable:
            while taken < at + len(view):
                piece = view[taken - at :][:_PIECE]
                if not self._ports[port].output(bytes(piece)):
                    return taken
                taken += len(piece)
            at += len(view)
        return taken

    async def _send_control(self, queue: Queue) -> None:
        while True:
            self._mail.clear()
            while self._outbox:
                chain = await queue.get()
                # A reset may have emptied it meanwhile.
                queue.push(chain, chain.write(self._outbox.popleft()) if self._outbox else 0)
            await self._mail.wait()

    async def _receive_control(self, queue: Queue) -> None:
        async for chain in queue:
            try:
                self._control(chain)
            except GuestError as error:
                queue.fail(chain, error)
            else:
                queue.push(chain)

    def _control(self, chain: Chain) -> None:
        data = chain.read(_CONTROL.size)
        if len(data) < _CONTROL.size:
            raise GuestError("a console control message is cut short")
        port, event, value = _CONTROL.unpack(data)
        if event == _DEVICE_READY:
            for index in range(len(self._ports) if value else 0):
                self._send(index, _DEVICE_ADD, 1)
            return
        if port >= len(self._ports):
            raise GuestError(f"there is no console port {port}")
        if event == _PORT_READY and value:
            backend = self._ports[port]
            if backend.terminal:
                self._send(port, _CONSOLE_PORT, 1)
                if port == 0:
                    self._send(port, _RESIZE, 0, _SIZE.pack(*self._size))
            self._send(port, _PORT_NAME, 1, backend.name.encode())
            self._send(port, _PORT_OPEN, 1)
        elif event == _PORT_OPEN:
            self._open(port, bool(value))

    def _send(self, port: int, event: int, value: int, more: bytes = b"") -> None:
        # A driver that takes no messages cannot make us keep more and more of them.
        if len(self._outbox) < 8 * len(self._ports):
            self._outbox.append(_CONTROL.pack(port, event, value) + more)
            self._mail.set()

    def _open(self, port: int, opened: bool) -> None:
        if self._opened[port].is_set() is not opened:
            if opened:
                self._opened[port].set()
            else:
                self._opened[port].clear()
            self._ports[port].guest_opened(opened)

    @property
    def _multiport(self) -> bool:
        return self.transport is not None and bool(self.transport.driver_features & _F_MULTIPORT)

    def reset(self) -> None:
        """See :class:`VirtioDevice`."""
        self._outbox.clear()
        for opened in self._opened:
            opened.clear()
        self._taken = [(None, 0)] * len(self._ports)

    def save(self) -> ConsoleState:
        """See :class:`VirtioDevice`."""
        opened = tuple(each.is_set() for each in self._opened)
        taken = tuple(count if whose is None or whose.alive else 0 for whose, count in self._taken)
        return ConsoleState(opened, tuple(self._outbox), self._size, taken)

    def restore(self, state: ConsoleState) -> None:
        """See :class:`VirtioDevice`."""
        self._size = state.size
        self._outbox = deque(state.outbox)
        if state.taken:
            self._taken = [(None, count) for count in state.taken]
        if self._outbox:
            self._mail.set()
        for port, opened in enumerate(state.opened):
            self._open(port, opened)
