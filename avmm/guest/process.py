"""A command that runs in the guest, as asyncio sees it: streams with flow control, signals, an end."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import signal
from collections.abc import Callable
from types import TracebackType
from typing import Final

from avmm.aio import within
from avmm.errors import GuestError
from avmm.guest import protocol
from avmm.guest.protocol import Frame

#: Bytes a reader holds before its command has to wait; it may hold twice that and a window.
_LIMIT: Final = 64 * 1024


class Input:
    """The standard input of a command: ``write``, ``await drain()``, ``write_eof``."""

    def __init__(self, send: Callable[[bytes], None], number: int) -> None:
        self._send = send
        self._number = number
        self._waiting = bytearray()
        self._credit = protocol.WINDOW
        self._ending = False
        self._closed: BaseException | None = None
        self._room = asyncio.Event()
        self._room.set()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Queue ``data``; what comes after :meth:`write_eof`, or when nobody reads any more, is dropped."""
        if data and not self._ending and self._closed is None:
            self._waiting += data
            self._room.clear()
            self._pump()

    def write_eof(self) -> None:
        """There is no more. On a terminal, that is Ctrl-D."""
        if not self._ending:
            self._ending = True
            self._pump()

    async def drain(self, *, timeout: float | None = None) -> None:
        """Return when everything queued is on its way. Raises BrokenPipeError when the command reads no more, the
        reason when it is gone with its guest, and WaitTimeout after ``timeout`` seconds."""
        async with within(timeout, "the command had not taken its input"):
            await self._room.wait()
        if self._closed is not None:
            raise self._closed

    def grant(self, count: int) -> None:
        """The command has taken so many bytes. Raises GuestError when it cannot have."""
        self._credit += count
        if self._credit > protocol.WINDOW:
            raise GuestError("the agent broke its protocol: it took more input than there was")
        self._pump()

    def close(self, reason: BaseException) -> None:
        """Nobody reads any more."""
        if self._closed is None:
            self._closed = reason
            self._waiting.clear()
            self._room.set()

    def _pump(self) -> None:
        if self._closed is not None:
            return
        if count := min(self._credit, len(self._waiting)):
            for frame in protocol.data(self._number, 0, bytes(self._waiting[:count])):
                self._send(frame)
            del self._waiting[:count]
            self._credit -= count
        if not self._waiting:
            self._room.set()
            if self._ending:
                self._send(protocol.encode(protocol.DATA, self._number))
                self._closed = BrokenPipeError("the input of the command has been ended")


class _Flow(asyncio.ReadTransport):
    """What a StreamReader tells when it is full, and when it has room again."""

    def __init__(self, grant: Callable[[int], None]) -> None:
        super().__init__()
        self._grant = grant
        self._paused = False
        self._owed = 0

    def arrived(self, count: int) -> None:
        """So many bytes went into the reader."""
        self._owed += count
        if not self._paused:
            self._settle()

    def pause_reading(self) -> None:
        """See :class:`asyncio.ReadTransport`."""
        self._paused = True

    def resume_reading(self) -> None:
        """See :class:`asyncio.ReadTransport`."""
        self._paused = False
        self._settle()

    def _settle(self) -> None:
        if self._owed:
            owed, self._owed = self._owed, 0
            self._grant(owed)


class Output:
    """One output stream of a command, bounded by what has been granted: into a reader, or, where ``gather`` is not 0,
    gathered up to so many bytes; then ``full`` is called."""

    def __init__(self, grant: Callable[[int], None], gather: int, full: Callable[[], None]) -> None:
        self._left = protocol.WINDOW  # what the command may still send
        self._gather = gather
        self._full = full
        self.gathered = bytearray()
        self._grant_more = grant
        self._ended = False
        self.reader = asyncio.StreamReader(_LIMIT)
        self._flow = _Flow(self._grant)
        self.reader.set_transport(self._flow)

    def feed(self, data: bytes) -> None:
        """What the command printed; nothing at its end. Raises GuestError for more than was granted."""
        self._left -= len(data)
        if self._left < 0 or self._ended:
            raise GuestError("the agent broke its protocol: it sent more output than there was room for")
        if not data:
            self.end()
        elif self._gather:
            self.gathered += data
            if len(self.gathered) <= self._gather:
                self._grant(len(data))
            else:
                self._full()  # and there it stops
        else:
            # Accounted for first: the reader may pause for these very bytes.
            self.reader.feed_data(data)
            self._flow.arrived(len(data))

    def end(self) -> None:
        """There is no more."""
        if not self._ended:
            self._ended = True
            self.reader.feed_eof()

    def fail(self, reason: Exception) -> None:
        """There is no more, because of ``reason``."""
        if not self._ended:
            self._ended = True
            self.reader.set_exception(reason)

    def _grant(self, count: int) -> None:
        self._left += count
        if not self._ended:
            self._grant_more(count)


