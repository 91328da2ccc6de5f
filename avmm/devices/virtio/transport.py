"""virtio-mmio, the register file in front of every virtio device (virtio 1.2, 4.2.2), modern only.

:class:`VirtioMmio` is the bus device: registers, negotiation, interrupts, and what becomes of a guest that breaks the
rules. A :class:`VirtioDevice` is what stands behind it: features, configuration space, and one coroutine per queue
that says ``async for chain in queue``. A reset at any time is safe: the queue goes quiet, and chains still in work are
dropped when they are given back.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final

from avmm.devices.virtio.queue import Chain, Layout, Virtqueue
from avmm.errors import GuestError
from avmm.fdt import LEVEL, Node, Placement
from avmm.irq import IrqLine
from avmm.log import log
from avmm.memory import GuestMemory

VIRTIO_MMIO_SIZE: Final = 0x200

_MAGIC: Final = 0x000
_VERSION: Final = 0x004
_DEVICE_ID: Final = 0x008
_VENDOR_ID: Final = 0x00C
_DEVICE_FEATURES: Final = 0x010
_DEVICE_FEATURES_SEL: Final = 0x014
_DRIVER_FEATURES: Final = 0x020
_DRIVER_FEATURES_SEL: Final = 0x024
_QUEUE_SEL: Final = 0x030
_QUEUE_NUM_MAX: Final = 0x034
_QUEUE_NUM: Final = 0x038
_QUEUE_READY: Final = 0x044
_QUEUE_NOTIFY: Final = 0x050
_INTERRUPT_STATUS: Final = 0x060
_INTERRUPT_ACK: Final = 0x064
_STATUS: Final = 0x070
# Low and high halves of a queue's three addresses, by offset: (index of the address, shift).
_QUEUE_ADDRESS: Final = {
    0x080: (0, 0), 0x084: (0, 32),
    0x090: (1, 0), 0x094: (1, 32),
    0x0A0: (2, 0), 0x0A4: (2, 32),
}  # fmt: skip
_SHM_FIRST, _SHM_LAST = 0x0B0, 0x0BC
_CONFIG_GENERATION: Final = 0x0FC
_CONFIG: Final = 0x100

#: Device status bits (2.1).
ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, FAILED = 1, 2, 4, 8, 64, 128
_SETTABLE: Final = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED

#: Feature bits that belong to the transport (6).
F_INDIRECT_DESC: Final = 1 << 28
F_EVENT_IDX: Final = 1 << 29
F_VERSION_1: Final = 1 << 32
_TRANSPORT_FEATURES: Final = F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1

#: Bits of the interrupt status: a used buffer, a change of configuration.
USED, CONFIG_CHANGED = 1, 2

_WORD: Final = 0xFFFFFFFF
_VENDOR: Final = 0x4D4D5641  # "AVMM"
_STATE_VERSION: Final = 1
# Chains that one queue may take in one turn of the event loop, so that a busy device leaves time to the others.
_TURN: Final = 64
# Chains that may be served at one notification, before the vCPU goes on.
_AT_ONCE: Final = 4
# A guest can break rules as fast as it likes: the log takes so many of each device, the counter all.
_LOGGED: Final = 10


class Doorbell:
    """Wakes one coroutine from any thread. A ring while nobody waits is remembered."""

    def __init__(self) -> None:
        self._rung = False
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None

    def ring(self) -> None:
        """Any thread; cheap when it has been rung already."""
        self._rung = True
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            waiter[0].call_soon_threadsafe(_resolve, waiter[1])

    @property
    def awaited(self) -> bool:
        """Whether somebody sleeps until it is rung."""
        return self._waiter is not None

    async def wait(self) -> None:
        """Return when it has been rung since the last time."""
        loop = asyncio.get_running_loop()
        while not self._rung:
            future = loop.create_future()
            # Published before the second look: a ring is then either seen or finds the future.
            self._waiter = (loop, future)
            if self._rung:
                break
            await future
        self._waiter = None
        self._rung = False


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class Queue:
    """One queue of a device as its coroutine sees it, through resets and pauses: ``async for chain in queue``."""

    def __init__(self, transport: VirtioMmio, index: int, size_max: int) -> None:
        self._transport = transport
        self.index = index
        self.size_max = size_max
        self.doorbell = Doorbell()
        self.core: Virtqueue | None = None  # while the driver has made it ready
        self.size = 0
        self.addresses = [0, 0, 0]
        self._turn = 0

    def __aiter__(self) -> AsyncIterator[Chain]:
        return self

    async def __anext__(self) -> Chain:
        return await self.get()

    async def get(self) -> Chain:
        """The next chain. What the guest does wrong ends in :meth:`VirtioMmio.broken`; the wait goes on."""
        self._turn += 1
        if self._turn >= _TURN:
            await asyncio.sleep(0)
            self._turn = 0
        while True:
            chain = self.get_nowait()
            if chain is not None:
                return chain
            if not self._sleepable():
                continue
            await self.doorbell.wait()
            self._turn = 0
            if self.core is not None:
                self.core.want_notifications(False)

    def notified(self) -> None:
        """The driver has offered chains. On the vCPU's thread, under the VM's lock."""
        core = self.core
        idle = core is not None and not core.in_flight and self.doorbell.awaited
        if not (self._transport.device.serves_now and idle and self._serve_now()):
            self.doorbell.ring()

    def _serve_now(self) -> bool:
        """While the worker sleeps: do what the device can do at once. Whether nothing is left for the worker.

        With nothing in flight and the lock held, the worker is at nothing that this could meet.
        """
        device = self._transport.device
        done: list[tuple[Chain, int]] = []
        drained = False
        while len(done) < _AT_ONCE:
            chain = self.get_nowait()
            if chain is None:
                drained = True
                break
            try:
                written = device.serve_now(chain)
            except GuestError as error:
                self.fail(chain, error)
                break
            if written is None:
                self.unpop([chain])
                break
            done.append((chain, written))
        self.push_all(done)
        return drained and self._sleepable()

    def get_nowait(self) -> Chain | None:
        """The next chain if there is one now, and the device is running."""
        core = self.core
        if core is None or not self._transport.working:
            return None
        try:
            return core.pop()
        except GuestError as error:
            self._transport.broken(error)
            return None

    def push(self, chain: Chain, written: int = 0) -> None:
        """Give ``chain`` back with ``written`` bytes written; the driver gets an interrupt if it wants one."""
        self.push_all(((chain, written),))

    def push_all(self, done: Sequence[tuple[Chain, int]]) -> None:
        """The same for several chains, taken one after the other: the driver sees all of them at once."""
        if done:
            if done[0][0].queue.push_all(done):
                self._transport.interrupt(USED)
            self._transport.settled()

    def unpop(self, chains: Sequence[Chain]) -> None:
        """Put back the last chains that were taken, as if they had not been."""
        if chains:
            chains[0].queue.unpop(chains)
            self._transport.settled()

    def fail(self, chain: Chain, error: GuestError) -> None:
        """The request in ``chain`` breaks a rule: it is dropped, and the device waits to be reset."""
        chain.queue.drop(chain)
        self._transport.broken(error)
        self._transport.settled()

    def _sleepable(self) -> bool:
        """Ask to be notified; False when there is work after all."""
        core = self.core
        if core is None or not self._transport.working:
            return True
        core.want_notifications(True)
        try:
            return not core.has_more()
        except GuestError as error:
            self._transport.broken(error)
            return True

    def reset(self) -> None:
        """As after power-on; under the VM's lock."""
        if self.core is not None:
            self._transport.abandon(self.core)
            self.core = None
        self.size = self.size_max
        self.addresses = [0, 0, 0]


