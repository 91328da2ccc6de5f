"""The two sides of a guest's connection: the protocol that carries it, and who uses it."""

from __future__ import annotations

from typing import Protocol


class Endpoint(Protocol):
    """Who uses a connection. Called from within the protocol; may call the connection."""

    def opened(self) -> None:
        """The connection is established."""
        ...

    def received(self, data: memoryview) -> int:
        """The next bytes, a view that is good until this returns; how many have been taken. The rest is kept, and
        what follows it: see :attr:`Flow.waiting`."""
        ...

    def ended(self) -> None:
        """No more bytes will come, all there were have been taken."""
        ...

    def room(self) -> None:
        """There is room to send, after :meth:`Flow.want_room`."""
        ...

    def closed(self, reset: bool) -> None:
        """The connection is over, either by both ends (``reset`` is False) or broken."""
        ...


class Flow(Protocol):
    """A connection as its user sees it: nothing is queued for which the guest has no room. Times are the loop's."""

    #: Bytes to be left free in front of what is sent, for headers; and how many can be sent at once.
    head: int
    largest: int
    endpoint: Endpoint | None
    #: Whether :meth:`want_room` was said and there has been none since.
    wants_room: bool

    @property
    def waiting(self) -> bytearray:
        """Bytes that the endpoint has not taken; say :meth:`taken` afterwards."""
        ...

    def taken(self, count: int, now: float) -> None:
        """The endpoint has taken the first ``count`` of :attr:`waiting`."""
        ...

    def room(self) -> int:
        """Bytes that may be sent now."""
        ...

    def want_room(self, now: float) -> None:
        """Ask for :meth:`Endpoint.room` when there is some."""
        ...

    def send(self, buffer: bytearray, now: float) -> None:
        """Send what ``buffer`` holds behind ``head`` bytes: at least one, at most ``largest`` and :meth:`room`. The
        buffer is given away."""
        ...

    def shutdown(self, now: float) -> None:
        """No more will be sent."""
        ...

    def close(self, now: float) -> None:
        """Nobody is here any more."""
        ...

    def abort(self) -> None:
        """End it at once."""
        ...

    def accept(self, endpoint: Endpoint, now: float) -> None:
        """Answer a guest that has asked for the connection, with yes."""
        ...

    def refuse(self) -> None:
        """Answer it with no."""
        ...