class Process:
    """One command in the guest. Leaving its ``async with`` block kills what still runs.

    ``stdin`` is an :class:`Input`, or None; ``stdout`` and ``stderr`` are readers, ``stderr`` None where it is one
    with ``stdout`` (a terminal). ``returncode`` is None until it has ended; -N when a signal N killed it.
    """

    def __init__(
        self, send: Callable[[bytes], None], number: int, argv: list[str], *, input: bool, merged: bool, gather: int = 0
    ) -> None:
        self.argv = argv
        self.returncode: int | None = None
        self.stdin = Input(send, number) if input else None
        self._send = send
        self._number = number
        #: It printed more than was to be gathered, and was killed for it.
        self.overflowed = False
        self.outputs = {stream: self._output(stream, gather) for stream in ((1,) if merged else (1, 2))}
        self.stdout = self.outputs[1].reader
        self.stderr = None if merged else self.outputs[2].reader
        self.ended = asyncio.Event()
        self._failed: GuestError | None = None

    async def __aenter__(self) -> Process:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.returncode is None and self._failed is None:
            self.kill()
            with contextlib.suppress(GuestError):
                await self.wait()

    async def wait(self, *, timeout: float | None = None) -> int:
        """Return its exit code when it has ended. Raises the reason when it never will, because its guest is gone, and
        WaitTimeout after ``timeout`` seconds; it runs on then."""
        async with within(timeout, f"{shlex.join(self.argv)} had not ended"):
            await self.ended.wait()
        if self._failed is not None:
            raise self._failed
        assert self.returncode is not None
        return self.returncode

    async def communicate(self, input: bytes | None = None, *, timeout: float | None = None) -> tuple[bytes, bytes]:
        """Type ``input``, end the input, read everything: what came on the two streams. Raises as :meth:`wait`."""
        if self.stdin is not None:
            if input:
                self.stdin.write(input)
            self.stdin.write_eof()
        readers = [self.stdout.read(), *([self.stderr.read()] if self.stderr is not None else [])]
        async with within(timeout, f"{shlex.join(self.argv)} had not ended"):
            read = await asyncio.gather(*readers)
            await self.wait()
        return read[0], read[1] if len(read) > 1 else b""

    def send_signal(self, number: int) -> None:
        """Send a signal to it and to what it has started in its process group."""
        if not self.ended.is_set():
            self._send(protocol.signal(self._number, number))

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(9)

    def resize(self, columns: int, rows: int) -> None:
        """The size of its terminal has changed: it gets a SIGWINCH."""
        if not self.ended.is_set():
            self._send(protocol.resize(self._number, columns, rows))

    def _output(self, stream: int, gather: int) -> Output:
        return Output(lambda count: self._send(protocol.credit(self._number, stream, count)), gather, self._overflow)

    def _overflow(self) -> None:
        self.overflowed = True
        self.kill()

    # The agent's side.

    def receive(self, frame: Frame) -> None:
        """A frame about this command. Raises GuestError when the agent breaks the rules."""
        if frame.type == protocol.CREDIT and self.stdin is not None:
            self.stdin.grant(protocol.number(frame))
        elif frame.type == protocol.EXIT:
            self._exit(*protocol.end(frame))
        elif frame.type == protocol.DATA and frame.stream in self.outputs:
            self.outputs[frame.stream].feed(frame.payload)
        elif frame.type == protocol.DATA and frame.stream == 0 and self.stdin is not None:
            self.stdin.close(BrokenPipeError("the command has closed its input"))
        else:
            raise GuestError(f"the agent broke its protocol: a message {frame.type} where none can be")

    def fail(self, reason: GuestError) -> None:
        """It is gone, and its end will never be known."""
        if not self.ended.is_set():
            self._failed = reason
            for output in self.outputs.values():
                output.fail(reason)
            if self.stdin is not None:
                self.stdin.close(reason)
            self.ended.set()

    def _exit(self, how: int, value: int) -> None:
        if how == protocol.NOT_STARTED:
            self.fail(GuestError(f"the guest could not start {self.argv[0]}: errno {value}"))
            return
        self.returncode = value if how == protocol.EXITED else -value
        for output in self.outputs.values():
            output.end()
        if self.stdin is not None:
            self.stdin.close(BrokenPipeError("the command has ended"))
        self.ended.set()
