"""A timeline of a VM for Perfetto (ui.perfetto.dev) or chrome://tracing.

One track per vCPU: in the guest, serving an exit, parked, waking; one per vCPU's IRQ input while it is up; one for the
devices' work on the event loop. The format is the Trace Event Format's JSON array, which may lack its end, so that the
file of a process that was killed opens too. Events are written out as they come: memory stays bounded.
"""

from __future__ import annotations

import io
import json
import os
import threading
import time
import types
from collections.abc import Callable, Coroutine, Generator
from functools import lru_cache, partial
from typing import Any, Final

from avmm.bus import Bus
from avmm.errors import ConfigError, GuestFault
from avmm.hypervisor.base import ExitKind, Vcpu
from avmm.log import log
from avmm.vcpu.loop import VcpuLoop
from avmm.vcpu.park import Cause

#: Events a track keeps before it writes them.
_BATCH: Final = 512

_KINDS: Final = tuple(kind.name.lower() for kind in ExitKind)
_MMIO: Final = frozenset({ExitKind.MMIO_READ, ExitKind.MMIO_WRITE})
_SYSREG: Final = frozenset({ExitKind.SYSREG_READ, ExitKind.SYSREG_WRITE})
_CALL: Final = frozenset({ExitKind.HVC, ExitKind.SMC})


class Track:
    """A row of the timeline. Its slices follow each other; times are nanoseconds of the monotonic clock."""

    def __init__(self, trace: Trace, number: int) -> None:
        self._trace = trace
        self._where = f'"pid":{trace.pid},"tid":{number}'
        self._events: list[tuple[str, str, int, int, str]] = []  # phase, name, time, length, arguments

    def slice(self, name: str, start: int, end: int, args: str = "{}") -> None:
        """Something that went on from ``start`` to ``end``; ``name`` an identifier, ``args`` a JSON object."""
        self._add("X", name, start, end - start, args)

    def begin(self, name: str) -> None:
        """Something begins now."""
        self._add("B", name, time.monotonic_ns(), 0, "{}")

    def end(self, name: str) -> None:
        """What has begun last ends now."""
        self._add("E", name, time.monotonic_ns(), 0, "{}")

    def _add(self, phase: str, name: str, at: int, length: int, args: str) -> None:
        self._events.append((phase, name, at, length, args))
        if len(self._events) >= _BATCH:
            self.flush()

    def flush(self) -> None:
        """Write what has come together."""
        events, self._events = self._events, []
        self._trace.write([self._json(*event) for event in events])

    def _json(self, phase: str, name: str, at: int, length: int, args: str) -> str:
        # By hand: json.dumps would take longer than most exits, and the timeline would be of the tracing.
        ts = self._trace.micros(at)
        if phase == "X":
            return f'{{"ph":"X",{self._where},"ts":{ts},"dur":{length / 1000},"name":"{name}","args":{args}}}'
        return f'{{"ph":"{phase}",{self._where},"ts":{ts},"name":"{name}"}}'


class Trace:
    """The file, and its tracks. Raises ConfigError when it cannot be made."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.pid = os.getpid()
        self._path = os.fspath(path)
        self._lock = threading.Lock()
        self._began = time.monotonic_ns()
        self._tracks: dict[str, Track] = {}
        self._lines: list[IrqTrack] = []
        try:
            self._file: io.FileIO | None = io.FileIO(self._path, "w")
        except OSError as error:
            raise ConfigError(f"cannot write the trace {self._path}: {error.strerror}") from error
        self._append("[\n" + self._named("process_name", 0, f"avmm {self.pid}"))

    def track(self, name: str) -> Track:
        """The track of that name."""
        track = self._tracks.get(name)
        if track is None:
            track = self._tracks[name] = Track(self, len(self._tracks) + 1)
            self.write([self._named("thread_name", len(self._tracks), name)])
        return track

    def attach(self, vcpu: VcpuLoop, bus: Bus) -> None:
        """Show what ``vcpu`` does, which has not run yet; ``bus`` knows what its devices are called."""
        vcpu.tracer = VcpuTrack(self.track(f"vCPU {vcpu.index}"), vcpu, bus)
        irq = IrqTrack(self.track(f"vCPU {vcpu.index} IRQ"))
        self._lines.append(irq)
        vcpu.parking.on_irq = irq.changed

    async def work(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run a device's ``coroutine``; each step of it on the event loop becomes a slice."""
        await _steps(coroutine, self.track("devices"), getattr(coroutine, "__qualname__", "work"))

    def micros(self, at: int) -> float:
        """The format's unit, from when the trace began."""
        return (at - self._began) / 1000

    def write(self, events: list[str]) -> None:
        """Append events, JSON each. Any thread; nothing once closed."""
        self._append("".join(",\n" + event for event in events))

    def close(self) -> None:
        """Write what is left, and the end. A second call does nothing."""
        for line in self._lines:
            line.changed(False)
        for track in self._tracks.values():
            track.flush()
        self._append("\n]\n")
        with self._lock:
            self._close()

    def _append(self, text: str) -> None:
        with self._lock:
            left = memoryview(text.encode())
            try:
                while left and self._file is not None:
                    left = left[self._file.write(left) :]
            except OSError as error:  # a full disk ends the trace, not the VM
                log.warning("trace.ended", path=self._path, error=error.strerror)
                self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _named(self, kind: str, number: int, name: str) -> str:
        return json.dumps({"ph": "M", "pid": self.pid, "tid": number, "name": kind, "args": {"name": name}})


