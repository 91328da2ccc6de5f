"""Ticks, deadlines and timers, against integer arithmetic done another way and the kernel's own clock."""

from __future__ import annotations

import asyncio
import os
import random
import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from avmm.clock import EXPIRED, Clock, DeadlineTimers, Timebase, host_timebase
from tests.unit.loops import on_both_loops

U64 = (1 << 64) - 1
DAY = 24 * 3600 * 10**9


class Stopped:
    """A counter that stands where it is put."""

    def __init__(self, numer: int = 125, denom: int = 3) -> None:
        self.ticks = 0
        self.timebase = Timebase(numer, denom, lambda: self.ticks)


#: 24 MHz (Apple silicon, softhv), 1 GHz (counter scaling), and an awkward one.
TIMEBASES = st.sampled_from([(125, 3), (1, 1), (1000, 7)])


@given(TIMEBASES, st.integers(0, 1 << 62))
def test_waits_are_never_short(base: tuple[int, int], ticks: int) -> None:
    timebase = Timebase(*base, lambda: 0)
    ns = timebase.to_ns(ticks)
    exact = Fraction(ticks * base[0], base[1])
    assert exact <= ns < exact + 1
    assert timebase.to_ticks(ns) >= ticks
    if ns:
        assert timebase.to_ticks(ns - 1) < ticks or base[0] < base[1]


def test_host_counter_is_the_monotonic_clock() -> None:
    timebase = host_timebase()
    before = time.monotonic_ns()
    ticks = timebase.now()
    after = time.monotonic_ns()
    assert timebase.to_ticks(before) <= ticks <= timebase.to_ticks(after) + 1


def test_nothing_expires_while_the_guest_s_time_stands_still() -> None:
    counter = Stopped(1, 1)
    clock = Clock(counter.timebase)
    clock.stop()
    counter.ticks = 1_000
    deadline = clock.when(100)
    assert deadline == 100
    late = clock.start()
    assert clock.when(100) == deadline + late == 1_100


@given(TIMEBASES, st.integers(0, 1 << 50), st.integers(0, U64), st.integers(0, U64), st.integers(0, 7))
def test_deadline(base: tuple[int, int], now: int, offset: int, cval: int, ctl: int) -> None:
    counter = Stopped(*base)
    clock = Clock(counter.timebase)
    counter.ticks = now
    clock.offset = offset
    guest_now = (now - offset) % (1 << 64)
    assert clock.guest_now() == guest_now
    deadline = clock.deadline(ctl, cval)
    if not ctl & 1 or ctl & 2:
        assert deadline is None
    elif guest_now >= cval:
        assert deadline == EXPIRED
    else:
        assert deadline is not None
        exact = Fraction((now + cval - guest_now) * base[0], base[1])
        capped = Fraction(now * base[0], base[1]) + DAY
        assert min(exact, capped) <= deadline < min(exact, capped) + 1


def test_guest_time_starts_at_zero() -> None:
    counter = Stopped()
    counter.ticks = 1 << 40
    clock = Clock(counter.timebase)
    counter.ticks += 5
    assert clock.guest_now() == 5


@on_both_loops
async def test_timers_fire_in_order_and_never_early() -> None:
    timers = DeadlineTimers(asyncio.get_running_loop())
    rng = random.Random(1)
    start = time.monotonic_ns()
    whens = [start + rng.randrange(20_000_000) for _ in range(300)]
    fired: list[int] = []
    early: list[int] = []
    done = asyncio.Event()

    def fire(when: int) -> None:
        fired.append(when)
        if time.monotonic_ns() < when:
            early.append(when)
        if len(fired) == len(whens):
            done.set()

    for when in whens:
        timers.at(when, lambda when=when: fire(when))  # type: ignore[misc]  # mypy knows no such default
    await asyncio.wait_for(done.wait(), 20)
    assert early == []
    assert fired == sorted(whens)
    timers.close()


@on_both_loops
async def test_cancelled_timers_stay_silent() -> None:
    timers = DeadlineTimers(asyncio.get_running_loop())
    fired: list[str] = []
    done = asyncio.Event()
    now = time.monotonic_ns()
    first = timers.at(now + 2_000_000, lambda: fired.append("first"))
    second = timers.at(now + 4_000_000, lambda: fired.append("second"))
    timers.at(now + 6_000_000, done.set)
    first.cancel()

    def cancel_second() -> None:
        fired.append("early")
        second.cancel()

    timers.at(now + 1_000_000, cancel_second)  # before the armed one: the kernel timer is set anew
    await asyncio.wait_for(done.wait(), 20)
    assert fired == ["early"]
    second.cancel()
    timers.close()


@on_both_loops
async def test_callback_may_set_timers_and_fail() -> None:
    loop = asyncio.get_running_loop()
    errors: list[object] = []
    loop.set_exception_handler(lambda loop, context: errors.append(context["exception"]))
    timers = DeadlineTimers(loop)
    done = asyncio.Event()

    def again() -> None:
        timers.at(time.monotonic_ns() + 100_000, done.set)
        raise ZeroDivisionError

    timers.at(1, again)  # long past: fires at once
    await asyncio.wait_for(done.wait(), 20)
    assert [type(error) for error in errors] == [ZeroDivisionError]
    timers.close()


@on_both_loops
async def test_kernel_timer_is_set_only_when_the_earliest_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    timers = DeadlineTimers(asyncio.get_running_loop())
    settings: list[int] = []
    real = timers._alarm.set

    def record(ns: int) -> None:
        settings.append(ns)
        real(ns)

    monkeypatch.setattr(timers._alarm, "set", record)
    far = time.monotonic_ns() + 10**12
    timers.at(far, lambda: None)
    timers.at(far + 1, lambda: None)
    timers.at(far - 1, lambda: None).cancel()
    timers.at(far, lambda: None)
    assert settings == [far, far - 1, far]
    timers.close()


@on_both_loops
async def test_close_releases_everything() -> None:
    await asyncio.sleep(0)
    fds = len(os.listdir("/proc/self/fd"))
    timers = DeadlineTimers(asyncio.get_running_loop())
    timers.at(time.monotonic_ns() + 10**12, lambda: None)
    timers.close()
    assert len(os.listdir("/proc/self/fd")) == fds


@on_both_loops
async def test_cancelled_timers_do_not_pile_up() -> None:
    """A guest that is woken before its far deadline, again and again, costs no memory; the others still fire."""
    timers = DeadlineTimers(asyncio.get_running_loop())
    far = time.monotonic_ns() + 10**12
    done = asyncio.Event()
    for number in range(10_000):
        handle = timers.at(far + number, lambda: None)
        if number % 100 == 0:
            timers.at(far, done.clear)
        handle.cancel()
        handle.cancel()
    assert len(timers._heap) < 400
    timers.at(time.monotonic_ns() + 100_000, done.set)
    await asyncio.wait_for(done.wait(), 20)
    timers.close()
