"""What the host and the agent say to each other over a byte channel: frames, sans-io. The other end: firmware/agent.

A frame is a header and up to ``PAYLOAD_MAX`` bytes. Zero bytes between frames mean nothing, so that a host that takes
over a guest in the middle of another host's frame (a fork, a restore) can end that frame with zeros, whatever it was.
It then sends SYNC with a nonce, and reads nothing before the HELLO that repeats it.

A stream of a command (0 standard input, 1 output, 2 error) may be ``WINDOW`` bytes ahead of its reader, who grants more
with CREDIT: neither side can make the other keep more. DATA without bytes is the end of a stream.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from avmm.errors import GuestError

VERSION: Final = 1
MAGIC: Final = 0xA5
HEADER: Final = struct.Struct("<BBHII")  # magic, type, stream, command, length
PAYLOAD_MAX: Final = 32768 - HEADER.size  # Linux takes 32 KiB from a port's writer at once
WINDOW: Final = 256 * 1024

SYNC, SPAWN, DATA, CREDIT, SIGNAL, RESIZE, HELLO, EXIT = range(1, 9)

_SYNC: Final = struct.Struct("<16sIIq32s")  # nonce, flags, 0, real time in ns, seed
_SYNC_CLOCK, _SYNC_RESEED = 1, 2
_HELLO: Final = struct.Struct("<16sII")  # nonce, version, commands at once
_SPAWN: Final = struct.Struct("<IHHII")  # flags, rows, columns, argc, envc
_PTY, _BUILTIN, _NO_INPUT, _MERGE = 1, 2, 4, 8
_NUMBER: Final = struct.Struct("<I")
_SIZE: Final = struct.Struct("<HH")  # rows, columns
_EXIT: Final = struct.Struct("<II")  # how, and a code, a signal or an errno

NONCE_SIZE: Final = 16
SEED_SIZE: Final = 32
EXITED, KILLED, NOT_STARTED = range(3)


@dataclass(frozen=True, slots=True)
class Frame:
    """One message. ``command`` is the host's number of a command, ``stream`` one of its streams."""

    type: int
    stream: int
    command: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Spawn:
    """A command to be started. ``builtin``: one of the agent's own, ``put`` or ``get``. ``size``: columns and rows."""

    argv: Sequence[bytes]
    env: Mapping[bytes, bytes]
    cwd: bytes
    pty: bool = False
    builtin: bool = False
    input: bool = True
    merge: bool = False
    size: tuple[int, int] = (80, 24)

    def encode(self) -> bytes:
        """The payload. Raises ValueError when it cannot be sent."""
        strings = [self.cwd, *self.argv, *(name + b"=" + value for name, value in self.env.items())]
        if not self.argv or any(b"\0" in each for each in strings) or any(b"=" in name for name in self.env):
            raise ValueError("a command's words and variables hold no NUL, and names of variables no '='")
        flags = _PTY * self.pty | _BUILTIN * self.builtin | _NO_INPUT * (not self.input) | _MERGE * self.merge
        columns, rows = self.size
        payload = _SPAWN.pack(flags, rows, columns, len(self.argv), len(self.env)) + b"".join(
            each + b"\0" for each in strings
        )
        if len(payload) > PAYLOAD_MAX or len(self.argv) + len(self.env) > 8000:
            raise ValueError(f"a command's words and variables have {len(payload)} bytes; there is room for 32,000")
        return payload


def encode(type: int, command: int, payload: bytes | memoryview = b"", stream: int = 0) -> bytes:
    """One frame."""
    return HEADER.pack(MAGIC, type, stream, command, len(payload)) + payload


def sync(nonce: bytes, realtime_ns: int | None = None, seed: bytes | None = None) -> bytes:
    """What a new host says first. ``realtime_ns`` sets the guest's clock, ``seed`` (32 bytes) its random pool."""
    flags = _SYNC_CLOCK * (realtime_ns is not None) | _SYNC_RESEED * (seed is not None)
    body = _SYNC.pack(nonce, flags, 0, realtime_ns or 0, seed or bytes(SEED_SIZE))
    return bytes(PAYLOAD_MAX + HEADER.size) + encode(SYNC, 0, body)


def data(command: int, stream: int, content: bytes | memoryview) -> Iterator[bytes]:
    """``content`` in frames; none for none."""
    for at in range(0, len(content), PAYLOAD_MAX):
        yield encode(DATA, command, content[at : at + PAYLOAD_MAX], stream)


def credit(command: int, stream: int, count: int) -> bytes:
    """The reader of ``stream`` has taken so many bytes."""
    return encode(CREDIT, command, _NUMBER.pack(count), stream)


def signal(command: int, number: int) -> bytes:
    """Send a signal to the command's process group."""
    return encode(SIGNAL, command, _NUMBER.pack(number))


def resize(command: int, columns: int, rows: int) -> bytes:
    """The size of the command's terminal."""
    return encode(RESIZE, command, _SIZE.pack(rows, columns))


def number(frame: Frame) -> int:
    """The payload of a CREDIT. Raises GuestError."""
    if len(frame.payload) != _NUMBER.size:
        raise GuestError("the agent broke its protocol: a credit of a wrong length")
    value: int = _NUMBER.unpack(frame.payload)[0]
    return value


def end(frame: Frame) -> tuple[int, int]:
    """The payload of an EXIT: one of EXITED, KILLED, NOT_STARTED, with a code, signal or errno. Raises GuestError."""
    if len(frame.payload) != _EXIT.size:
        raise GuestError("the agent broke its protocol: an end of a wrong length")
    how, value = _EXIT.unpack(frame.payload)
    if how > NOT_STARTED or value > 255:
        raise GuestError("the agent broke its protocol: an end that cannot be")
    return how, value


class Parser:
    """Turns what the agent sends into frames, from the HELLO with ``nonce`` on. Keeps no more than one frame."""

    def __init__(self, nonce: bytes) -> None:
        self._buffer = bytearray()
        self._hello = HEADER.pack(MAGIC, HELLO, 0, 0, _HELLO.size) + nonce
        self.synchronised = False

    def feed(self, content: bytes) -> list[Frame]:
        """The frames that ``content`` completes. Raises GuestError for what is no frame."""
        buffer = self._buffer
        buffer += content
        if not self.synchronised and not self._synchronise():
            return []
        frames = []
        at = 0
        while len(buffer) - at >= HEADER.size:
            magic, type, stream, command, length = HEADER.unpack_from(buffer, at)
            if magic != MAGIC or not DATA <= type <= EXIT or stream > 2 or length > PAYLOAD_MAX:
                raise GuestError("the agent broke its protocol: what it sent is no frame")
            if len(buffer) - at < HEADER.size + length:
                break
            at += HEADER.size
            frames.append(Frame(type, stream, command, bytes(buffer[at : at + length])))
            at += length
        del buffer[:at]
        return frames

    def _synchronise(self) -> bool:
        whole = HEADER.size + _HELLO.size
        at = self._buffer.find(self._hello)
        if at < 0:
            del self._buffer[: -len(self._hello)]
            return False
        del self._buffer[:at]
        if len(self._buffer) < whole:
            return False
        _, version, _ = _HELLO.unpack_from(self._buffer, HEADER.size)
        if version != VERSION:
            raise GuestError(f"the guest's agent speaks version {version} of its protocol, this avmm {VERSION}")
        del self._buffer[:whole]
        self.synchronised = True
        return True
