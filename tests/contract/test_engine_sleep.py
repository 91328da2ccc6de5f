"""A sleep before the guest is entered, and an acknowledge without an exit, on every engine this machine has."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from avmm.hypervisor import ExitKind, Finish, available_engines, open_hypervisor
from avmm.hypervisor.base import ENTER, OFFERED, OUT, TAKEN
from tests.contract.test_engine_abi import (
    ADD_X2_X2_1,
    HVC,
    MRS_X3_ICC_IAR1,
    MSR_DAIFCLR_IRQ,
    NOP,
    TIMEOUT,
    VECTORS,
    Guest,
    boot,
    engine,
    thread,
)

__all__ = ["boot", "engine", "thread"]  # fixtures

Boot = Callable[..., Guest]

FAR = 1 << 62  # nanoseconds: never


def lie_down(guest: Guest, until: int = FAR, *, exact: bool = False) -> int:
    frame = guest.vcpu.frame
    frame.sleep, frame.sleep_until, frame.sleep_exact = 1, until, int(exact)
    return guest.vcpu.run()


def test_an_open_gate_lets_the_guest_in_with_its_interrupt(boot: Boot) -> None:
    guest = boot(NOP, MSR_DAIFCLR_IRQ, NOP, HVC)
    before = time.monotonic_ns()
    guest.vcpu.open_gate(ENTER)
    assert lie_down(guest) == ExitKind.HVC
    frame = guest.vcpu.frame
    assert before <= frame.entered <= time.monotonic_ns()
    assert frame.pc == VECTORS + 0x280 + 4
    assert not frame.expired
    assert frame.irq == 1


def test_a_gate_is_passed_once(boot: Boot) -> None:
    guest = boot(HVC)
    guest.vcpu.open_gate(ENTER)
    guest.vcpu.open_gate(OUT)  # whoever comes last is heard
    assert lie_down(guest) == ExitKind.CANCELED
    assert not guest.vcpu.frame.expired
    assert guest.vcpu.frame.entered == 0
    lie_down(guest, time.monotonic_ns())
    assert guest.vcpu.frame.expired
    guest.vcpu.open_gate(ENTER)
    guest.vcpu.shut_gate()
    lie_down(guest, time.monotonic_ns())
    assert guest.vcpu.frame.expired


def test_a_sleep_that_is_called_off_finishes_nothing(boot: Boot) -> None:
    guest = boot(HVC, ADD_X2_X2_1, HVC)
    assert guest.vcpu.run() == ExitKind.HVC
    guest.vcpu.open_gate(OUT)
    guest.vcpu.frame.finish = Finish.ADVANCE
    assert lie_down(guest) == ExitKind.CANCELED
    assert guest.vcpu.frame.finish == Finish.ADVANCE
    assert guest.vcpu.get_reg(2) == 0


@pytest.mark.parametrize("exact", [False, True])
def test_a_sleep_is_never_short(boot: Boot, exact: bool) -> None:
    guest = boot(HVC)
    for length in (0, 1, 1_000, 60_000, 1_000_000) * 20:
        until = time.monotonic_ns() + length
        assert lie_down(guest, until, exact=exact) == ExitKind.CANCELED
        assert guest.vcpu.frame.expired
        if exact:
            assert time.monotonic_ns() >= until


@pytest.mark.parametrize("poll", [0, 200_000])
@pytest.mark.parametrize("name", available_engines())
def test_every_opening_is_seen(name: str, poll: int, thread: ThreadPoolExecutor) -> None:
    """Whether it comes before the sleep, in its poll, or while it blocks."""
    number = 20_000
    awake = threading.Semaphore(0)
    made: list[Guest] = []

    def sleeper() -> None:
        guest = Guest(open_hypervisor(name), HVC)
        guest.vcpu.set_poll(poll)
        made.append(guest)
        awake.release()
        for _ in range(number):
            lie_down(guest)
            assert not guest.vcpu.frame.expired
            awake.release()
        guest.close()

    done = thread.submit(sleeper)
    for count in range(number + 1):
        assert awake.acquire(timeout=TIMEOUT), f"opening {count} was not seen"
        for _ in range(count % 300):
            pass
        if count < number:
            made[0].vcpu.open_gate(OUT)
    done.result(TIMEOUT)


# ---- Offers ----------------------------------------------------------------------------------------------------------


def test_an_offer_answers_without_an_exit_and_lowers_the_input(boot: Boot) -> None:
    guest = boot(MRS_X3_ICC_IAR1, MSR_DAIFCLR_IRQ, NOP, HVC)
    frame = guest.vcpu.frame
    frame.irq = 1
    frame.offer = OFFERED | 42
    assert guest.vcpu.run() == ExitKind.HVC
    assert frame.pc == guest.region.base + 16  # no interrupt was taken
    assert guest.vcpu.get_reg(3) == 42
    assert (frame.offer, frame.acknowledged, frame.irq) == (TAKEN | 42, 1, 0)
    assert guest.vcpu.withdraw() == TAKEN | 42
    assert guest.vcpu.withdraw() == 0


def test_an_offer_holds_once(boot: Boot) -> None:
    guest = boot(MRS_X3_ICC_IAR1, MRS_X3_ICC_IAR1, HVC)
    guest.vcpu.frame.offer = OFFERED  # SGI 0
    assert guest.vcpu.run() == ExitKind.SYSREG_READ
    assert guest.vcpu.frame.pc == guest.region.base + 4
    assert guest.vcpu.frame.offer == TAKEN


def test_no_offer_no_answer(boot: Boot) -> None:
    guest = boot(MRS_X3_ICC_IAR1, HVC)
    guest.vcpu.frame.offer = OFFERED | 42
    assert guest.vcpu.withdraw() == OFFERED | 42
    assert guest.vcpu.run() == ExitKind.SYSREG_READ
    assert guest.vcpu.frame.acknowledged == 0


def test_an_offer_is_taken_or_withdrawn_never_both(boot: Boot, thread: ThreadPoolExecutor) -> None:
    guest = boot(*[MRS_X3_ICC_IAR1, HVC] * 2000)
    vcpu = guest.vcpu
    found: list[int] = []
    start = threading.Barrier(2)

    def withdraw() -> None:
        for _ in range(2000):
            start.wait(TIMEOUT)
            for _ in range(len(found) % 50):
                pass
            found.append(vcpu.withdraw())
            start.wait(TIMEOUT)

    done = thread.submit(withdraw)
    for index in range(2000):
        vcpu.frame.acknowledged = 0
        vcpu.frame.offer = OFFERED | 33
        vcpu.set_reg(3, 0)
        start.wait(TIMEOUT)
        kind = vcpu.run()
        start.wait(TIMEOUT)
        if kind == ExitKind.HVC:
            assert vcpu.get_reg(3) == 33
            assert (found[index], vcpu.frame.acknowledged) == (TAKEN | 33, 1)
        else:
            assert kind == ExitKind.SYSREG_READ
            assert (found[index], vcpu.frame.acknowledged) == (OFFERED | 33, 0)
            vcpu.frame.finish = Finish.RESULT
            assert vcpu.run() == ExitKind.HVC
    done.result(TIMEOUT)
