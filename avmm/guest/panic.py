"""Learns from the console that a Linux guest has panicked."""

from __future__ import annotations

import re
from collections.abc import Callable

#: What printk's lines begin with. Before a time stamp there may be a program's unfinished line, such as a shell's
#: prompt: printk does not begin another for it.
_BEGIN = rb"(?:^|\[ *\d+\.\d+\](?:\[[^\]]*\])? )"
_PANIC = re.compile(_BEGIN + rb"Kernel panic - not syncing: (.*)")
#: Printed last by a kernel that stays down (panic=0).
_END = re.compile(_BEGIN + rb"---\[ end Kernel panic")

#: A guest that prints no newline must not make us remember more than this many bytes.
_LINE_MAX = 1024


class PanicWatch:
    """Reads console output line by line. ``reason`` is the panic's own text, None while there was none.

    ``on_dead()`` is called when the kernel says that it has stopped for good after a panic.
    """

    def __init__(self, on_dead: Callable[[], None]) -> None:
        self.reason: str | None = None
        self._on_dead = on_dead
        self._line = b""

    def save(self) -> tuple[str | None, bytes]:
        """What has been seen, for :meth:`restore`."""
        return self.reason, self._line

    def restore(self, state: tuple[str | None, bytes]) -> None:
        """Go on where another has been."""
        self.reason, self._line = state

    def feed(self, data: bytes) -> None:
        """Look at more output."""
        *lines, rest = (self._line + data).split(b"\n")
        self._line = rest[-_LINE_MAX:]
        for line in lines:
            if found := _PANIC.search(line):
                self.reason = self.reason or found[1].strip().decode(errors="replace")
            elif self.reason is not None and _END.search(line):
                self._on_dead()
