"""The host's end of a virtio console port: a stream both ways, bounded towards us, never losing a byte.

::

    port = vm.ports["agent"]
    await port.wait_open()                      # a program of the guest has opened it
    port.write(b"hello\\n"); await port.drain()
    line = await port.read(4096)
"""

from __future__ import annotations

import asyncio
from typing import Final

from avmm.aio import within

#: Bytes of the guest's output that wait for the host, at most; then the guest waits.
_HELD: Final = 1 << 20


class Port:
    """Made and used on one event loop. ``terminal``: a console for the guest (``hvcN``), else a plain channel."""

    def __init__(self, name: str, terminal: bool) -> None:
        self.name = name
        self.terminal = terminal
        self._typed = bytearray()
        self._typed_some = asyncio.Event()
        self._taken = asyncio.Event()
        self._taken.set()
        self._said = bytearray()
        self._said_some = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._opened = asyncio.Event()
        self._shut = asyncio.Event()
        self._shut.set()
        self._closed = False

    # The host's side.

    def write(self, data: bytes) -> None:
        """Queue ``data`` for the guest, which gets it once it has opened the port."""
        if data and not self._closed:
            self._typed += data
            self._taken.clear()
            self._typed_some.set()

    # Waits raise WaitTimeout after ``timeout`` seconds.

    async def drain(self, *, timeout: float | None = None) -> None:
        """Return when the guest has been given everything queued, or is gone."""
        async with within(timeout, f"the guest had not read all that was written to its port {self.name}"):
            await self._taken.wait()

    async def read(self, limit: int, *, timeout: float | None = None) -> bytes:
        """What the guest has written: 1..``limit`` bytes, waiting for the first; ``b""`` when the guest is gone."""
        async with within(timeout, f"the guest had written nothing to its port {self.name}"):
            while not self._said and not self._closed:
                self._said_some.clear()
                await self._said_some.wait()
        data = bytes(self._said[:limit])
        del self._said[:limit]
        if len(self._said) < _HELD:
            self._room.set()
        return data

    async def wait_open(self, *, timeout: float | None = None) -> None:
        """Return when the guest has the port open, or is gone."""
        async with within(timeout, f"no program of the guest had opened its port {self.name}"):
            await self._opened.wait()

    async def wait_shut(self, *, timeout: float | None = None) -> None:
        """Return when no program of the guest has the port open."""
        async with within(timeout, f"a program of the guest had its port {self.name} open"):
            await self._shut.wait()

    @property
    def is_open(self) -> bool:
        """Whether a program of the guest has the port open."""
        return self._opened.is_set() and not self._closed

    def close(self) -> None:
        """The guest is gone: let nobody wait any more."""
        self._closed = True
        for event in (self._said_some, self._taken, self._room, self._opened, self._shut):
            event.set()

    # The device's side (avmm.devices.virtio.console.PortBackend).

    async def input(self, limit: int) -> bytes:
        """Bytes for the guest, waiting for the first."""
        while not self._typed:
            self._typed_some.clear()
            self._taken.set()
            await self._typed_some.wait()
        data = bytes(self._typed[:limit])
        del self._typed[:limit]
        return data

    def output(self, data: bytes) -> bool:
        """Bytes from the guest; False: there is no room for them, wait for :meth:`room`."""
        if len(self._said) >= _HELD:
            self._room.clear()
            return False
        self._said += data
        self._said_some.set()
        return True

    async def room(self) -> None:
        """Return when the host has read some of it."""
        await self._room.wait()

    def guest_opened(self, opened: bool) -> None:
        """The guest has opened or closed the port."""
        if opened:
            self._opened.set()
            self._shut.clear()
        else:
            self._opened.clear()
            self._shut.set()
