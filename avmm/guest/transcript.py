"""An append-only record of what the guest has printed, and waiters that read along.

Each waiter has a cursor of its own, so nothing that was printed before somebody waited is lost. A wait ends on a
match, on a failure pattern, on its timeout, or at once when the transcript is closed because the guest is gone.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from avmm.aio import within
from avmm.errors import GuestError, WaitTimeout

#: A match may reach back this far before data that has been searched already; keeps a wait linear in the output.
LOOK_BACK = 64 * 1024

#: Bytes of output quoted in a timeout's message and kept in its ``tail``.
TAIL = 2000


@dataclass(frozen=True, slots=True)
class TranscriptState:
    """What is remembered, after so many bytes that are not, and the cursor."""

    dropped: int
    data: bytes
    cursor: int


class PrintkFilter:
    """Takes the kernel's lines (``[   12.345678] text``, with printk.time) out of what a console shows."""

    _RECORD = re.compile(rb"\[ *\d+\.\d{6}\](?:\[ *[TC]\d+\])? [^\n]*\n")
    #: What may become one, at the end of what has come.
    _BEGUN = re.compile(rb"\[(?: *(?:\d+(?:\.(?:\d{1,5}|\d{6}(?:\](?:\[[ TC\d]*\]?)?(?: [^\n]{0,2048})?)?)?)?)?)?\Z")

    def __init__(self) -> None:
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """What can be shown now; the beginning of a kernel's line waits for its end."""
        data = self._RECORD.sub(b"", self._held + data)
        begun = self._BEGUN.search(data, max(0, len(data) - 2200))
        self._held = b"" if begun is None else data[begun.start() :]
        return data if begun is None else data[: begun.start()]

    def end(self) -> bytes:
        """What still waits."""
        held, self._held = self._held, b""
        return held


class Transcript:
    """What the guest has sent, with a cursor for :meth:`expect`. Positions count from the first byte ever sent.

    Belongs to one event loop; :meth:`feed` and :meth:`close` are called on it. ``keep``: how many bytes at least to
    remember; None remembers everything.
    """

    def __init__(self, keep: int | None = None) -> None:
        self.data = bytearray()
        self.cursor = 0
        self._dropped = 0  # bytes forgotten before data[0]
        self._keep = keep
        self._closed: GuestError | None = None
        self._waiters: set[asyncio.Future[None]] = set()
        self._readers: list[int] = []  # from where on somebody still needs the data
        self._listeners: list[Callable[[bytes], None]] = []
        self._filter = PrintkFilter()
        self._plain: Transcript | None = None

    def listen(self, listener: Callable[[bytes], None]) -> None:
        """Call ``listener`` with every piece of output from now on."""
        self._listeners.append(listener)

    def feed(self, data: bytes) -> None:
        """Append what the guest printed and wake whoever waits."""
        self.data += data
        if self._keep is not None and len(self.data) > 2 * self._keep:
            surplus = len(self.data) - self._keep
            surplus = min([surplus, *(begin - self._dropped for begin in self._readers)])
            self.data = self.data[surplus:]  # another one: matches found before look into the old one
            self._dropped += surplus
        for listener in self._listeners:
            listener(data)
        self._wake()

    def save(self) -> TranscriptState:
        """The record so far."""
        return TranscriptState(self._dropped, bytes(self.data), self.cursor)

    def restore(self, state: TranscriptState) -> None:
        """Go on from another's record; nobody waits yet."""
        self._dropped, self.cursor = state.dropped, state.cursor
        self.data[:] = state.data

    def close(self, reason: GuestError) -> None:
        """No more output will come; everybody who waits gets ``reason``."""
        if self._closed is None:
            self._closed = reason
            if self._plain is not None:
                self._plain.feed(self._filter.end())
                self._plain.close(reason)
            self._wake()

    def without_printk(self) -> Transcript:
        """The same without the kernel's own lines, also where one landed inside another; with a cursor of its own."""
        if self._plain is None:
            plain = self._plain = Transcript(self._keep)
            plain.feed(self._filter.feed(bytes(self.data)))
            self.listen(lambda data: plain.feed(self._filter.feed(data)))
            if self._closed is not None:
                plain.feed(self._filter.end())
                plain.close(self._closed)
        return self._plain

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def expect(
        self,
        pattern: bytes | re.Pattern[bytes],
        *,
        timeout: float | None = None,
        failure: bytes | re.Pattern[bytes] | None = None,
    ) -> re.Match[bytes]:
        """Wait until ``pattern`` (a regular expression over bytes) matches output after the cursor.

        The cursor moves to the end of the match. Output that has come already counts. Several may wait at once: each
        sees all that comes after the cursor it began at, whatever the others find. A match of ``failure`` that comes
        first raises GuestError; the guest's end raises its reason at once (GuestGone, GuestPanic ...); ``timeout``,
        in seconds, raises WaitTimeout. A match may reach at most 64 KiB back over output searched in vain before.
        """
        success = re.compile(pattern)
        failed = re.compile(failure) if failure is not None else None
        async with self._within(timeout, success):
            return await self._match(success, failed)

    async def read_until(
        self, pattern: bytes | re.Pattern[bytes], *, timeout: float | None = None, limit: int = 256 << 20
    ) -> tuple[bytes, re.Match[bytes]]:
        """All output from the cursor up to a match of ``pattern``, and the match. Raises as :meth:`expect`.

        It may be as long as ``limit`` (more raises GuestError), and is remembered until then, whatever ``keep`` says.
        """
        ending = re.compile(pattern)
        begin = searched = max(self.cursor, self._dropped)
        self._readers.append(begin)
        try:
            async with self._within(timeout, ending):
                while True:
                    found = ending.search(self.data, max(begin, searched - LOOK_BACK) - self._dropped)
                    if found is not None:
                        self.cursor = self._dropped + found.end()
                        return bytes(self.data[begin - self._dropped : found.start()]), found
                    searched = self._dropped + len(self.data)
                    if searched - begin > limit:
                        raise GuestError(f"the console showed more than {limit >> 20} MiB before {ending.pattern!r}")
                    await self._more()
        finally:
            self._readers.remove(begin)

    @asynccontextmanager
    async def _within(self, timeout: float | None, pattern: re.Pattern[bytes]) -> AsyncIterator[None]:
        """As :func:`avmm.aio.within`, with what the console last showed."""
        try:
            async with within(timeout, f"no match for {pattern.pattern!r} on the console"):
                yield
        except WaitTimeout as error:
            tail = bytes(self.data[-TAIL:])
            last = b"\n".join(tail.splitlines()[-20:]).decode(errors="replace")
            raise WaitTimeout(
                f"{error}; it last showed:\n{last}", elapsed=error.elapsed, tail=tail, pattern=pattern.pattern
            ) from None

    async def _match(self, success: re.Pattern[bytes], failed: re.Pattern[bytes] | None) -> re.Match[bytes]:
        first = searched = self.cursor
        while True:
            start = max(max(first, searched - LOOK_BACK) - self._dropped, 0)
            found = success.search(self.data, start)
            bad = failed.search(self.data, start) if failed is not None else None
            if bad is not None and (found is None or bad.start() < found.start()):
                raise GuestError(f"the console showed {bad.group()!r}")
            if found is not None:
                self.cursor = max(self.cursor, self._dropped + found.end())
                return found
            searched = self._dropped + len(self.data)
            await self._more()

    async def _more(self) -> None:
        """Return when there is more output. Raises the reason when there never will be."""
        if self._closed is not None:
            raise self._closed
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)
