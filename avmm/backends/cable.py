"""The cable between a guest's network card and a network: it counts, records, and breaks on request.

::

    vm.net.drop(0.01, seed=7)                     # one frame in a hundred, each way
    vm.net.delay(0.05, jitter=0.01, seed=7, way="in")
    vm.net.reorder(0.1, seed=7); vm.net.duplicate(0.1, seed=7)
    vm.net.heal()
    vm.net.unplug(); vm.net.plug()

Whatever is on either side, the cable takes unfinished checksums and large segments, and finishes them where the other
side cannot. While a fault is on, segments are cut up first: each frame has its own fate, decided by the seed and by
the frame's number.
"""

from __future__ import annotations

import asyncio
import heapq
import random
from collections import deque
from collections.abc import Callable
from typing import Final, Literal

from avmm.backends.offload import finished
from avmm.backends.pcap import Pcap
from avmm.errors import ConfigError
from avmm.link import End, Frame

Way = Literal["in", "out", "both"]

#: Frames on their way, at most, while they are delayed; more have to wait.
_HELD_MAX: Final = 4096
#: A frame that is to be overtaken waits so long for another one to do it, in seconds.
_OVERTAKEN: Final = 0.02

#: What a fault makes of a frame: after how many seconds it arrives, once or more often; None: after the next frame.
Fate = list[float | None]


