"""The guest's serial console as a test sees it: what it printed, and a way to type."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from avmm.aio import within
from avmm.guest.transcript import Transcript, TranscriptState

if TYPE_CHECKING:
    from avmm.guest.screen import Screen


@dataclass(frozen=True, slots=True)
class ConsoleState:
    """What a console has shown, and what of a panic was seen on it."""

    transcript: TranscriptState
    panic: tuple[str | None, bytes]


class Keyboard(Protocol):
    """Where typed bytes go: the host's end of a serial line."""

    def type(self, data: bytes) -> None:
        """Queue ``data`` for the guest."""
        ...

    async def drain(self) -> None:
        """Return when the guest has taken everything queued."""
        ...


class Console:
    """``vm.console``: a transcript to wait on and a keyboard to type at."""

    def __init__(self, keyboard: Keyboard, keep: int | None = None) -> None:
        self._keyboard = keyboard
        self.transcript = Transcript(keep)
        self._screen: Screen | None = None

    @property
    def screen(self) -> Screen:
        """What a terminal of 80 by 25 would show now; made when first asked for. Raises ConfigError without pyte."""
        if self._screen is None:
            from avmm.guest.screen import Screen

            screen = self._screen = Screen()
            screen.feed(self.output)
            self.listen(screen.feed)
        return self._screen

    @property
    def output(self) -> bytes:
        """Everything printed so far."""
        return bytes(self.transcript.data)

    def listen(self, listener: Callable[[bytes], None]) -> None:
        """Call ``listener`` with every piece of output from now on, on the event loop."""
        self.transcript.listen(listener)

    async def expect(
        self,
        pattern: bytes | re.Pattern[bytes],
        *,
        timeout: float | None = None,
        failure: bytes | re.Pattern[bytes] | None = None,
        printk: bool = True,
    ) -> re.Match[bytes]:
        """Wait for ``pattern`` in the output; see :meth:`avmm.guest.transcript.Transcript.expect`.

        ``printk=False``: in the output without the kernel's own lines, which has a cursor of its own.
        """
        transcript = self.transcript if printk else self.transcript.without_printk()
        return await transcript.expect(pattern, timeout=timeout, failure=failure)

    def write(self, data: bytes) -> None:
        """Type ``data``. Nothing is lost: what the UART has no room for waits here."""
        self._keyboard.type(data)

    async def drain(self, *, timeout: float | None = None) -> None:
        """Wait until the guest has taken everything typed, or is gone. Raises WaitTimeout after ``timeout`` seconds."""
        async with within(timeout, "the guest had not taken what was typed"):
            await self._keyboard.drain()
