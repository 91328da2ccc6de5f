"""A TAP interface of the host (Linux): the guest's frames go to the host's own network stack, unfinished ones too."""

from __future__ import annotations

import asyncio
import errno
import os
import struct
import sys
from typing import Final

from avmm.errors import ConfigError, HostError
from avmm.link import End, Frame
from avmm.log import log

_DEVICE: Final = "/dev/net/tun"
# linux/if_tun.h
_TUNSETIFF, _TUNSETOFFLOAD, _TUNSETVNETHDRSZ = 0x400454CA, 0x400454D0, 0x400454D8
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_OFFLOADS: Final = 0x01 | 0x02 | 0x04 | 0x08  # checksums, TSO over IPv4 and IPv6, with ECN
# struct virtio_net_hdr of linux/virtio_net.h, in the host's byte order.
_HEADER: Final = struct.Struct("=BBHHHH")
_NEEDS_CSUM: Final = 1
_GSO_NONE, _GSO_TCPV4, _GSO_TCPV6 = 0, 1, 4

_FRAME_MAX: Final = 18 + 65535
#: Frames taken in one turn of the event loop.
_TURN: Final = 32


class Tap:
    """The interface ``name``, there already or made where the user may. Blocks. Raises HostError, ConfigError.

    ``end`` joins it to a link; :meth:`run` moves the frames.
    """

    def __init__(self, name: str) -> None:
        if sys.platform != "linux":
            raise ConfigError("--net tap= needs Linux: take --net user here")
        self.name = name
        self.end = End(self._receive, offload=True)
        self.end.on_room = self._on_room
        self._loop: asyncio.AbstractEventLoop | None = None
        self._held: Frame | None = None  # refused by the other end
        self._fd = _open(name)

    async def run(self) -> None:
        """Move frames, until cancelled."""
        loop = self._loop = asyncio.get_running_loop()
        loop.add_reader(self._fd, self._readable)
        try:
            await loop.create_future()
        finally:
            loop.remove_reader(self._fd)
            loop.remove_writer(self._fd)
            self._loop = self._held = None

    def close(self) -> None:
        """Let go of the interface: after :meth:`run` has ended."""
        os.close(self._fd)

    def _receive(self, frame: Frame) -> bool:
        try:
            os.writev(self._fd, (_header(frame), frame.data))
        except BlockingIOError:
            if self._loop is None:
                return True
            self._loop.add_writer(self._fd, self._writable)
            return False
        except OSError as error:
            # The interface is down (EIO), or the kernel does not like the frame: lost, as on any network.
            if error.errno not in (errno.EIO, errno.EINVAL):
                log.warning("tap.failed", interface=self.name, error=error.strerror)
        return True

    def _writable(self) -> None:
        assert self._loop is not None
        self._loop.remove_writer(self._fd)
        self.end.room()

    def _readable(self) -> None:
        for _ in range(_TURN):
            try:
                data = os.read(self._fd, _HEADER.size + _FRAME_MAX)
            except BlockingIOError:
                return
            except OSError as error:  # the interface is gone: it would be readable for ever
                assert self._loop is not None
                self._loop.remove_reader(self._fd)
                log.warning("tap.failed", interface=self.name, error=error.strerror)
                return
            frame = _frame(data)
            if frame is not None and not self.end.send(frame):
                assert self._loop is not None
                self._held = frame
                self._loop.remove_reader(self._fd)
                return

    def _on_room(self) -> None:
        frame, self._held = self._held, None
        if frame is None or self._loop is None:
            return
        if self.end.send(frame):
            self._loop.add_reader(self._fd, self._readable)
        else:
            self._held = frame


def _open(name: str) -> int:
    # Here, because there is none on every host.
    import fcntl

    try:
        fd = os.open(_DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(f"cannot open {_DEVICE}: {error.strerror}; take --net user where there is none") from error
    try:
        request = struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR)
        fcntl.ioctl(fd, _TUNSETIFF, request)
        fcntl.ioctl(fd, _TUNSETVNETHDRSZ, struct.pack("i", _HEADER.size))
        fcntl.ioctl(fd, _TUNSETOFFLOAD, _OFFLOADS)
    except OSError as error:
        os.close(fd)
        raise HostError(_why_not(name, error)) from error
    return fd


def _why_not(name: str, error: OSError) -> str:
    if error.errno == errno.EPERM:
        return f"the TAP interface {name} is not yours: sudo ip tuntap add dev {name} mode tap user $USER"
    if error.errno == errno.EBUSY:
        return f"the TAP interface {name} is in use by another program"
    return f"cannot use {name} as a TAP interface: {error.strerror}"


def _header(frame: Frame) -> bytes:
    start = frame.csum_start
    if not start:
        return bytes(_HEADER.size)
    if not frame.gso_size:
        return _HEADER.pack(_NEEDS_CSUM, _GSO_NONE, 0, 0, start, frame.csum_offset)
    kind = _GSO_TCPV6 if frame.ipv6 else _GSO_TCPV4
    return _HEADER.pack(_NEEDS_CSUM, kind, frame.header_size, frame.gso_size, start, frame.csum_offset)


def _frame(data: bytes) -> Frame | None:
    """What the kernel sent; None for what is no frame."""
    if len(data) < _HEADER.size + 14:
        return None
    flags, gso, _, gso_size, start, offset = _HEADER.unpack_from(data)
    whole = memoryview(data)[_HEADER.size :]
    if not flags & _NEEDS_CSUM:
        return Frame(whole)
    return Frame(whole, start, offset, 0 if gso == _GSO_NONE else gso_size)
