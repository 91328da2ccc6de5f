"""Parking: how a vCPU sleeps in WFI without spinning and without sleeping through anything.

One :class:`Parking` per vCPU joins three parties. The *vCPU thread* decides to park, the *posters* (interrupt
controller, PSCI, pause, stop; any thread) have something for the vCPU, and the *coroutine* on the event loop waits.

::

              park()           run()            wait()
    RUNNING ─────────► PARKED ──── at the gate ──── a future ──► RUNNING    by an interrupt, the deadline, or stop
       │                                                            ▲
       └─ turn_off() ─► OFF ─────────────────────── a future ───────┘       by PSCI CPU_ON, or stop

A sleep begins on the vCPU's own thread, inside the engine's ``run``, at a *gate* that needs no interpreter (gate.c):
whoever has an interrupt for the vCPU opens it, and the thread goes straight into the guest. Only a sleep that turns out
long (:data:`LINGER_NS`) goes to the event loop, where it is no more than a future that nobody has resolved yet and an
entry among the timers; a wake from there takes two.

What makes it safe: every transition and every post happens under the VM's one lock. The vCPU thread looks for pending
work and publishes PARKED in one critical section; a poster changes its condition and looks at the mode in one critical
section. So either the vCPU sees the condition, or the poster sees PARKED. The same holds on the way into the guest with
``entered``, which tells a poster that only a kick can reach the vCPU; who opens the gate into the guest sets it. The
coroutine may come late: a wake that finds no future changes the mode, and :meth:`Parking.wait` returns at once.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from enum import IntEnum
from typing import Final, Protocol

from avmm.hypervisor.base import ENTER, OFFERED, OUT, TAKEN, Frame
from avmm.vcpu.stats import WakeStats


class Mode(IntEnum):
    """What a vCPU is doing."""

    RUNNING = 0  # on its thread, or on the way there
    PARKED = 1  # in WFI, its thread idle
    OFF = 2  # PSCI CPU_OFF, or never turned on
    STOPPED = 3  # for good


class Cause(IntEnum):
    """What ended a wait."""

    TIMER = 0
    IRQ = 1
    POWER = 2
    STOP = 3


#: Bits of :attr:`Parking.attention`: reasons to come out of the guest, looked at before every entry.
STOP: Final = 1
PAUSE: Final = 2

#: A wait shorter than this, in nanoseconds, is not worth a trip to the loop and back: that is two thread wakes, which
#: take longer on every machine we know of (a fast desktop some 20 us each). The vCPU spins through the rest of its WFI.
TRIP_NS: Final = 50_000

#: How long, in nanoseconds, a sleep stays on the vCPU's thread. Blocked there it costs nothing, and its wake costs half
#: of one through the loop; handing it over costs one wake more. At one a second that is too little to measure.
LINGER_NS: Final = 1_000_000_000

#: How often, in seconds, a vCPU that was called out of the guest is called again until it comes: kicks get lost.
REKICK: Final = 0.01


class Timer(Protocol):
    """A timer's handle."""

    def cancel(self) -> None: ...


class Timers(Protocol):
    """Where deadlines are kept: :class:`avmm.clock.DeadlineTimers`, or a test's."""

    def at(self, ns: int, callback: Callable[[], None]) -> Timer: ...


