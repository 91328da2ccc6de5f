"""virtio-net, a network card (virtio 1.2, 5.1): a queue each way, and one for control.

What the driver sends goes to the other end of the link at once, and so does what comes from there into the driver's
buffers: a frame is copied once and waits nowhere. Where the far end or the driver has no room the frame is refused, and
whoever has it waits. TCP segments of up to 64 KiB pass whole, their checksums unfinished, both ways.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final

from avmm.devices.virtio.queue import Chain
from avmm.devices.virtio.transport import Queue, VirtioDevice
from avmm.errors import GuestError
from avmm.link import End, Frame
from avmm.memory import split

# Feature bits (5.1.3).
_F_CSUM: Final = 1 << 0
_F_GUEST_CSUM: Final = 1 << 1
_F_MTU: Final = 1 << 3
_F_MAC: Final = 1 << 5
_F_GUEST_TSO4: Final = 1 << 7
_F_GUEST_TSO6: Final = 1 << 8
_F_GUEST_ECN: Final = 1 << 9
_F_HOST_TSO4: Final = 1 << 11
_F_HOST_TSO6: Final = 1 << 12
_F_HOST_ECN: Final = 1 << 13
_F_MRG_RXBUF: Final = 1 << 15
_F_STATUS: Final = 1 << 16
_F_CTRL_VQ: Final = 1 << 17
_F_CTRL_RX: Final = 1 << 18
_F_CTRL_MAC_ADDR: Final = 1 << 23
#: What a driver must have agreed to before it is given unfinished frames.
_GUEST_OFFLOADS: Final = _F_GUEST_CSUM | _F_GUEST_TSO4 | _F_GUEST_TSO6

# struct virtio_net_hdr (5.1.6): flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, num_buffers.
_HEADER: Final = struct.Struct("<BBHHHHH")
_NEEDS_CSUM: Final = 1
_GSO_NONE, _GSO_TCPV4, _GSO_TCPV6, _GSO_ECN = 0, 1, 4, 0x80
_GSO_FEATURE: Final = {_GSO_TCPV4: _F_HOST_TSO4, _GSO_TCPV6: _F_HOST_TSO6}

_CONFIG: Final = struct.Struct("<6sHHH")  # MAC, status, pairs of queues, MTU (5.1.4)
_LINK_UP: Final = 1

#: An Ethernet frame with a VLAN tag around the longest IP packet there is, and the shortest one to have a type.
FRAME_MAX: Final = 18 + 65535
_FRAME_MIN: Final = 14

# Control commands (5.1.6.5): class and command.
_CTRL_RX, _CTRL_MAC = 0, 1
_RX_COMMANDS: Final = 6
_MAC_TABLE_SET, _MAC_ADDR_SET = 0, 1
_CTRL_OK, _CTRL_ERR = 0, 1
_CTRL_MAX: Final = 1 << 16

#: Frames of one batch: so many are sent before the driver hears that they are.
_BATCH: Final = 64


@dataclass(frozen=True, slots=True)
class NetState:
    """What the driver has set: the MAC address, and by number which receive modes are on."""

    mac: bytes
    rx_modes: tuple[bool, ...]


class Net(VirtioDevice):
    """A network card with the address ``mac`` (6 bytes); ``end`` is where its cable goes.

    ``mtu`` is what the driver is told, in bytes of a frame's payload.
    """

    device_id = 1
    queue_sizes = (256, 256, 64)
    features = (
        _F_CSUM | _F_GUEST_CSUM | _F_MTU | _F_MAC | _F_GUEST_TSO4 | _F_GUEST_TSO6 | _F_GUEST_ECN | _F_HOST_TSO4
        | _F_HOST_TSO6 | _F_HOST_ECN | _F_MRG_RXBUF | _F_STATUS | _F_CTRL_VQ | _F_CTRL_RX | _F_CTRL_MAC_ADDR
    )  # fmt: skip

    def __init__(self, mac: bytes, mtu: int = 1500, name: str = "net0") -> None:
        super().__init__()
        self.name = name
        self.end = End(self._receive)
        self.end.on_room = self._room
        self._initial_mac = mac
        self._mac = mac
        self._mtu = mtu
        self._link_up = True
        self._rx_modes = [False] * _RX_COMMANDS
        self._rx: Queue | None = None
        self._starved = False  # the far end waits for buffers
        self._may_send = asyncio.Event()
        self._may_send.set()
        #: Frames and bytes the driver has sent and been given, and frames for which its buffers were too small.
        self.counters = {"tx_frames": 0, "tx_bytes": 0, "rx_frames": 0, "rx_bytes": 0, "rx_too_long": 0}

    def config(self) -> bytes:
        """See :class:`VirtioDevice`."""
        return _CONFIG.pack(self._mac, _LINK_UP if self._link_up else 0, 1, self._mtu)

    def set_link(self, up: bool) -> None:
        """Plug the cable in or pull it out, as the driver sees it. On the event loop."""
        if up is not self._link_up:
            self._link_up = up
            if self.transport is not None:
                self.transport.config_changed()
            self.end.room()

    def workers(self, queues: Sequence[Queue]) -> list[Coroutine[Any, Any, None]]:
        """See :class:`VirtioDevice`."""
        self._rx = queues[0]
        return [self._refill(queues[0]), self._transmit(queues[1]), self._control(queues[2])]

    # From the driver

    async def _transmit(self, queue: Queue) -> None:
        async for chain in queue:
            each: Chain | None = chain
            done: list[tuple[Chain, int]] = []
            refused = False
            while each is not None:
                try:
                    frame = self._frame(each)
                except GuestError as error:
                    queue.fail(each, error)
                    break
                self._may_send.clear()
                if self._link_up and not self.end.send(frame):
                    refused = True
                    queue.unpop((each,))  # nothing is in flight meanwhile: a pause, or a reset, need not wait
                    break
                self.counters["tx_frames"] += 1
                self.counters["tx_bytes"] += len(frame.data)
                done.append((each, 0))
                each = queue.get_nowait() if len(done) < _BATCH else None
            queue.push_all(done)
            del chain, each  # their views of guest memory
            if refused:
                await self._may_send.wait()

    def _room(self) -> None:
        self._may_send.set()

    def _frame(self, chain: Chain) -> Frame:
        """The frame in ``chain``, its header checked. Raises GuestError."""
        length = chain.read_length - _HEADER.size
        if not _FRAME_MIN <= length <= FRAME_MAX:
            raise GuestError(f"a network frame of {length} bytes")
        header, payload = split(chain.readable, _HEADER.size)
        flags, gso, _, gso_size, csum_start, csum_offset, _ = _HEADER.unpack(b"".join(header))
        data = b"".join(payload)
        if not flags & _NEEDS_CSUM:
            if gso != _GSO_NONE:
                raise GuestError("a network frame to be cut up without a checksum to be finished")
            return Frame(data)
        if not self._negotiated(_F_CSUM) or not csum_start or csum_start + csum_offset + 2 > length:
            raise GuestError("a checksum outside its network frame, or never agreed on")
        if gso == _GSO_NONE:
            return Frame(data, csum_start, csum_offset)
        kind = gso & ~_GSO_ECN
        if kind not in _GSO_FEATURE or not self._negotiated(_GSO_FEATURE[kind]):
            raise GuestError(f"a network frame of segmentation type {gso}, never agreed on")
        if not gso_size or csum_start + 20 > length:
            raise GuestError("a network frame that cannot be cut up")
        return Frame(data, csum_start, csum_offset, gso_size)

    # To the driver

    def _receive(self, frame: Frame) -> bool:
        """See :class:`avmm.link.End`: into the driver's buffers at once, or not at all."""
        queue, transport = self._rx, self.transport
        if queue is None or queue.core is None or transport is None or not self._link_up:
            return True  # as on a cable without a plug
        core, features = queue.core, transport.driver_features
        if frame.csum_start and features & _GUEST_OFFLOADS != _GUEST_OFFLOADS:
            return True  # sent to the driver that was here before
        chains: list[Chain] = []
        wanted = _HEADER.size + len(frame.data)
        while wanted > 0:
            chain = queue.get_nowait()
            if chain is None:
                queue.unpop(chains)
                self._starved = core.alive
                if not core.ask_for_more():
                    queue.doorbell.ring()  # buffers have just come
                return not core.alive
            chains.append(chain)
            room = chain.write_length
            if room < (1 if chains[1:] else _HEADER.size):
                queue.unpop(chains[:-1])
                queue.fail(chain, GuestError("a network buffer without room for a frame"))
                return True
            wanted -= room
            if wanted > 0 and not features & _F_MRG_RXBUF:
                self.counters["rx_too_long"] += 1
                queue.unpop(chains)
                return True
        self._fill(queue, chains, frame)
        return True

    def _fill(self, queue: Queue, chains: list[Chain], frame: Frame) -> None:
        header, data = _header(frame, len(chains)), memoryview(frame.data)
        done: list[tuple[Chain, int]] = []
        at = 0
        for chain in chains:
            view = chain.writable[0]
            if done:
                written = 0
            elif len(view) >= len(header):
                view[: len(header)] = header
                view, written = view[len(header) :], len(header)
            else:  # a header cut up, which nobody does and anybody may (2.7.4)
                at = chain.write_length - len(header)
                done.append((chain, chain.write(header + data[:at])))
                continue
            piece = data[at : at + len(view)]
            view[: len(piece)] = piece
            at += len(piece)
            written += len(piece)
            for view in chain.writable[1:]:
                if at == len(data):
                    break
                piece = data[at : at + len(view)]
                view[: len(piece)] = piece
                at += len(piece)
                written += len(piece)
            done.append((chain, written))
        queue.push_all(done)
        self.counters["rx_frames"] += 1
        self.counters["rx_bytes"] += len(data)

    async def _refill(self, queue: Queue) -> None:
        """Say when there is room again: the driver has added buffers, or the device has been reset or resumed."""
        while True:
            await queue.doorbell.wait()
            self.end.offload = self._negotiated(_GUEST_OFFLOADS)
            if queue.core is not None:
                queue.core.want_notifications(False)
            if self._starved:
                self._starved = False
                self.end.room()

    # Control

    async def _control(self, queue: Queue) -> None:
        async for chain in queue:
            if chain.read_length < 2 or chain.read_length > _CTRL_MAX or not chain.write_length:
                queue.fail(chain, GuestError("a network control command cut short, or without room for an answer"))
                continue
            command = chain.read(_CTRL_MAX)
            done = self._command(command[0], command[1], command[2:])
            queue.push(chain, chain.write(bytes([_CTRL_OK if done else _CTRL_ERR])))

    def _command(self, kind: int, command: int, data: bytes) -> bool:
        if kind == _CTRL_RX and command < _RX_COMMANDS and len(data) == 1:
            # Kept for the driver's sake: every frame on the cable reaches it, and it takes its pick.
            self._rx_modes[command] = bool(data[0])
            return True
        if kind == _CTRL_MAC and command == _MAC_ADDR_SET and len(data) == 6:
            self._mac = data
            return True
        return kind == _CTRL_MAC and command == _MAC_TABLE_SET and _is_mac_table(data)

    # State

    def reset(self) -> None:
        """See :class:`VirtioDevice`."""
        self._mac = self._initial_mac
        self._rx_modes = [False] * _RX_COMMANDS

    def save(self) -> NetState:
        """See :class:`VirtioDevice`."""
        return NetState(self._mac, tuple(self._rx_modes))

    def restore(self, state: NetState) -> None:
        """See :class:`VirtioDevice`."""
        self._mac = state.mac
        self._rx_modes = list(state.rx_modes)

    def _negotiated(self, features: int) -> bool:
        return self.transport is not None and self.transport.driver_features & features == features


def _header(frame: Frame, buffers: int) -> bytes:
    """The virtio-net header of ``frame``, which fills so many buffers."""
    start = frame.csum_start
    if not start:
        return _HEADER.pack(0, _GSO_NONE, 0, 0, 0, 0, buffers)
    if not frame.gso_size:
        return _HEADER.pack(_NEEDS_CSUM, _GSO_NONE, 0, 0, start, frame.csum_offset, buffers)
    kind = _GSO_TCPV6 if frame.ipv6 else _GSO_TCPV4
    size = frame.header_size
    return _HEADER.pack(_NEEDS_CSUM, kind, size, frame.gso_size, start, frame.csum_offset, buffers)


def _is_mac_table(data: bytes) -> bool:
    """Two lists of addresses, unicast and multicast, each behind its length (5.1.6.5.2)."""
    for _ in range(2):
        if len(data) < 4:
            return False
        (count,) = struct.unpack_from("<I", data)
        if len(data) < 4 + 6 * count:
            return False
        data = data[4 + 6 * count :]
    return not data
