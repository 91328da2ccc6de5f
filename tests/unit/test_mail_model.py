"""Every interleaving of the engine's mail (softhv/mail.c): a model in explicit states, each able to come to its end.

Two or three vCPUs that never leave the guest by themselves, and a host thread that changes the memory map. A vCPU
posts mail to the others, waits at its DSB until they have read it, and runs on. What C does under the VM's lock is one
step, but for the waiter's last look: what it looks at changes without the lock. Broken protocols show that the search
notices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest


@dataclass(frozen=True, slots=True)
class Vcpu:
    at: str = "out"  # out | entering | run | room | sync | asleep, and the steps between them
    why: str = ""  # what it waits in: room | sync
    then: str = ""  # where it goes on when it has told the waiters
    mail: bool = False
    stop: bool = False
    posts: int = 1

    @property
    def inside(self) -> bool:
        return self.at not in ("out", "left")


@dataclass(frozen=True, slots=True)
class State:
    vcpus: tuple[Vcpu, ...]
    stopper: str = "todo"  # todo | asleep | woken | done
    waiters: int = 0
    syncing: int = 0
    locked: bool = False  # by a waiter between its announcement and its sleep


class Protocol:
    """The one of mail.c, run.c and vm.c."""

    stop_is_mail = False  # one flag for both
    announces = True  # itself as a waiter, before it looks for the last time
    leaving_tells = True  # the waiters
    reading_tells = True

    def put(self, s: State, i: int, v: Vcpu) -> State:
        return replace(s, vcpus=(*s.vcpus[:i], v, *s.vcpus[i + 1 :]))

    def moved(self, s: State) -> State:
        """All waiters are woken; under the lock."""
        return replace(s, vcpus=tuple(replace(v, at="woken") if v.at == "asleep" else v for v in s.vcpus))

    def behind(self, s: State, i: int) -> bool:
        return any(v.inside and v.mail for j, v in enumerate(s.vcpus) if j != i)

    def waits(self, s: State, i: int) -> bool:
        v = s.vcpus[i]
        return bool(s.syncing) and self.behind(s, i) and not (v.why == "room" and v.stop)

    def stops(self, s: State) -> bool:
        return s.stopper in ("asleep", "woken")

    def asked_out(self, v: Vcpu) -> Vcpu:
        return replace(v, mail=True) if self.stop_is_mail else replace(v, stop=True)

    def steps(self, s: State) -> Iterator[State]:
        for i in range(len(s.vcpus)):
            yield from self.vcpu(s, i)
        if s.locked:
            return
        if s.stopper in ("todo", "woken"):
            if not any(v.inside for v in s.vcpus):
                yield replace(s, stopper="done")
            else:
                asked = tuple(self.asked_out(v) if v.inside else v for v in s.vcpus)
                yield self.moved(replace(s, stopper="asleep", vcpus=asked))

    def vcpu(self, s: State, i: int) -> Iterator[State]:
        v = s.vcpus[i]
        free = not s.locked
        match v.at:
            case "out":
                if free and not self.stops(s):
                    yield self.put(s, i, replace(v, at="entering"))
            case "entering":
                yield self.put(s, i, replace(v, at="tell", then="run", mail=False) if v.mail else replace(v, at="run"))
            case "tell":  # after its flag has changed: looks whether anybody waits
                if not (s.waiters and self.reading_tells):
                    yield self.put(s, i, replace(v, at=v.then, then=""))
                elif free:
                    yield self.moved(self.put(s, i, replace(v, at=v.then, then="")))
            case "run":
                if v.mail:
                    yield self.put(s, i, replace(v, at="tell", then="room", mail=False))
                elif v.stop:
                    yield from self.leave(s, i)
                elif v.posts and free:
                    told = tuple(w if j == i else replace(w, mail=True) for j, w in enumerate(s.vcpus))
                    s = replace(s, vcpus=told, syncing=s.syncing + 1)
                    yield self.moved(self.put(s, i, replace(v, at="look", why="sync", posts=v.posts - 1)))
            case "room":
                yield self.put(s, i, replace(v, at="look", why="room"))
            case "look" | "woken":
                if not free:
                    return
                if v.at == "woken":
                    s = replace(s, waiters=s.waiters - 1)
                if not self.waits(s, i):
                    yield self.put(s, i, replace(v, at="over"))
                elif v.mail:
                    yield self.put(s, i, replace(v, at="tell", then="look", mail=False))
                else:
                    waiters = s.waiters + self.announces
                    yield self.put(replace(s, waiters=waiters, locked=True), i, replace(v, at="last look"))
            case "last look":
                s = replace(s, locked=False)
                if not self.announces:  # it saw what it saw before, and sleeps
                    yield self.put(replace(s, waiters=s.waiters + 1), i, replace(v, at="asleep"))
                elif self.waits(s, i) and not v.mail:
                    yield self.put(s, i, replace(v, at="asleep"))
                else:
                    yield self.put(replace(s, waiters=s.waiters - 1), i, replace(v, at="look"))
            case "over":
                if v.why == "sync":
                    after = replace(v, at="tell", then="run", why="")
                    yield self.put(replace(s, syncing=s.syncing - 1), i, after)
                elif v.stop or (self.stop_is_mail and self.stops(s)):
                    yield from self.leave(s, i)
                else:
                    yield self.put(s, i, replace(v, at="run", why=""))

    def leave(self, s: State, i: int) -> Iterator[State]:
        if s.locked:
            return
        s = self.put(s, i, replace(s.vcpus[i], at="out", why="", stop=False))
        if self.leaving_tells:
            s = self.moved(s)
        if s.stopper == "asleep" and not any(v.inside for v in s.vcpus):
            s = replace(s, stopper="woken")
        yield s


def ended(s: State) -> bool:
    """The map has changed, and all run with nothing left to say or to read."""
    return s.stopper == "done" and all(v.at == "run" and not (v.posts or v.mail or v.stop) for v in s.vcpus)


def stuck(protocol: Protocol, vcpus: int, posts: int) -> tuple[int, list[State]]:
    """How many states can be reached; those from which the end cannot."""
    start = State(tuple(Vcpu(posts=posts) for _ in range(vcpus)))
    before: dict[State, list[State]] = {start: []}
    todo = [start]
    while todo:
        state = todo.pop()
        for after in protocol.steps(state):
            if after not in before:
                before[after] = []
                todo.append(after)
            before[after].append(state)
    good = {state for state in before if ended(state)}
    todo = list(good)
    while todo:
        for state in before[todo.pop()]:
            if state not in good:
                good.add(state)
                todo.append(state)
    return len(before), [state for state in before if state not in good]


@pytest.mark.parametrize(("vcpus", "posts"), [(2, 2), (3, 1)])
def test_every_wait_ends(vcpus: int, posts: int) -> None:
    count, bad = stuck(Protocol(), vcpus, posts)
    assert not bad, bad[0]
    assert count > 1000


BROKEN = [("stop_is_mail", True), ("announces", False), ("leaving_tells", False), ("reading_tells", False)]


@pytest.mark.parametrize(("name", "value"), BROKEN)
def test_a_broken_protocol_gets_stuck(name: str, value: bool) -> None:
    class Broken(Protocol):
        pass

    setattr(Broken, name, value)
    assert stuck(Broken(), 3, 1)[1]
