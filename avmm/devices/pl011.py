"""PL011, the UART (Arm DDI 0183).

Transmission is instantaneous: a byte written to DR is in the backend before the write returns, unless the backend has
said that it is blocked. Reception is flow-controlled from the host's side: bytes enter the receive FIFO only while the
guest is listening and there is room, so that nothing is lost however fast the host sends.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from dataclasses import dataclass
from typing import Final, Protocol

from avmm.devices.primecell import WINDOW, identification
from avmm.fdt import CLOCK_PHANDLE, LEVEL, Node, Placement, cells
from avmm.irq import IrqLine

PL011_SIZE: Final = WINDOW

_DR: Final = 0x00
_RSR: Final = 0x04
_FR: Final = 0x18
_ILPR: Final = 0x20
_IBRD: Final = 0x24
_FBRD: Final = 0x28
_LCR_H: Final = 0x2C
_CR: Final = 0x30
_IFLS: Final = 0x34
_IMSC: Final = 0x38
_RIS: Final = 0x3C
_MIS: Final = 0x40
_ICR: Final = 0x44
_DMACR: Final = 0x48

# Registers that only hold what was written: offset -> (writable bits, reset value). The line is instantaneous, so
# baud rate and modem outputs have no effect; there is no DMA controller.
_PLAIN: Final = {
    _ILPR: (0xFF, 0),
    _IBRD: (0xFFFF, 0),
    _FBRD: (0x3F, 0),
    _LCR_H: (0xFF, 0),
    _CR: (0xFF87, 0x300),
    _IFLS: (0x3F, 0x12),
    _IMSC: (0x7FF, 0),
    _DMACR: (0x7, 0),
}
_ID: Final = identification(0x11, 0x10, 0x14, 0x00)

# Flag register. The modem inputs are up: a guest that asks for hardware flow control finds a willing peer.
_FR_MODEM: Final = 1 << 0 | 1 << 1 | 1 << 2  # CTS, DSR, DCD
_FR_BUSY: Final = 1 << 3
_FR_RXFE: Final = 1 << 4
_FR_TXFF: Final = 1 << 5
_FR_RXFF: Final = 1 << 6
_FR_TXFE: Final = 1 << 7

_INT_RX: Final = 1 << 4
_INT_TX: Final = 1 << 5
_INT_RT: Final = 1 << 6
_INT_BE: Final = 1 << 9
_INT_OE: Final = 1 << 10

_DR_BE: Final = 1 << 10
_LCR_H_FEN: Final = 1 << 4
_CR_LBE: Final = 1 << 7

_FIFO_DEPTH: Final = 32
# IFLS.RXIFLSEL -> characters; the reserved values act like the highest.
_RX_TRIGGER: Final = (4, 8, 16, 24, 28, 28, 28, 28)
# Linux empties the FIFO when it opens the port, before it unmasks the receive interrupts: what has arrived by then is
# lost. So nothing is delivered while they are masked, unless the guest polls: reads FR this often and nothing else.
_POLLING: Final = 16

# It unmasks them for a while before that, too. So a guest that clears the receive interrupts after it enabled the
# UART, on its way to emptying the FIFO, is shown an empty one, once: it goes on, and finds the characters later.

_BYTES: Final = tuple(bytes((n,)) for n in range(256))
_STATE_VERSION: Final = 1


class SerialBackend(Protocol):
    """The host's end of a serial line: asynchronous towards the host, immediate towards the guest."""

    async def read(self, limit: int) -> bytes:
        """Wait for input: 1..``limit`` bytes, or ``b""`` when there will be no more. On the event loop."""
        ...

    def write(self, data: bytes) -> None:
        """Take the guest's output. On a vCPU thread under the VM's lock: cheap, never blocks, never raises.

        How much is kept when the host does not keep up is the backend's policy; see :attr:`Pl011.tx_blocked`.
        """
        ...


class Batch(Protocol):
    """Takes the guest's output in our place while it is open, and shows it the flags: no exits."""

    def open(self, flags: int) -> None:
        """From now on, FR reads as ``flags``."""
        ...

    def close(self) -> bytes:
        """No longer; the output it has taken."""
        ...


@dataclass(frozen=True, slots=True)
class Pl011State:
    """The register file and the receive FIFO (characters with their error bits, as DR shows them)."""

    version: int
    plain: tuple[tuple[int, int], ...]
    ris: int
    rsr: int
    fifo: tuple[int, ...]