class VirtioDevice:
    """What a device is behind its transport; one subclass for each kind.

    ``features`` are its own feature bits, ``queue_sizes`` the largest size of each queue; ``serves_now``:
    :meth:`serve_now` is worth asking for the next chain.
    """

    device_id: int = 0  # of a slot without a device
    name: str = "none"
    features: int = 0
    queue_sizes: tuple[int, ...] = (256,)
    serves_now: bool = False

    def __init__(self) -> None:
        self.transport: VirtioMmio | None = None  # set by the transport that carries it

    def config(self) -> bytes:
        """The configuration space. On the vCPU thread, under the VM's lock."""
        return b""

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver writes ``data`` into the configuration space: ignored where nothing is writable."""

    def serve_now(self, chain: Chain) -> int | None:
        """Do at once what ``chain`` asks for: how many bytes of it were written; None leaves it to the worker.

        On the vCPU's thread, under the VM's lock: only what is small and cannot block. Raises GuestError.
        """
        return None

    def workers(self, queues: Sequence[Queue]) -> list[Coroutine[Any, Any, None]]:
        """A coroutine for each thing the device does at once, through all resets. Of what the guest does wrong they
        tell :meth:`Queue.fail`."""
        return []

    def reset(self) -> None:
        """Forget what the driver has set; under the VM's lock."""

    def save(self) -> Any:
        """The device's own state, plain data, for a snapshot; None where it has none."""
        return None

    def restore(self, state: Any) -> None:
        """Back to what :meth:`save` gave."""