class IrqTrack:
    """A vCPU's IRQ input: one slice for each time it is up. Called under the VM's lock."""

    def __init__(self, track: Track) -> None:
        self._track = track
        self._up = False

    def changed(self, level: bool) -> None:
        """The input is now ``level``."""
        if level != self._up:
            self._up = level
            if level:
                self._track.begin("IRQ")
            else:
                self._track.end("IRQ")


class VcpuTrack:
    """A vCPU's time, without gaps.

    Slices are ``guest``, the name of the exit that is being served, ``parked``, ``wake``, ``off`` and ``paused``.
    """

    def __init__(self, track: Track, vcpu: VcpuLoop, bus: Bus) -> None:
        self._track = track
        self._loop = vcpu
        self._bus = bus
        self._exit: tuple[int, int, str] | None = None  # its end, kind and arguments
        self._parks = 0
        self._wakes = [0] * len(Cause)

    def runner(self, vcpu: Vcpu) -> Callable[[], int]:
        """See :class:`avmm.vcpu.loop.Tracer`."""
        now = time.monotonic_ns
        inner = vcpu.run
        frame = vcpu.frame
        slice = self._track.slice
        away = True  # on the event loop, between the last exit and this entry

        def run() -> int:
            nonlocal away
            sleeping = frame.sleep
            start = now()
            if not sleeping:
                self._entering(away, start)
            kind = inner()
            end = now()
            if sleeping and not frame.entered:
                away = True
                return kind
            if sleeping:
                start = frame.entered
                with self._loop.parking.lock:  # who woke us may be at the books still
                    self._entering(True, start)
            away = False
            slice("guest", start, end)
            self._exit = end, kind, self._arguments(kind, vcpu)
            return kind

        return run

    def _entering(self, away: bool, start: int) -> None:
        """The guest is entered at ``start``; ``away``: after a sleep, or the thread was back at the event loop."""
        if self._exit is not None:
            self._served(*self._exit, away or self._loop.parking.wakes != self._wakes, start)
        else:
            self._wakes = list(self._loop.parking.wakes)  # of a vCPU that was turned on

    def _served(self, end: int, kind: int, args: str, waited: bool, start: int) -> None:
        """From an exit to the next entry; ``waited``: the vCPU slept, or its thread was back at the event loop."""
        add = self._track.slice
        if not waited:
            add(_KINDS[kind], end, start, args)
            return
        wakes = list(self._loop.parking.wakes)
        causes = [cause.name.lower() for cause in Cause if wakes[cause] != self._wakes[cause]]
        parks = self._loop.counters.parks
        parked, self._parks, self._wakes = parks != self._parks, parks, wakes
        if not causes:
            add("paused", end, start, args)
            return
        woken = min(max(end, self._loop.parking.stats.woken), start)
        add("parked" if parked else "off", end, woken, _json(exit=_KINDS[kind]))
        add("wake", woken, start, _json(cause=causes[0]))

    def _arguments(self, kind: int, vcpu: Vcpu) -> str:
        frame = vcpu.frame
        if kind in _MMIO:
            try:
                base, _, _, device = self._bus.window(frame.address, frame.size)
            except GuestFault:
                return _json(address=frame.address)
            return _json(device=device, offset=frame.address - base, size=frame.size)
        if kind in _SYSREG:
            return _json(register=frame.address)
        if kind in _CALL:
            return _json(function=frame.args[0])
        return "{}"


@lru_cache(maxsize=1024)
def _json(**args: str | int) -> str:
    """A slice's arguments; numbers as people look them up, in hexadecimal."""
    return json.dumps({name: hex(value) if isinstance(value, int) else value for name, value in args.items()})


@types.coroutine
def _steps(coroutine: Coroutine[Any, Any, None], track: Track, name: str) -> Generator[Any, Any, None]:
    """Drive ``coroutine`` as ``await`` would, and time each turn it gets."""
    now = time.monotonic_ns
    advance: Callable[[], Any] = partial(coroutine.send, None)
    while True:
        start = now()
        try:
            awaited = advance()
        except StopIteration:
            return
        finally:
            track.slice(name, start, now())
        try:
            advance = partial(coroutine.send, (yield awaited))
        except GeneratorExit:
            coroutine.close()
            raise
        except BaseException as error:  # CancelledError, for the coroutine to deal with
            advance = partial(coroutine.throw, error)