class Pl011:
    """A PL011 whose interrupt output is ``irq``; a bus device with a window of :data:`PL011_SIZE` bytes.

    Registers are used with ``lock`` held; the other methods take it. :meth:`run` carries the backend's input in.
    With a ``batch``, whoever reads what was written to the backend calls :meth:`collect` first, and soon after a write.
    """

    def __init__(self, lock: threading.RLock, irq: IrqLine, backend: SerialBackend, batch: Batch | None = None) -> None:
        self._lock: Final = lock
        self._irq: Final = irq
        self._backend: Final = backend
        self._transmit: Final = backend.write
        self._batch: Final = batch
        self._batching = False  # the batch is open
        self._fifo: Final[deque[int]] = deque()
        self._plain: dict[int, int] = {}
        self._level = False
        self._tx_blocked = False
        self._tx_owed = False  # something was written while blocked: its interrupt is still to come
        self._feeder: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None  # waits for room
        self.transmitted = 0
        self.received = 0
        self._reset_registers()

    def _reset_registers(self) -> None:
        self._plain = {offset: reset for offset, (_, reset) in _PLAIN.items()}
        self._fifo.clear()
        self._ris = self._rsr = self._polls = 0
        self._imsc = 0
        self._enabled = False  # CR was written, the receive interrupts not cleared since
        self._hidden = False  # the next look at FR finds the receive FIFO empty

    # The guest's side

    def read(self, offset: int, size: int) -> int:
        """See :class:`avmm.bus.Device`."""
        if self._batching:
            self._close_batch()
        if offset == _FR:
            self._polls += 1
            if self._polls == _POLLING:
                self._wake_feeder()
            value = self._flags()
            if self._hidden:
                self._hidden = False
                value = value & ~_FR_RXFF | _FR_RXFE
                self._receive_changed()
                self._update()
        elif offset == _DR:
            value = self._receive_one()
        elif offset == _RSR:
            value = self._rsr
        elif offset == _RIS:
            value = self._ris
        elif offset == _MIS:
            value = self._ris & self._imsc
        elif offset in self._plain:
            value = self._plain[offset]
        else:
            value = _ID.get(offset, 0)
        return value & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """See :class:`avmm.bus.Device`."""
        if self._batching:
            self._close_batch()
        self._polls = 0
        if offset == _DR:
            if self._plain[_CR] & _CR_LBE:
                self._push(value & 0xFF)
            else:
                # Whether UARTEN and TXE are set does not matter: early consoles rely on firmware having set them.
                self._transmit(_BYTES[value & 0xFF])
                self.transmitted += 1
            if self._tx_blocked:
                self._tx_owed = True
            else:
                self._ris |= _INT_TX  # the FIFO has fallen through its trigger level already
                self._open_batch()
        elif offset == _ICR:
            self._ris &= ~value
            if self._enabled and value & (_INT_RX | _INT_RT):
                self._enabled = False
                self._hidden = True
        elif offset in self._plain:
            self._plain[offset] = value & _PLAIN[offset][0]
            if offset == _IMSC:
                self._imsc = self._plain[_IMSC]
                self._wake_feeder()
            elif offset in (_IFLS, _LCR_H):
                self._receive_changed()
            elif offset == _CR:
                self._enabled = True
        elif offset == _RSR:
            self._rsr = 0
        else:
            return
        self._update()

    def _open_batch(self) -> None:
        """More output changes nothing that the guest could see, until it touches another register or the host acts."""
        if self._batch is not None and not (
            self._plain[_CR] & _CR_LBE or self._imsc & _INT_TX or self._hidden or self._tx_blocked
        ):
            self._batch.open(self._flags())
            self._batching = True

    def _close_batch(self) -> None:
        """Before anything else happens: what it has taken came earlier."""
        if self._batch is not None and self._batching:
            self._batching = False
            data = self._batch.close()
            if data:
                self._transmit(data)
                self.transmitted += len(data)

    def _flags(self) -> int:
        flags = _FR_MODEM
        held = len(self._fifo)
        if not held:
            flags |= _FR_RXFE
        elif held >= self._depth():
            flags |= _FR_RXFF
        return flags | (_FR_TXFF | _FR_BUSY if self._tx_blocked else _FR_TXFE)

    def _depth(self) -> int:
        return _FIFO_DEPTH if self._plain[_LCR_H] & _LCR_H_FEN else 1

    def _receive_one(self) -> int:
        if not self._fifo:
            return 0
        value = self._fifo.popleft()
        self._polls = 0
        self._rsr = value >> 8 & 0xF
        self._receive_changed()
        self._update()
        # Refilled only when empty: one trip to the event loop per FIFO, and the guest can work between two of them.
        if not self._fifo:
            self._wake_feeder()
        return value

    def _push(self, character: int) -> None:
        if len(self._fifo) < self._depth():
            self._fifo.append(character)
        else:
            self._ris |= _INT_OE  # only in loopback: everything else asks for room first
        self._receive_changed()

    def _receive_changed(self) -> None:
        """RX follows the trigger level; RT holds while there is less, since no more is on its way (2.8)."""
        held = len(self._fifo)
        trigger = _RX_TRIGGER[self._plain[_IFLS] >> 3] if self._plain[_LCR_H] & _LCR_H_FEN else 1
        self._ris &= ~(_INT_RX | _INT_RT)
        if held >= trigger:
            self._ris |= _INT_RX
        elif held:
            self._ris |= _INT_RT

    def _update(self) -> None:
        level = bool(self._ris & self._imsc)
        if level is not self._level:
            self._level = level
            self._irq.set(level)

    # The host's side

    def collect(self) -> None:
        """Write to the backend what the batch has taken."""
        with self._lock:
            self._close_batch()

    @property
    def listening(self) -> bool:
        """Whether input given to the guest now would reach it."""
        return bool(self._imsc & (_INT_RX | _INT_RT)) or self._polls >= _POLLING

    def receive(self, data: bytes | memoryview) -> int:
        """Put the first bytes of ``data`` into the receive FIFO; how many it took, 0 when full or not listening."""
        with self._lock:
            room = self._depth() - len(self._fifo) if self.listening else 0
            taken = min(len(data), max(room, 0))
            if taken:
                self._close_batch()  # the flags change
                self._fifo.extend(data[:taken])
                self.received += taken
                self._receive_changed()
                self._update()
            return taken

    def send_break(self) -> bool:
        """A break condition on the line (SysRq on a Linux console); False when there was no room for it."""
        with self._lock:
            if not self.listening or len(self._fifo) >= self._depth():
                return False
            self._close_batch()
            self._fifo.append(_DR_BE)
            self._ris |= _INT_BE
            self._receive_changed()
            self._update()
            return True

    @property
    def tx_blocked(self) -> bool:
        """Set by the backend, on any thread, while it wants no output: FR shows a full FIFO, TX interrupts wait."""
        return self._tx_blocked

    @tx_blocked.setter
    def tx_blocked(self, blocked: bool) -> None:
        with self._lock:
            self._close_batch()
            self._tx_blocked = blocked
            if not blocked and self._tx_owed:
                self._tx_owed = False
                self._ris |= _INT_TX
                self._update()

    async def run(self) -> None:
        """Carry the backend's input into the FIFO as room appears, until the backend's input ends."""
        room = asyncio.Event()
        loop = asyncio.get_running_loop()
        while data := memoryview(await self._backend.read(4096)):
            while True:
                room.clear()
                with self._lock:
                    data = data[self.receive(data) :]
                    if not data:
                        break
                    self._feeder = (loop, room)
                try:
                    await room.wait()
                finally:
                    self._feeder = None

    def _wake_feeder(self) -> None:
        feeder = self._feeder
        if feeder is not None and not self._fifo and self.listening:
            self._feeder = None
            loop, room = feeder
            loop.call_soon_threadsafe(room.set)

    # The machine's side

    def reset(self) -> None:
        """Registers to their reset values; characters the guest has not read are gone."""
        with self._lock:
            self._close_batch()
            self._reset_registers()
            self._tx_owed = False
            self._update()

    def save(self) -> Pl011State:
        """The state for a snapshot."""
        with self._lock:
            self._close_batch()
            ris = self._ris | _INT_TX if self._tx_owed else self._ris
            return Pl011State(_STATE_VERSION, tuple(self._plain.items()), ris, self._rsr, tuple(self._fifo))

    def restore(self, state: Pl011State) -> None:
        """Back to a saved state; the interrupt line is put back without an edge."""
        if state.version != _STATE_VERSION:
            raise ValueError(f"PL011 state version {state.version} is not {_STATE_VERSION}")
        with self._lock:
            self._close_batch()
            self._plain = dict(state.plain)
            self._imsc = self._plain[_IMSC]
            self._ris, self._rsr = state.ris, state.rsr
            self._fifo.clear()
            self._fifo.extend(state.fifo)
            self._polls = 0
            self._level = bool(self._ris & self._imsc)
            self._irq.restore(self._level)
            self._wake_feeder()

    @staticmethod
    def fdt_node(placement: Placement) -> Node:
        """The device-tree node. Without its clocks Linux does not bind a PrimeCell."""
        return Node(
            f"pl011@{placement.base:x}",
            {
                "compatible": ["arm,pl011", "arm,primecell"],
                "reg": placement.reg,
                "interrupts": placement.interrupts(LEVEL),
                "clocks": cells(CLOCK_PHANDLE, CLOCK_PHANDLE),
                "clock-names": ["uartclk", "apb_pclk"],
            },
        )