@dataclass(frozen=True, slots=True)
class QueueState:
    """One queue: its registers, whether it is ready, and the next entries of its two rings."""

    size: int
    addresses: tuple[int, int, int]
    ready: bool
    position: tuple[int, int]


@dataclass(frozen=True, slots=True)
class VirtioState:
    """The register file, the queues, and in ``device`` what the device itself adds."""

    version: int
    status: int
    selectors: tuple[int, int, int]  # device features, driver features, queue
    driver_features: int
    interrupt_status: int
    generation: int
    queues: tuple[QueueState, ...]
    device: Any


class VirtioMmio:
    """A virtio device on the bus, in a window of :data:`VIRTIO_MMIO_SIZE` bytes, with its interrupt output ``irq``.

    Registers are used with ``lock`` (the VM's) held; the other methods take it. :meth:`run` does the device's work.
    """

    def __init__(self, lock: threading.RLock, irq: IrqLine, memory: GuestMemory, device: VirtioDevice) -> None:
        self._lock: Final = lock
        self._irq: Final = irq
        self._memory: Final = memory
        self.device: Final = device
        device.transport = self
        self.features: Final = device.features | _TRANSPORT_FEATURES
        self.queues: Final = [Queue(self, index, size) for index, size in enumerate(device.queue_sizes)]
        #: How often the guest broke a rule, and how it did last.
        self.guest_errors = 0
        self.last_error: GuestError | None = None
        self._paused = False
        self._idle: asyncio.Event | None = None  # set when nothing is in flight, while somebody waits for it
        self._abandoned: list[Virtqueue] = []  # of before the last reset, with chains still in flight
        self._status_before = 0
        self._level = False
        self._generation = 0
        self._reset_registers()

    def _reset_registers(self) -> None:
        self._status_before = self._status = 0
        self._device_sel = self._driver_sel = self._queue_sel = 0
        self.driver_features = 0
        self._isr = 0
        self.working = False  # the driver is ready, and nothing is wrong
        for queue in self.queues:
            queue.reset()

    # The guest's side

    def read(self, offset: int, size: int) -> int:
        """See :class:`avmm.bus.Device`."""
        if offset >= _CONFIG:
            at = offset - _CONFIG
            return int.from_bytes(self.device.config()[at : at + size], "little")
        if size != 4 or offset % 4:  # 4.2.2.2: the driver uses 32-bit aligned accesses only
            return 0
        if offset == _INTERRUPT_STATUS:
            return self._isr
        if offset == _STATUS:
            # 2.4: a reset is complete when this reads 0, and then the device touches no memory any more.
            return self._status or (self._status_before if self._in_flight() else 0)
        if offset == _MAGIC:
            return 0x74726976
        if offset == _VERSION:
            return 2
        if offset == _DEVICE_ID:
            return self.device.device_id
        if offset == _VENDOR_ID:
            return _VENDOR
        if offset == _DEVICE_FEATURES:
            return self.features >> 32 * self._device_sel & _WORD if self._device_sel < 2 else 0
        if offset == _QUEUE_NUM_MAX:
            queue = self._selected()
            return 0 if queue is None else queue.size_max
        if offset == _QUEUE_READY:
            queue = self._selected()
            return int(queue is not None and queue.core is not None)
        if offset == _CONFIG_GENERATION:
            return self._generation
        if _SHM_FIRST <= offset <= _SHM_LAST:
            return _WORD  # there is no shared memory region: its length is all ones (4.2.2.2)
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """See :class:`avmm.bus.Device`."""
        if offset == _QUEUE_NOTIFY:
            if size == 4 and value < len(self.queues):
                self.queues[value].notified()
        elif offset >= _CONFIG:
            self.device.write_config(offset - _CONFIG, value.to_bytes(size, "little"))
        elif size != 4 or offset % 4:
            return
        elif offset == _INTERRUPT_ACK:
            self._isr &= ~value
            self._drive()
        elif offset == _STATUS:
            self._write_status(value)
        elif offset == _QUEUE_SEL:
            self._queue_sel = value
        elif offset == _DEVICE_FEATURES_SEL:
            self._device_sel = value
        elif offset == _DRIVER_FEATURES_SEL:
            self._driver_sel = value
        elif offset == _DRIVER_FEATURES:
            if self._driver_sel < 2 and not self._status & FEATURES_OK:
                shift = 32 * self._driver_sel
                self.driver_features = self.driver_features & ~(_WORD << shift) | value << shift
        else:
            self._write_queue(offset, value)

    def _write_queue(self, offset: int, value: int) -> None:
        queue = self._selected()
        if queue is None:
            return
        if offset == _QUEUE_READY:
            if not value & 1:
                if queue.core is not None:
                    self.abandon(queue.core)
                    queue.core = None
            elif queue.core is None:
                try:
                    queue.core = self._ready(queue)
                except GuestError as error:
                    self.broken(error)
        elif queue.core is not None:
            return  # 4.2.2.2: not while the queue is ready
        elif offset == _QUEUE_NUM:
            queue.size = value
        elif offset in _QUEUE_ADDRESS:
            which, shift = _QUEUE_ADDRESS[offset]
            queue.addresses[which] = queue.addresses[which] & ~(_WORD << shift) | value << shift

    def _ready(self, queue: Queue) -> Virtqueue:
        if queue.size > queue.size_max:
            raise GuestError(f"virtqueue {queue.index} has {queue.size} entries; it may have {queue.size_max}")
        return Virtqueue(
            self._lock,
            self._memory,
            Layout(queue.size, *queue.addresses),
            event_idx=bool(self.driver_features & F_EVENT_IDX),
            indirect=bool(self.driver_features & F_INDIRECT_DESC),
        )

    def _write_status(self, value: int) -> None:
        if not value & 0xFF:
            before = self._status or self._status_before
            self._reset_registers()
            self._status_before = before
            self.device.reset()
            self._drive()
            self._ring()
            return
        status = self._status | value & _SETTABLE  # 2.1.1: a driver clears no bit
        if status & FEATURES_OK and not self._status & FEATURES_OK:
            wanted = self.driver_features
            if wanted & ~self.features or not wanted & F_VERSION_1:
                status &= ~FEATURES_OK
        if not status & FEATURES_OK:
            status &= ~DRIVER_OK  # 3.1.1: features first
        self._status = status
        self._update_working()

    def _selected(self) -> Queue | None:
        return self.queues[self._queue_sel] if self._queue_sel < len(self.queues) else None

    def _update_working(self) -> None:
        wanted = DRIVER_OK | FEATURES_OK
        bad = NEEDS_RESET | FAILED
        self.working = self._status & wanted == wanted and not self._status & bad and not self._paused
        if self.working:
            self._ring()

    def _ring(self) -> None:
        for queue in self.queues:
            queue.doorbell.ring()

    def describe(self) -> dict[str, Any]:
        """Its registers and queues, for people to read."""
        with self._lock:
            return {
                "name": self.device.name,
                "status": self._status,
                "features": hex(self.driver_features),
                "interrupt_status": self._isr,
                "guest_errors": self.guest_errors,
                "last_error": None if self.last_error is None else str(self.last_error),
                "queues": [
                    {"index": queue.index, "position": queue.core.position, "in_flight": queue.core.in_flight}
                    for queue in self.queues
                    if queue.core is not None
                ],
            }

    # The device's side

    def interrupt(self, reason: int) -> None:
        """Set a bit of the interrupt status, USED or CONFIG_CHANGED. Any thread."""
        with self._lock:
            self._isr |= reason
            self._drive()

    def config_changed(self) -> None:
        """The configuration space has changed: tell the driver. Any thread."""
        with self._lock:
            self._generation = self._generation + 1 & _WORD
            if self._status & DRIVER_OK:
                self.interrupt(CONFIG_CHANGED)

    def discard(self, gpa: int, length: int) -> int:
        """The guest needs nothing of what is there: see :meth:`GuestMemory.discard`. Raises GuestError."""
        with self._lock:
            return self._memory.discard(gpa, length)

    def broken(self, error: GuestError) -> None:
        """The guest broke a rule: count it, and stop until the driver resets the device (2.1.2)."""
        with self._lock:
            self.guest_errors += 1
            self.last_error = error.with_traceback(None)  # whose frames would hold views of guest memory
            if self.guest_errors <= _LOGGED:
                log.warning("virtio.guest_error", device=self.device.name, error=str(error))
            self._status |= NEEDS_RESET
            self._update_working()
            if self._status & DRIVER_OK:
                self.interrupt(CONFIG_CHANGED)

    def abandon(self, core: Virtqueue) -> None:
        """A queue that is gone; what it has in flight is still on its way. Under the VM's lock."""
        core.close()
        self._abandoned = [each for each in (*self._abandoned, core) if each.in_flight]

    def settled(self) -> None:
        """A chain has been given back: see whether somebody waits for the last one."""
        if self._idle is not None and not self._in_flight():
            self._idle.set()

    def _in_flight(self) -> bool:
        return any(queue.core is not None and queue.core.in_flight for queue in self.queues) or any(
            core.in_flight for core in self._abandoned
        )

    def _drive(self) -> None:
        level = bool(self._isr)
        if level is not self._level:
            self._level = level
            self._irq.set(level)

    async def run(self) -> None:
        """Do the device's work, for ever."""
        async with asyncio.TaskGroup() as tasks:
            for worker in self.device.workers(self.queues):
                tasks.create_task(worker)

    # The machine's side

    async def pause(self) -> None:
        """Take no more chains, and return when none is in flight. Pausing a paused device does nothing."""
        with self._lock:
            self._paused = True
            self._update_working()
        self._idle = asyncio.Event()
        if self._in_flight():
            await self._idle.wait()
        self._idle = None

    def resume(self) -> None:
        """Go on after :meth:`pause`."""
        with self._lock:
            self._paused = False
            self._update_working()

    def close(self) -> None:
        """Let go of guest memory: after :meth:`run` has ended."""
        self.reset()

    def reset(self) -> None:
        """As after power-on."""
        with self._lock:
            self._reset_registers()
            self._generation = 0
            self.device.reset()
            self._drive()

    def save(self) -> VirtioState:
        """The state for a snapshot; while paused."""
        with self._lock:
            queues = tuple(
                QueueState(
                    queue.size,
                    (queue.addresses[0], queue.addresses[1], queue.addresses[2]),
                    queue.core is not None,
                    queue.core.position if queue.core is not None else (0, 0),
                )
                for queue in self.queues
            )
            selectors = (self._device_sel, self._driver_sel, self._queue_sel)
            return VirtioState(
                _STATE_VERSION, self._status, selectors, self.driver_features, self._isr, self._generation, queues,
                self.device.save(),
            )  # fmt: skip

    def restore(self, state: VirtioState) -> None:
        """Back to a saved state, guest memory first; the interrupt line is put back without an edge."""
        if state.version != _STATE_VERSION:
            raise ValueError(f"virtio state version {state.version} is not {_STATE_VERSION}")
        with self._lock:
            self._reset_registers()
            self._device_sel, self._driver_sel, self._queue_sel = state.selectors
            self.driver_features = state.driver_features
            for queue, saved in zip(self.queues, state.queues, strict=True):
                queue.size, queue.addresses = saved.size, list(saved.addresses)
                if saved.ready:
                    queue.core = self._ready(queue)
                    queue.core.position = saved.position
            self._status, self._isr, self._generation = state.status, state.interrupt_status, state.generation
            self.device.restore(state.device)
            self._level = bool(self._isr)
            self._irq.restore(self._level)
            self._update_working()

    def fdt_node(self, placement: Placement) -> Node:
        """The device-tree node."""
        return Node(
            f"virtio_mmio@{placement.base:x}",
            {
                "compatible": "virtio,mmio",
                "reg": placement.reg,
                "interrupts": placement.interrupts(LEVEL),
                "dma-coherent": b"",
            },
        )


class EmptySlots:
    """Slots with nothing in them: device ID 0, which a driver passes over (4.2.2)."""

    def read(self, offset: int, size: int) -> int:
        """See :class:`avmm.bus.Device`."""
        values = {_MAGIC: 0x74726976, _VERSION: 2, _VENDOR_ID: _VENDOR}
        return values.get(offset % VIRTIO_MMIO_SIZE, 0) if size == 4 else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """See :class:`avmm.bus.Device`."""
