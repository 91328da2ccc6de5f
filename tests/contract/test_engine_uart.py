"""A UART whose output needs no exits, on every engine this machine has."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from avmm.hypervisor import ExitKind, Finish
from avmm.hypervisor.base import UartBatch
from tests.contract.test_engine_abi import HVC, TIMEOUT, Guest, boot, engine, resume, thread

__all__ = ["boot", "engine", "thread"]  # fixtures

UART = 0x900_0000
DR, FR = UART, UART + 0x18
STRB_W1_X0, STR_W2_X0, LDR_W3_FR, LDR_W3_DR = 0x39000001, 0xB9000002, 0xB9401803, 0xB9400003
ADD_X1_X1_1, BACK_2 = 0x91000421, 0x17FFFFFE
FLAGS = 0x97
LOOKS, ROOM = 4, 1024  # uart.c, frame.h


def start(boot: Callable[..., Guest], *words: int) -> tuple[Guest, UartBatch]:
    """A guest with a batch, about to run ``words``: x0 the UART, w1 and w2 what it prints."""
    guest = boot(HVC)
    guest.vcpu.close()
    batch = guest.hypervisor.batch_uart(UART)
    guest.poke(guest.region.base, *words)
    guest.hypervisor.host_wrote(guest.region.base, 4 * len(words))
    guest.vcpu = guest.start()
    for register, value in enumerate((UART, ord("a"), 0x1234_0000 + ord("b"))):
        guest.vcpu.set_reg(register, value)
    return guest, batch


def test_an_open_batch_takes_output_and_shows_the_flags(boot: Callable[..., Guest]) -> None:
    guest, batch = start(boot, STRB_W1_X0, LDR_W3_FR, STR_W2_X0, HVC)
    batch.open(FLAGS)
    assert guest.vcpu.run() == ExitKind.HVC
    assert guest.vcpu.get_reg(3) == FLAGS
    assert batch.close() == b"ab"
    assert batch.close() == b""
    assert batch.served() == 3


def test_a_closed_batch_takes_nothing(boot: Callable[..., Guest]) -> None:
    guest, batch = start(boot, STRB_W1_X0, LDR_W3_FR, HVC)
    batch.open(FLAGS)
    assert batch.close() == b""
    assert guest.vcpu.run() == ExitKind.MMIO_WRITE
    assert (guest.vcpu.frame.address, guest.vcpu.frame.value) == (DR, ord("a"))
    assert resume(guest.vcpu) == ExitKind.MMIO_READ
    assert guest.vcpu.frame.address == FR
    assert resume(guest.vcpu, Finish.RESULT, 5) == ExitKind.HVC
    assert guest.vcpu.get_reg(3) == 5
    assert batch.served() == 0


def test_other_registers_exit(boot: Callable[..., Guest]) -> None:
    guest, batch = start(boot, STRB_W1_X0, LDR_W3_DR, HVC)
    batch.open(FLAGS)
    assert guest.vcpu.run() == ExitKind.MMIO_READ
    assert guest.vcpu.frame.address == DR
    assert batch.close() == b"a"


def test_who_polls_the_flags_exits(boot: Callable[..., Guest]) -> None:
    guest, batch = start(boot, *[LDR_W3_FR] * (LOOKS + 1), STRB_W1_X0, LDR_W3_FR, HVC)
    batch.open(FLAGS)
    assert guest.vcpu.run() == ExitKind.MMIO_READ
    assert guest.vcpu.frame.pc == guest.region.base + 4 * LOOKS
    assert resume(guest.vcpu, Finish.RESULT) == ExitKind.HVC  # a byte, and it may look again


def test_a_full_batch_exits(boot: Callable[..., Guest]) -> None:
    guest, batch = start(boot, STRB_W1_X0, BACK_2 + 1)
    batch.open(FLAGS)
    assert guest.vcpu.run() == ExitKind.MMIO_WRITE
    assert batch.close() == b"a" * ROOM


def test_not_while_the_timer_is_masked(boot: Callable[..., Guest]) -> None:
    guest, batch = start(boot, STRB_W1_X0, HVC)
    guest.vcpu.frame.mask_vtimer = 1
    batch.open(FLAGS)
    assert guest.vcpu.run() == ExitKind.MMIO_WRITE


def test_every_byte_arrives_once_and_in_order(boot: Callable[..., Guest], thread: ThreadPoolExecutor) -> None:
    """However the batch is opened and closed meanwhile."""
    number = 20_000
    guest, batch = start(boot, STRB_W1_X0, ADD_X1_X1_1, BACK_2)
    done = threading.Event()
    lock = threading.Lock()
    output = bytearray()

    def collect() -> None:
        while not done.is_set():
            with lock:
                output.extend(batch.close())

    collecting = thread.submit(collect)
    finish = Finish.NONE
    while len(output) < number:
        assert resume(guest.vcpu, finish) == ExitKind.MMIO_WRITE
        with lock:
            output.extend(batch.close())
            output.append(guest.vcpu.frame.value)
            batch.open(FLAGS)
        finish = Finish.ADVANCE
    done.set()
    collecting.result(TIMEOUT)
    assert output == bytes((ord("a") + n) & 0xFF for n in range(len(output)))
