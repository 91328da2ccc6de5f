"""A virtual Ethernet switch: joins the networks of several VMs, and breaks in two on request.

::

    switch = avmm.Switch()
    async with avmm.boot(kernel, initrd, net=switch) as a, avmm.boot(kernel, initrd, net=switch) as b:
        switch.partition(a, b)
        switch.heal()
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from typing import Any, Final

from avmm.errors import ConfigError
from avmm.link import End, Frame, part

#: What waits at one port for its guest, at most: more than Linux's largest TCP window. What comes then is lost.
_QUEUE_MAX: Final = 8 << 20
#: Addresses remembered, at most; the one longest silent is forgotten first.
_ADDRESSES_MAX: Final = 4096


class _Port:
    """A socket of the switch."""

    def __init__(self, switch: Switch, owner: object) -> None:
        self.switch = switch
        self.owner = owner
        self.end = End(self._receive, offload=True)
        self.end.on_room = self._room
        self.dropped = 0
        self.plugged = True
        self._waiting: deque[Frame] = deque()
        self._waiting_bytes = 0

    def send(self, frame: Frame) -> None:
        if not self._waiting and self.end.send(frame):
            return
        if self._waiting_bytes + len(frame.data) > _QUEUE_MAX:
            self.dropped += 1
            return
        self._waiting.append(frame)
        self._waiting_bytes += len(frame.data)

    def _receive(self, frame: Frame) -> bool:
        self.switch.forward(self, frame)
        return True

    def _room(self) -> None:
        while self._waiting and self.end.send(self._waiting[0]):
            self._waiting_bytes -= len(self._waiting.popleft().data)


class Switch:
    """Learns who is where, as Ethernet switches do. All that is plugged into it lives on one event loop.

    Nothing plugged in is ever waited for: a guest that does not take its frames loses some (:meth:`counters`).
    """

    def __init__(self) -> None:
        self._ports: list[_Port] = []
        self._learnt: OrderedDict[bytes, _Port] = OrderedDict()
        self._cut: set[frozenset[int]] = set()
        self._forwarded = 0
        self._kept_apart = 0
        self._dropped = 0  # at ports that are gone

    def plug(self, owner: object = None) -> End:
        """See :class:`avmm.link.Network`. ``owner`` is what :meth:`partition` knows the port by. Any thread."""
        port = _Port(self, owner)
        self._ports = [*self._ports, port]
        return port.end

    def unplug(self, end: End) -> None:
        """The port of this end is no more. Any thread."""
        for port in self._ports:
            if port.end is end:
                part(end)
                port.plugged = False
                self._ports = [each for each in self._ports if each is not port]
                self._dropped += port.dropped
                self._cut = {pair for pair in self._cut if id(port) not in pair}
                return

    def partition(self, a: Any, b: Any) -> None:
        """From now on no frame passes between ``a`` and ``b``: VMs, their ``net``, or lists of these."""
        pairs = {frozenset((id(one), id(other))) for one in self._of(a) for other in self._of(b)}
        if any(len(pair) == 1 for pair in pairs):
            raise ConfigError("a partition's two sides have no VM in common")
        self._cut |= pairs

    def heal(self) -> None:
        """Everybody reaches everybody again."""
        self._cut = set()

    def counters(self) -> dict[str, int]:
        """Frames forwarded, kept apart by partitions, and dropped because a guest did not take them."""
        return {
            "forwarded": self._forwarded,
            "kept_apart": self._kept_apart,
            "dropped": self._dropped + sum(port.dropped for port in self._ports),
        }

    def forward(self, source: _Port, frame: Frame) -> None:
        """``frame`` has come in at ``source``."""
        target, sender = bytes(frame.data[:6]), bytes(frame.data[6:12])
        learnt = self._learnt
        if not sender[0] & 1:
            learnt[sender] = source
            learnt.move_to_end(sender)
            if len(learnt) > _ADDRESSES_MAX:
                learnt.popitem(last=False)
        known = learnt.get(target)
        for port in self._ports if known is None or not known.plugged else (known,):
            if port is source:
                continue
            if self._cut and frozenset((id(source), id(port))) in self._cut:
                self._kept_apart += 1
                continue
            self._forwarded += 1
            port.send(frame)

    def _of(self, side: Any) -> list[_Port]:
        """The ports of one side of a partition."""
        if isinstance(side, Iterable):
            return [port for each in side for port in self._of(each)]
        owners = {id(side), *map(id, getattr(side, "nets", ()))}
        found = [port for port in self._ports if id(port.owner) in owners]
        if not found:
            raise ConfigError("a partition is between VMs on this switch: one of them is not, or has not been started")
        return found