class _Lane:
    """One direction: frames that arrive at ``source`` leave through ``sink``."""

    def __init__(self, counters: dict[str, int], name: str, pcap: Pcap | None) -> None:
        self.source = End(self._receive, offload=True)
        self.sink: End = self.source  # until the cable is whole
        self.faults: list[Callable[[], Fate]] = []
        self._counters = counters
        self._frames, self._bytes, self._lost = f"{name}_frames", f"{name}_bytes", f"{name}_dropped"
        self._pcap = pcap
        self._ready: deque[Frame] = deque()  # what the sink has no room for yet
        self._late: list[tuple[float, int, Frame]] = []  # a heap, by the time of arrival
        self._overtaken: deque[Frame] = deque()
        self._number = 0
        self._timer: asyncio.TimerHandle | None = None
        self._refused = False

    def _receive(self, frame: Frame) -> bool:
        if self._ready or len(self._late) >= _HELD_MAX:
            self._refused = True
            return False
        if self.faults:
            self._count(frame)
            for each in finished(frame):
                self._suffer(each)
            self.flush()
            return True
        peer = self.sink.peer
        if frame.csum_start and peer is not None and not peer.offload:
            self._count(frame)
            self._ready.extend(finished(frame))
            self.flush()
            return True
        if not self.sink.send(frame):
            self._refused = True
            return False
        self._count(frame)
        return True

    def _count(self, frame: Frame) -> None:
        self._counters[self._frames] += 1
        self._counters[self._bytes] += len(frame.data)
        if self._pcap is not None:
            self._pcap.record(frame)

    def _suffer(self, frame: Frame) -> None:
        loop = asyncio.get_running_loop()
        fates: Fate = [0.0]
        for fault in self.faults:
            fates = [
                None if before is None or after is None else before + after for before in fates for after in fault()
            ]
        if not fates:
            self._counters[self._lost] += 1
        overtakes = list(self._overtaken)
        self._overtaken.clear()
        for fate in fates:
            if fate is None:
                self._overtaken.append(frame)
                loop.call_later(_OVERTAKEN, self._give_up_waiting, frame)
            else:
                self._schedule(loop.time() + fate, frame)
        for each in overtakes:
            self._schedule(loop.time(), each)

    def _give_up_waiting(self, frame: Frame) -> None:
        if any(each is frame for each in self._overtaken):
            self._overtaken = deque(each for each in self._overtaken if each is not frame)
            self._ready.append(frame)
            self.flush()

    def _schedule(self, due: float, frame: Frame) -> None:
        self._number += 1
        heapq.heappush(self._late, (due, self._number, frame))

    def flush(self) -> None:
        """Pass on what can be passed on now."""
        if self._late:
            self._arrive()
        while self._ready:
            frame = self._ready[0]
            peer = self.sink.peer
            if frame.csum_start and peer is not None and not peer.offload:
                self._ready.popleft()
                self._ready.extendleft(reversed(finished(frame)))
            elif self.sink.send(frame):
                self._ready.popleft()
            else:
                return
        if self._refused and len(self._late) < _HELD_MAX:
            self._refused = False
            self.source.room()

    def _arrive(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        while self._late and self._late[0][0] <= now:
            self._ready.append(heapq.heappop(self._late)[2])
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._late:
            self._timer = loop.call_at(self._late[0][0], self.flush)

    def clear(self) -> None:
        """Forget what is on the way."""
        self._ready.clear()
        self._late.clear()
        self._overtaken.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._refused:
            self._refused = False
            self.source.room()


class Cable:
    """``card`` is the end for the guest's network card, ``network`` the one for the network; ``pcap`` records both.

    All on the event loop. ``out`` is what the guest sends, ``in`` what it gets.
    """

    def __init__(self, pcap: Pcap | None = None) -> None:
        #: Frames and bytes each way as they came, large segments being one; frames lost to :meth:`drop`.
        self.counters = {
            "out_frames": 0, "out_bytes": 0, "out_dropped": 0, "in_frames": 0, "in_bytes": 0, "in_dropped": 0,
        }  # fmt: skip
        self._out = _Lane(self.counters, "out", pcap)
        self._in = _Lane(self.counters, "in", pcap)
        self.card, self.network = self._out.source, self._in.source
        self._out.sink, self._in.sink = self.network, self.card
        # The end through which a lane leaves is told when there is room beyond it.
        self.network.on_room, self.card.on_room = self._out.flush, self._in.flush
        self._on_link: Callable[[bool], None] = lambda up: None
        self.plugged = True

    def drop(self, p: float, *, seed: int = 0, way: Way = "both") -> None:
        """Lose each frame with probability ``p``."""
        self._add(way, seed, p, lambda chance: [] if chance.random() < p else [0.0])

    def delay(self, seconds: float, *, jitter: float = 0.0, seed: int = 0, way: Way = "both") -> None:
        """Every frame takes ``seconds`` longer, give or take ``jitter``; the later may overtake the earlier then."""
        if seconds < 0 or jitter < 0:
            raise ConfigError("a delay and its jitter are seconds, 0 or more")
        self._add(way, seed, 0, lambda chance: [max(0.0, seconds + chance.uniform(-jitter, jitter))])

    def reorder(self, p: float, *, seed: int = 0, way: Way = "both") -> None:
        """With probability ``p`` a frame is overtaken by the next one."""
        self._add(way, seed, p, lambda chance: [None] if chance.random() < p else [0.0])

    def duplicate(self, p: float, *, seed: int = 0, way: Way = "both") -> None:
        """With probability ``p`` a frame arrives twice."""
        self._add(way, seed, p, lambda chance: [0.0, 0.0] if chance.random() < p else [0.0])

    def heal(self) -> None:
        """No more faults. What is on its way still arrives when it was to; an unplugged cable stays so."""
        for lane in (self._out, self._in):
            lane.faults.clear()

    def unplug(self) -> None:
        """The link goes down: the guest sees no carrier, and what is sent is lost."""
        self._set_link(False)

    def plug(self) -> None:
        """The link comes up."""
        self._set_link(True)

    def watch_link(self, changed: Callable[[bool], None]) -> None:
        """``changed(up)`` is called now, and whenever the link goes up or down."""
        self._on_link = changed
        changed(self.plugged)

    def clear(self) -> None:
        """Forget what is on the way: one of the ends is gone, or another."""
        self._out.clear()
        self._in.clear()

    def _set_link(self, up: bool) -> None:
        if up is not self.plugged:
            self.plugged = up
            if not up:
                self.clear()
            self._on_link(up)

    def _add(self, way: Way, seed: int, p: float, fate: Callable[[random.Random], Fate]) -> None:
        if way not in ("in", "out", "both"):
            raise ConfigError(f"frames go in, out or both ways, not {way!r}")
        if not 0 <= p <= 1:
            raise ConfigError(f"a probability lies between 0 and 1, not at {p}")
        for name, lane in (("out", self._out), ("in", self._in)):
            if way in (name, "both"):
                chance = random.Random(f"{seed} {name}")
                lane.faults.append(lambda chance=chance: fate(chance))  # type: ignore[misc]  # bound early
