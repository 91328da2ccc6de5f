"""Every interleaving of the parking protocol: an explicit-state search that drives the real :class:`Parking`.

Actors: the vCPU's thread, its coroutine, the loop's queue of callbacks, the deadline, a poster of interrupts (on the
loop or on a thread of its own), the guest's PSCI, a pauser, a stopper. What happens under the VM's lock is one step.
The search checks each reachable state, and that each can still reach the end. Broken protocols show that it notices.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import pytest

from avmm.hypervisor.base import ENTER, OUT
from avmm.vcpu.park import PAUSE, STOP, Cause, Mode, Parking

SHUT = 0


@dataclass(frozen=True, slots=True)
class State:
    # The Parking's own.
    mode: Mode = Mode.RUNNING
    irq: bool = False
    attention: int = 0
    entered: bool = False
    called: bool = False
    watched: bool = False
    deadline: int | None = None
    lingering: bool = False
    gate: int = SHUT  # SHUT, ENTER or OUT
    attached: bool = False  # it holds the future that the coroutine awaits
    # The engine and the guest.
    thread: str = "idle"  # idle | serve | guest | left | asleep | awake | late
    exit: str = ""  # what is served next: "" | wfi | wfi-timer | ack | off
    delivered: bool = False  # the IRQ level the guest sees
    kicked: bool = False  # the engine's sticky kick
    inside: bool = False  # past the point where even a forgetful engine sees kicks
    # The coroutine and the loop.
    coroutine: str = "wait"  # wait | await | gate | job | ended
    resolved: bool = False
    queued: bool = False  # a call_soon_threadsafe of the resolution
    # The world.
    interrupts: int = 2  # left to post
    offs: int = 1  # times the guest may turn this vCPU off
    on_pending: bool = False
    off: bool = False
    pauser: str = "todo"  # todo | asked | paused | done
    stopper: str = "todo"  # todo | asked


class _Future:
    def __init__(self, world: World) -> None:
        self.world = world

    def done(self) -> bool:
        return self.world.resolved

    def set_result(self, result: None) -> None:
        self.world.resolved = True


class _Loop:
    def __init__(self, world: World) -> None:
        self.world = world

    def create_future(self) -> _Future:
        self.world.resolved = False
        return _Future(self.world)

    def call_soon_threadsafe(self, callback: Callable[..., None], *args: object) -> None:
        if args:
            self.world.queued = True
        else:
            callback()

    def call_later(self, delay: float, callback: Callable[[], None]) -> None:
        assert callback == self.world.parking.look_after


class World:
    """One state, thawed: a real Parking, and the rest as attributes."""

    def __init__(self, state: State, protocol: type[Parking], forgetful: bool) -> None:
        self.before = state
        self.forgetful = forgetful
        self.resolved = state.resolved
        self.queued = state.queued
        self.kicked = state.kicked
        self.gate = state.gate
        loop = cast(asyncio.AbstractEventLoop, _Loop(self))
        self.parking = parking = protocol(threading.RLock(), loop, cast(Any, None))
        parking.mode = state.mode
        parking.irq = state.irq
        parking.attention = state.attention
        parking.entered = state.entered
        parking.called = state.called
        parking.watched = state.watched
        parking.deadline = state.deadline
        parking.lingering = state.lingering
        parking._future = cast("asyncio.Future[None]", _Future(self)) if state.attached else None
        parking.vcpu = cast(Any, self)

    # The engine's vCPU.

    def open_gate(self, how: int) -> None:
        assert self.gate == SHUT, "opened twice"
        self.gate = how

    def stir(self) -> None: ...

    def shut_gate(self) -> None:
        self.gate = SHUT

    def kick(self) -> None:
        if self.before.inside or not self.forgetful:
            self.kicked = True

    def freeze(self, **changes: Any) -> State:
        parking = self.parking
        return replace(
            self.before,
            mode=parking.mode,
            irq=parking.irq,
            attention=parking.attention,
            entered=parking.entered,
            called=parking.called,
            watched=parking.watched,
            deadline=parking.deadline,
            lingering=parking.lingering,
            gate=self.gate,
            attached=parking._future is not None,
            resolved=self.resolved,
            queued=self.queued,
            kicked=changes.pop("kicked", self.kicked),
            **changes,
        )


def successors(state: State, protocol: type[Parking], forgetful: bool) -> Iterator[tuple[str, State]]:
    """Every step that any actor can take from ``state``."""

    def thaw() -> World:
        return World(state, protocol, forgetful)

    # The vCPU's thread, as run_until_event() does it.
    if state.thread == "serve":
        world = thaw()
        parking = world.parking
        changes: dict[str, Any] = {"exit": "", "on_pending": False, "off": state.off and not state.on_pending}
        if state.exit.startswith("wfi") and parking.park(9 if state.exit == "wfi-timer" else None):
            yield "serve: park", world.freeze(thread="asleep", **changes)
        elif state.exit == "off":
            parking.turn_off()
            yield "serve: off", world.freeze(thread="idle", **changes | {"off": True})
        else:
            if state.exit == "ack":
                parking.irq_changed(False)
            if parking.attention:
                yield "serve: attention", world.freeze(thread="idle", **changes)
            else:
                parking.called = False
                parking.entered = True
                yield "serve: enter", world.freeze(thread="guest", delivered=parking.irq, **changes)
    elif state.thread == "guest" and not state.inside:
        yield "engine: enter", replace(state, inside=True)
    elif state.thread == "guest":
        if state.kicked:
            yield "guest: canceled", replace(state, thread="left", exit="", kicked=False, inside=False)
        elif state.delivered:
            yield "guest: takes IRQ", replace(state, thread="left", exit="ack", inside=False)
        else:
            yield "guest: WFI", replace(state, thread="left", exit="wfi", inside=False)
            yield "guest: WFI, timer set", replace(state, thread="left", exit="wfi-timer", inside=False)
            if state.offs:
                yield "guest: CPU_OFF", replace(state, thread="left", exit="off", offs=state.offs - 1, inside=False)
    elif state.thread == "asleep":
        if state.gate == ENTER:
            yield "gate: to the guest", replace(state, gate=SHUT, thread="guest", delivered=True)
        elif state.gate == OUT:
            yield "gate: out", replace(state, gate=SHUT, thread="awake")
        else:
            yield "gate: too late", replace(state, thread="late")
    elif state.thread in ("awake", "late"):
        for expired in (False, True) if state.thread == "late" and state.deadline is not None else (False,):
            world = thaw()
            world.parking.give_up(expired)
            runs = world.parking.mode is Mode.RUNNING
            yield f"gives up, expired: {expired}", world.freeze(thread="serve" if runs else "idle")
    elif state.thread == "left":
        world = thaw()
        world.parking.entered = False
        yield "thread: left", world.freeze(thread="serve")

    # The coroutine, as _run() and wait() do it.
    if state.coroutine == "wait":
        world = thaw()
        waits = world.parking.begin_wait() is not None
        yield "coroutine: wait", world.freeze(coroutine="await" if waits else "gate")
    elif state.coroutine == "await" and state.resolved:
        world = thaw()
        world.parking._future = None
        yield "coroutine: woken", world.freeze(coroutine="gate")
    elif state.coroutine == "gate" and state.pauser not in ("asked", "paused"):
        if state.attention & STOP:
            yield "coroutine: stops", replace(state, coroutine="ended")
        else:
            yield "coroutine: submits", replace(state, coroutine="job", thread="serve")
    elif state.coroutine == "job" and state.thread == "idle":
        yield "coroutine: job done", replace(state, coroutine="wait")

    # The loop's queue, and the deadline.
    if state.queued:
        yield "loop: resolve", replace(state, queued=False, resolved=True)
    if state.coroutine == "await" and state.deadline is not None and not state.resolved:
        world = thaw()
        world.parking.expire()
        yield "timer: expire", world.freeze()

    if state.watched:
        world = thaw()
        world.parking.look_after()
        yield "watch: looks", world.freeze()

    # Posters, on the loop's thread or on another.
    for on_loop in (True, False):
        where = "loop" if on_loop else "thread"

        def poster() -> World:
            world = thaw()
            world.parking._loop_thread = threading.get_ident() if on_loop else 0  # noqa: B023  # called at once
            return world

        if state.interrupts and not state.irq:
            world = poster()
            world.parking.irq_changed(True)
            yield f"{where}: IRQ", world.freeze(interrupts=state.interrupts - 1)
        if state.off and not state.on_pending:
            world = poster()
            world.parking.power_on()
            yield f"{where}: CPU_ON", world.freeze(on_pending=True)

    # Pause and stop: on the loop.
    if state.pauser == "todo" and state.stopper == "todo":
        world = thaw()
        world.parking.request(PAUSE)
        yield "pauser: asks", world.freeze(pauser="asked")
    elif state.pauser == "asked":
        if state.thread == "idle":
            yield "pauser: settled", replace(state, pauser="paused")
    elif state.pauser == "paused":
        world = thaw()
        world.parking.withdraw(PAUSE)
        yield "pauser: resumes", world.freeze(pauser="done")
    if state.stopper == "todo" and state.pauser in ("todo", "done", "paused"):
        world = thaw()
        world.parking.request(STOP)
        yield "stopper: asks", world.freeze(stopper="asked", pauser="done")


def flaw(state: State, forgetful: bool) -> str:
    """What is wrong with ``state`` on its own, or nothing."""
    if state.mode is Mode.PARKED and state.irq:
        return "parked with its interrupt up"
    if state.mode is Mode.OFF and state.on_pending:
        return "off though turned on"
    if state.mode is not Mode.RUNNING and state.thread in ("serve", "guest", "left"):
        return "asleep while its thread runs"
    if state.thread in ("asleep", "late") and not state.gate and (state.mode is Mode.RUNNING or state.attention):
        return "called, but the gate stays shut"
    if state.gate and state.thread not in ("asleep", "late"):
        return "the gate is left open"
    if state.gate == ENTER and state.thread == "asleep" and not state.entered:
        return "let into the guest, and nobody knows"
    if state.coroutine == "await" and state.mode is Mode.RUNNING and not (state.resolved or state.queued):
        return "woken, but its future never resolves"
    if state.coroutine == "await" and state.attention & STOP and not (state.resolved or state.queued):
        return "asleep through a stop"
    if state.coroutine == "job" and state.thread == "idle" and state.pauser == "paused" and state.entered:
        return "paused inside the guest"
    if state.thread == "guest" and state.pauser == "paused":
        return "the guest runs while paused"
    called = state.kicked or (forgetful and state.called and state.watched)  # where kicks get lost, another follows
    if state.thread == "guest" and state.irq and not state.delivered and not called:
        return "computes with an interrupt it has not seen"
    if state.thread == "guest" and state.attention and not called:
        return "computes on though called out"
    return ""


def search(protocol: type[Parking], *, forgetful: bool) -> tuple[int, str]:
    """(number of states, what is wrong with the first bad one and how it comes about)."""
    start = State()
    came_from: dict[State, tuple[State, str] | None] = {start: None}
    predecessors: dict[State, list[State]] = {}
    frontier = deque([start])

    def story(state: State) -> str:
        steps = []
        at = came_from[state]
        while at is not None:
            steps.append(at[1])
            at = came_from[at[0]]
        return " > ".join(reversed(steps))

    while frontier:
        state = frontier.popleft()
        wrong = flaw(state, forgetful)
        if wrong:
            return len(came_from), f"{wrong}: {story(state)}"
        try:
            steps = list(successors(state, protocol, forgetful))
        except AssertionError as error:
            return len(came_from), f"{error}: {story(state)}"
        for step, after in steps:
            if after not in came_from:
                came_from[after] = state, step
                frontier.append(after)
            predecessors.setdefault(after, []).append(state)

    # Whatever happens, the end stays within reach: no deadlock, no livelock that cannot be left.
    ended = [state for state in came_from if state.coroutine == "ended"]
    good = set(ended)
    while ended:
        for before in predecessors.get(ended.pop(), ()):
            if before not in good:
                good.add(before)
                ended.append(before)
    stuck = next((state for state in came_from if state not in good), None)
    return len(came_from), f"stuck: {story(stuck)}" if stuck else ""


@pytest.mark.parametrize("forgetful", [False, True])
def test_protocol(forgetful: bool) -> None:
    states, wrong = search(Parking, forgetful=forgetful)
    assert wrong == ""
    assert states > 1000  # the search really went somewhere


class ParksBlindly(Parking):
    """Publishes without looking at the IRQ line."""

    def park(self, deadline: int | None) -> bool:
        self.lingering = True
        self.deadline = deadline
        self.mode = Mode.PARKED
        return True


class PostsWithoutLooking(Parking):
    """Raises the line but never looks whether anybody sleeps."""

    def irq_changed(self, level: bool) -> None:
        self.irq = level


class KicksOnlyParked(Parking):
    """Wakes sleepers but does not call a running guest out."""

    def irq_changed(self, level: bool) -> None:
        self.irq = level
        if level and self.mode is Mode.PARKED:
            self._wake(Cause.IRQ)


class WaitsAnyway(Parking):
    """The coroutine sleeps without looking whether the wake came first."""

    def begin_wait(self) -> asyncio.Future[None] | None:
        self._future = self._loop.create_future()
        return self._future


class StopsOnlyRunning(Parking):
    """A stop kicks a running guest but leaves sleepers asleep."""

    def request(self, attention: int) -> None:
        self.attention |= attention
        if self.entered:
            self._kick()


class StaysOff(Parking):
    """CPU_ON wakes those who are parked only."""

    def power_on(self) -> None:
        if self.mode is Mode.PARKED:
            self._wake(Cause.POWER)


class ShutsTheGate(Parking):
    """Wakes who lingers without opening the gate."""

    def _open_gate(self, how: int) -> None:
        self.lingering = False


class PausesOnlyRunning(Parking):
    """Does not call out a thread at the gate."""

    def request(self, attention: int) -> None:
        self.attention |= attention
        if self.entered:
            self._kick()
        elif attention & STOP and self.mode in (Mode.PARKED, Mode.OFF):
            self._wake(Cause.STOP)


class LeavesTheGateOpen(Parking):
    """Gives up without noticing that the gate was opened meanwhile."""

    def give_up(self, expired: bool) -> None:
        self.lingering = False
        if expired:
            self.mode = Mode.RUNNING


class LetsInUnseen(Parking):
    """Opens the gate into the guest without saying that somebody is in there."""

    def _open_gate(self, how: int) -> None:
        super()._open_gate(how)
        self.entered = False


class LetsPausedOnesIn(Parking):
    """Whatever it is called for, a sleeper goes straight into the guest."""

    def _open_gate(self, how: int) -> None:
        super()._open_gate(ENTER)


class KicksOnce(Parking):
    """Trusts that every kick arrives."""

    def _call(self) -> None:
        self.called = True
        self._kick()


class ForgetsTheFuture(Parking):
    """Wakes by mode alone."""

    def _wake(self, cause: Any) -> None:
        self.mode = Mode.RUNNING
        self._future = None


@pytest.mark.parametrize(
    "broken",
    [
        ParksBlindly,
        PostsWithoutLooking,
        KicksOnlyParked,
        WaitsAnyway,
        StopsOnlyRunning,
        StaysOff,
        ForgetsTheFuture,
        ShutsTheGate,
        PausesOnlyRunning,
        LeavesTheGateOpen,
        LetsInUnseen,
        LetsPausedOnesIn,
    ],
)
def test_search_notices(broken: type[Parking]) -> None:
    _, wrong = search(broken, forgetful=False)
    assert wrong


def test_search_notices_lost_kicks() -> None:
    _, wrong = search(KicksOnce, forgetful=True)
    assert wrong
