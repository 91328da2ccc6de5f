"""Time: the host's counter, the guest's view of it, and timers that are never early.

The only file that knows the counter's frequency, the virtual counter's offset and the loop's time. Three units:

* *ticks* of the host counter, the one ``CNTVOFF_EL2`` refers to: ``mach_absolute_time()`` on macOS, and what
  softhv's ``softhv_absolute_time()`` returns elsewhere: ``CLOCK_MONOTONIC`` at 24 MHz;
* *guest ticks*, ``CNTVCT_EL0`` = host ticks - offset, modulo 2**64, where the engine does not scale the counter;
* *nanoseconds* of :func:`time.monotonic_ns`, which is the same counter scaled by the timebase (CPython reads
  ``mach_absolute_time`` for it on macOS, ``CLOCK_MONOTONIC`` on Linux), so instants convert without an epoch.

What this process reads in ``CNTFRQ_EL0`` plays no part: on Apple's newer chips it may differ from the timebase.
Only the engine can say that a *guest's* counter is scaled (:meth:`Clock.set_counter_frequency`).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import heapq
import os
import select
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

from avmm.errors import HostError

if TYPE_CHECKING:
    from fractions import Fraction

_U64: Final = (1 << 64) - 1

#: CNTV_CTL_EL0 bits (Arm ARM D19.12.27).
TIMER_ENABLE: Final = 1
TIMER_IMASK: Final = 2
TIMER_ISTATUS: Final = 4

#: A deadline that has passed already; real ones are positive.
EXPIRED: Final = 0

#: No wait is longer than this: a CVAL of all ones is thousands of years away, beyond what kernel timers take.
#: Waking once a day for nothing is legal for WFI and costs nothing.
_FARTHEST_NS: Final = 24 * 3600 * 10**9


def _mach_timebase() -> tuple[int, int, Callable[[], int]]:
    """(numer, denom, mach_absolute_time): a tick lasts numer/denom nanoseconds."""
    libc = ctypes.PyDLL(None)  # PyDLL: these return at once, giving the GIL away would cost more
    info = (ctypes.c_uint32 * 2)()
    libc.mach_timebase_info(ctypes.byref(info))
    libc.mach_absolute_time.restype = ctypes.c_uint64
    return info[0], info[1], libc.mach_absolute_time


class Timebase:
    """The host counter: ``now()`` in ticks, each of ``numer / denom`` nanoseconds."""

    def __init__(self, numer: int, denom: int, now: Callable[[], int]) -> None:
        self.numer = numer
        self.denom = denom
        self.now = now

    def to_ns(self, ticks: int) -> int:
        """The nanoseconds after which ``ticks`` have passed: rounded up, so that a wait is never short."""
        return -(-ticks * self.numer // self.denom)

    def to_ticks(self, ns: int) -> int:
        """The whole ticks in ``ns`` nanoseconds."""
        return ns * self.denom // self.numer


def host_timebase() -> Timebase:
    """The timebase of this machine."""
    if sys.platform == "darwin":
        return Timebase(*_mach_timebase())
    monotonic_ns = time.monotonic_ns
    return Timebase(125, 3, lambda: monotonic_ns() * 3 // 125)


class Clock:
    """A VM's time: one counter offset for all its vCPUs.

    Everything that waits for guest time asks here, so that a clock that stands still or jumps can take its place.
    """

    def __init__(self, timebase: Timebase | None = None) -> None:
        self.timebase = timebase or host_timebase()
        self.offset = self.timebase.now()  # CNTVCT_EL0 starts at zero with the VM
        self._stopped: int | None = None  # host ticks when the guest's time was stopped
        self._scale: Fraction | None = None  # guest ticks in a host tick, where it is not one

    def set_counter_frequency(self, hz: int) -> None:
        """The engine's own word for how fast the guest's counter runs; 0: it does not know."""
        guest, host = hz * self.timebase.numer, 10**9 * self.timebase.denom
        self._scale = None
        if guest not in (0, host):
            from fractions import Fraction  # not for a clock like the host's

            self._scale = Fraction(guest, host)

    def now(self) -> int:
        """The host counter, in ticks."""
        return self.timebase.now()

    def now_ns(self) -> int:
        """The host's monotonic time in nanoseconds."""
        return time.monotonic_ns()

    def stop(self) -> None:
        """The guest's time stands still from now on.

        Its vCPUs are outside the guest, and learn of :attr:`offset`, which changes when it goes on, before they enter.
        """
        if self._stopped is None:
            self._stopped = self.timebase.now()

    def start(self) -> int:
        """It goes on where it stood; how long it stood still, in nanoseconds."""
        if self._stopped is None:
            return 0
        stood = self.timebase.now() - self._stopped
        self._stopped = None
        self.offset = self.offset + stood & _U64
        return self.timebase.to_ns(stood)

    @property
    def elapsed(self) -> int:
        """Host ticks of the guest's life so far: what :meth:`set_elapsed` goes on from in another VM."""
        return self._ticks() - self.offset & _U64

    def set_elapsed(self, ticks: int) -> None:
        """The guest has lived for so many host ticks already."""
        self.offset = self.timebase.now() - ticks & _U64

    def _ticks(self) -> int:
        return self.timebase.now() if self._stopped is None else self._stopped

    def guest_now(self) -> int:
        """CNTVCT_EL0, in ticks."""
        return self._guest(self._ticks())

    def _guest(self, ticks: int) -> int:
        passed = (ticks - self.offset) & _U64
        scale = self._scale
        return passed if scale is None else passed * scale.numerator // scale.denominator & _U64

    def when(self, guest_ticks: int) -> int:
        """The host nanosecond when CNTVCT_EL0 reaches ``guest_ticks``, or EXPIRED; at most a day ahead.

        While the guest's time stands still: the nanosecond had it gone on; :meth:`start` tells how much later it is.
        """
        now = self._ticks()
        left = guest_ticks - self._guest(now)
        if left <= 0:  # the comparison is of unsigned 64-bit values (Arm ARM D11.2.4)
            return EXPIRED
        scale = self._scale
        if scale is not None:
            left = -(-left * scale.denominator // scale.numerator)
        timebase = self.timebase
        return min(timebase.to_ns(now + left), timebase.to_ns(now) + _FARTHEST_NS)

    def deadline(self, ctl: int, cval: int) -> int | None:
        """When the virtual timer (CNTV_CTL_EL0, CNTV_CVAL_EL0) fires, as :meth:`when` says; None if it will not."""
        if ctl & (TIMER_ENABLE | TIMER_IMASK) != TIMER_ENABLE:
            return None
        return self.when(cval)


class _Alarm(Protocol):
    """One kernel timer with a file descriptor that becomes readable at an absolute time, or a little later."""

    def fileno(self) -> int: ...

    def set(self, ns: int) -> None: ...

    def drain(self) -> None: ...

    def close(self) -> None: ...


class _TimerFd:
    """Linux: timerfd on CLOCK_MONOTONIC (timerfd_create(2))."""

    _ABSTIME = 1  # TFD_TIMER_ABSTIME

    def __init__(self) -> None:
        libc = ctypes.PyDLL(None, use_errno=True)  # these return at once: keep the GIL
        self._settime = libc.timerfd_settime
        self._spec = (ctypes.c_long * 4)()  # struct itimerspec: interval s, ns; value s, ns
        self._spec_at = ctypes.byref(self._spec)
        self._fd: int = libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise HostError(f"cannot create a timerfd: {os.strerror(ctypes.get_errno())}; check the open-file limit")

    def fileno(self) -> int:
        return self._fd

    def set(self, ns: int) -> None:
        self._spec[2], self._spec[3] = divmod(ns, 10**9)
        if self._settime(self._fd, self._ABSTIME, self._spec_at, None) < 0:
            raise HostError(f"cannot set a timerfd: {os.strerror(ctypes.get_errno())}")

    def drain(self) -> None:
        with contextlib.suppress(BlockingIOError):  # set again since it became readable
            os.read(self._fd, 8)

    def close(self) -> None:
        os.close(self._fd)


if sys.platform == "darwin":

    class _KqueueTimer:
        """macOS: an EVFILT_TIMER in a kqueue of its own, whose descriptor an event loop can watch (kqueue(2))."""

        _ONESHOT_FLAGS = select.KQ_EV_ADD | select.KQ_EV_ONESHOT
        _FFLAGS = 0x4 | 0x20  # NOTE_NSECONDS | NOTE_CRITICAL: no coalescing with other timers

        def __init__(self) -> None:
            self._queue = select.kqueue()

        def fileno(self) -> int:
            return self._queue.fileno()

        def set(self, ns: int) -> None:
            left = max(ns - time.monotonic_ns(), 0)
            event = select.kevent(1, select.KQ_FILTER_TIMER, flags=self._ONESHOT_FLAGS, fflags=self._FFLAGS, data=left)
            self._queue.control([event], 0)

        def drain(self) -> None:
            self._queue.control(None, 1, 0)

        def close(self) -> None:
            self._queue.close()

    def _alarm() -> _Alarm:
        return _KqueueTimer()

else:

    def _alarm() -> _Alarm:
        return _TimerFd()


#: So many cancelled handles may stay among the others before it is worth sorting them out.
_DEAD_KEPT: Final = 64


class TimerHandle:
    """A callback that waits for its time. Compares by time."""

    __slots__ = ("_timers", "callback", "ns")

    def __init__(self, ns: int, callback: Callable[[], None], timers: DeadlineTimers) -> None:
        self.ns = ns
        self.callback: Callable[[], None] | None = callback
        self._timers = timers

    def cancel(self) -> None:
        """Do not call. Harmless when it has been called or cancelled."""
        if self.callback is not None:
            self.callback = None
            self._timers.cancelled()

    def __lt__(self, other: TimerHandle) -> bool:
        return self.ns < other.ns


class DeadlineTimers:
    """High-resolution timers on an event loop: never early, late only by what waking a thread costs.

    A loop's own timers are rounded to milliseconds, by uvloop even downwards: a guest's timer wants better. One
    kernel timer serves any number of handles. Used on the loop's thread only.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._heap: list[TimerHandle] = []
        self._dead = 0  # how many handles in the heap are cancelled
        self._armed = 0  # what the kernel timer is set to; 0 when it is not
        self._alarm = _alarm()
        loop.add_reader(self._alarm.fileno(), self._ready)

    def at(self, ns: int, callback: Callable[[], None]) -> TimerHandle:
        """Call ``callback`` on the loop when :func:`time.monotonic_ns` has reached ``ns``."""
        handle = TimerHandle(ns, callback, self)
        heapq.heappush(self._heap, handle)
        self._arm()
        return handle

    def cancelled(self) -> None:
        """A handle's own word that it is cancelled. Once most are, they go: some were for days ahead."""
        self._dead += 1
        if self._dead > _DEAD_KEPT and self._dead * 2 > len(self._heap):
            self._heap = [handle for handle in self._heap if handle.callback is not None]
            heapq.heapify(self._heap)
            self._dead = 0

    def close(self) -> None:
        """Forget every handle and close the kernel timer."""
        self._heap = []
        self._dead = 0
        self._loop.remove_reader(self._alarm.fileno())
        self._alarm.close()

    def _arm(self) -> None:
        heap = self._heap
        while heap and heap[0].callback is None:
            heapq.heappop(heap)
            self._dead -= 1
        # A timer left armed for a cancelled handle costs at most one idle turn; setting it costs a call every time.
        if heap and heap[0].ns != self._armed:
            self._armed = heap[0].ns
            self._alarm.set(self._armed)

    def _ready(self) -> None:
        self._alarm.drain()
        self._armed = 0
        now = time.monotonic_ns()
        try:
            while self._heap and self._heap[0].ns <= now:
                handle = heapq.heappop(self._heap)
                callback, handle.callback = handle.callback, None
                if callback is None:
                    self._dead -= 1
                else:
                    callback()
        finally:
            self._arm()