class Sleeper(Protocol):
    """The engine's vCPU, as far as its sleep goes: see :class:`avmm.hypervisor.base.Vcpu`."""

    frame: Frame

    def kick(self) -> None: ...

    def open_gate(self, how: int) -> None: ...

    def stir(self) -> None: ...

    def shut_gate(self) -> None: ...

    def withdraw(self) -> int: ...


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class Parking:
    """Where one vCPU waits; its IRQ input (:class:`avmm.irq.IrqSink`) ends here.

    ``lock`` is the VM's. ``vcpu`` is the engine's; set it before the first entry. Made on the thread of ``loop``,
    where :meth:`wait` runs.
    """

    __slots__ = (
        "_future", "_loop", "_loop_thread", "_timer", "_timers", "_watch",
        "attention", "called", "deadline", "entered", "irq", "lingering", "lock", "mode", "on_irq", "stats", "vcpu",
        "wakes", "watched",
    )  # fmt: skip

    def __init__(self, lock: threading.RLock, loop: asyncio.AbstractEventLoop, timers: Timers) -> None:
        self.lock = lock
        self.mode = Mode.OFF
        self.irq = False  # the level of the IRQ input
        self.attention = 0  # STOP, PAUSE
        self.entered = False  # in the guest, or past the last look at irq and attention
        self.watched = False  # somebody will look whether it has come
        self.called = False  # kicked since it entered
        self.deadline: int | None = None  # of the latest park: nanoseconds of the monotonic clock
        self.lingering = False  # parked, the thread at the gate or on its way there
        self.vcpu: Sleeper | None = None
        self.wakes = [0] * len(Cause)
        self.stats = WakeStats()
        self.on_irq: Callable[[bool], None] | None = None  # a tracer that wants to know the IRQ input's level
        self._loop = loop
        self._loop_thread = threading.get_ident()
        self._timers = timers
        self._timer: Timer | None = None  # ends the coroutine's wait
        self._future: asyncio.Future[None] | None = None
        self._watch: asyncio.TimerHandle | None = None  # looks whether who was called has come

    # The vCPU thread; the lock is held.

    def park(self, deadline: int | None) -> bool:
        """Publish that this vCPU sleeps until ``deadline``. False, and no sleep, when something is pending.

        An interrupt counts whatever PSTATE.I says: WFI completes on it (Arm ARM D1.6.2), Linux idles that way.
        """
        if self.irq or self.attention:
            return False
        self.deadline = deadline
        self.mode = Mode.PARKED
        self.stats.park()
        self.lingering = True
        return True

    def lie_down(self, frame: Frame) -> None:
        """After :meth:`park`: the next ``run`` is to sleep first, at the gate."""
        linger = time.monotonic_ns() + LINGER_NS
        deadline = self.deadline
        if deadline is not None and deadline <= linger:
            frame.sleep_until, frame.sleep_exact = deadline, 1
        else:
            frame.sleep_until, frame.sleep_exact = linger, 0
        frame.sleep = 1

    def turn_off(self) -> None:
        """CPU_OFF: only :meth:`power_on` or a stop ends this sleep."""
        self.deadline = None
        self.mode = Mode.OFF

    def give_up(self, expired: bool) -> None:
        """``run`` slept and came out again; ``expired``: nobody had opened the gate, and the deadline has come."""
        self.entered = False  # somebody may have thought so
        if not self.lingering:
            assert self.vcpu is not None
            self.vcpu.shut_gate()  # it may have been opened before we had the lock
            return
        self.lingering = False
        if expired:
            self._wake(Cause.TIMER)

    # Posters: any thread.

    def irq_changed(self, level: bool) -> None:
        """The IRQ input is now ``level``. The caller holds the lock."""
        self.irq = level
        if self.on_irq is not None:
            self.on_irq(level)
        if level:
            if self.mode is Mode.PARKED:
                self._wake(Cause.IRQ)
            elif self.entered:
                self._call()

    def stir(self) -> None:
        """See :class:`avmm.irq.IrqSink`."""
        if self.lingering and self.vcpu is not None:
            self.vcpu.stir()

    def offer(self, intid: int) -> None:
        """See :class:`avmm.irq.IrqSink`."""
        if self.vcpu is not None:
            self.vcpu.frame.offer = OFFERED | intid

    def retract(self) -> bool:
        """See :class:`avmm.irq.IrqSink`."""
        vcpu = self.vcpu
        if vcpu is None:
            return False
        if self.entered:
            return vcpu.withdraw() & TAKEN != 0
        # Nobody else can be at it: the thread is outside the guest and stays there while we hold the lock.
        offer, vcpu.frame.offer = vcpu.frame.offer, 0
        return offer & TAKEN != 0

    def power_on(self) -> None:
        """PSCI turned this vCPU on."""
        with self.lock:
            if self.mode is Mode.OFF:
                self._wake(Cause.POWER)

    def request(self, attention: int) -> None:
        """Call the vCPU out of the guest. A pause lets it sleep: it does not run then; a stop wakes it."""
        with self.lock:
            self.attention |= attention
            if self.entered:
                self._call()
            elif attention & STOP and self.mode in (Mode.PARKED, Mode.OFF):
                self._wake(Cause.STOP)
            elif self.lingering:
                self._open_gate(OUT)

    def withdraw(self, attention: int) -> None:
        """Take a request back."""
        with self.lock:
            self.attention &= ~attention

    def hold(self) -> None:
        """After a pause was requested, on the loop: no deadline ends this sleep before :meth:`unhold`."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def unhold(self, late_ns: int) -> None:
        """After the pause was withdrawn, on the loop: the guest's time stood still for ``late_ns`` nanoseconds."""
        with self.lock:
            if self.deadline is not None:
                self.deadline += late_ns
        self._set_timer()

    def stopped(self) -> None:
        """The vCPU is about to be destroyed: nothing wakes or kicks it any more."""
        with self.lock:
            self.mode = Mode.STOPPED
            self.entered = False
            if self._watch is not None:
                self._watch.cancel()

    def _wake(self, cause: Cause) -> None:
        now = time.monotonic_ns()
        self.mode = Mode.RUNNING
        if self.lingering:  # the sleeper first, the books later: it cannot overtake us, who hold the lock
            self._open_gate(ENTER if cause is Cause.IRQ else OUT)
        else:
            self._resolve_future()
        self.wakes[cause] += 1
        self.stats.wake(now, self.deadline if cause is Cause.TIMER else None)

    def _resolve_future(self) -> None:
        future, self._future = self._future, None
        if future is None:
            return  # the coroutine is still on its way to wait(), which will look at the mode
        if threading.get_ident() == self._loop_thread:
            _resolve(future)
        else:
            self._loop.call_soon_threadsafe(_resolve, future)

    def _call(self) -> None:
        """Kick, and see to it that the kick is repeated should it be lost. One watch serves all kicks meanwhile."""
        self.called = True
        self._kick()
        if not self.watched:
            self.watched = True
            if threading.get_ident() == self._loop_thread:
                self._watch_later()
            else:
                self._loop.call_soon_threadsafe(self._watch_later)

    def _kick(self) -> None:
        assert self.vcpu is not None
        self.vcpu.kick()

    def _watch_later(self) -> None:
        self._watch = self._loop.call_later(REKICK, self.look_after)

    def look_after(self) -> None:
        """On the loop, a while after a kick: kick again whoever has not come out, else stop watching."""
        with self.lock:
            self.watched = self.entered and self.called
            if self.watched:
                self._kick()
                self._watch_later()

    def _open_gate(self, how: int) -> None:
        assert self.vcpu is not None
        self.lingering = False
        if how == ENTER:
            self.entered = True
            self.called = False
        self.vcpu.open_gate(how)

    # The coroutine, on the loop.

    async def wait(self) -> None:
        """Sleep while PARKED or OFF. Returns at once when a wake, or a stop, came first."""
        with self.lock:
            future = self.begin_wait()
        if future is None:
            return
        self._set_timer()
        try:
            await future
        finally:
            self.hold()
            self._future = None

    def _set_timer(self) -> None:
        if self._future is not None and self.deadline is not None and not self.attention & PAUSE:
            self._timer = self._timers.at(self.deadline, self.expire)

    def begin_wait(self) -> asyncio.Future[None] | None:
        """The future that the next wake resolves; None when there is nothing to wait for. The lock is held."""
        if self.mode in (Mode.PARKED, Mode.OFF) and not self.attention & STOP:
            self._future = self._loop.create_future()
            return self._future
        return None

    def expire(self) -> None:
        """The deadline of this park has come."""
        with self.lock:
            if self.mode is Mode.PARKED:
                self._wake(Cause.TIMER)
